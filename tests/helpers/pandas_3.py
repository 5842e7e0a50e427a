"""Tables as other versions of pandas have them."""

from __future__ import annotations

import pandas as pd
import pytest


def as_pandas_3(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose text, also that of categories, has the type that pandas 3 gives it."""
    try:
        text = pd.StringDtype("python", na_value=float("nan"))  # what pandas 3 takes for text by itself
    except TypeError:
        pytest.skip("pandas before 2.3 has no such type")
    table = table.copy()
    table.index = table.index.astype(text)
    for name, column in table.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.cat.rename_categories(column.cat.categories.astype(text))
        elif column.dtype == object:
            table[name] = column.astype(text)
    return table
