"""A table of what a prediction says: of every perturbation and gene the mean change, the fold change and a test.

The test is Wilcoxon's rank sum over predicted and control cells, by pdex (the extra `challenge`), Benjamini-Hochberg
within a perturbation. Shapes: n cells, G genes. Space: log1p.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse

from sest import progress
from sest.cache.disk import file_aside
from sest.cells.columns import Columns
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.errors import InputError
from sest.outputs import to_csv

logger = logging.getLogger(__name__)

COLUMNS = (
    "cell_type perturbation gene n_cells n_controls mean mean_of_controls change fold_change log2_fold_change"
).split()
TESTED = ("p_value", "fdr")
SMALL = 1e-9  # counts a cell, added to both sides of a ratio


def check_table(path: Path) -> None:
    """Refuse a place for the table that cannot be written as its name says.

    Raises:
        InputError: another ending, or no package that writes it.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"--effects {path} must end in .csv or .parquet.")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError("--effects .parquet needs pyarrow: pip install pyarrow, or write a .csv.")


def write_effects(path: Path, prediction: Path, columns: Columns, target_sum: float | None) -> None:
    """Write the table of a prediction's file, which is read cell type by cell type.

    Args:
        path: .csv or .parquet, replaced as a whole.
        prediction: an .h5ad that was just written, with its controls.
        columns: of its obs.
        target_sum: counts a cell that its counts are normalised to; None: it holds log1p values.
    """
    if find_spec("pdex") is None:
        logger.info("pdex is not installed, so the table has no p_value and fdr: pip install 'sest[challenge]'.")
    if target_sum is not None:
        logger.info(
            f"The table's counts are normalised to {target_sum:,.0f} a cell over the genes of {prediction.name}."
        )
    tables = list(_tables(prediction, columns, target_sum))
    table = pd.concat(tables, ignore_index=True)
    with file_aside(path) as aside:
        if path.suffix == ".csv":
            to_csv(table, aside)
        else:
            table.to_parquet(aside, index=False)


def _tables(prediction: Path, columns: Columns, target_sum: float | None) -> Iterator[pd.DataFrame]:
    """A table of every cell type."""
    from anndata import read_h5ad  # slow to import

    file = read_h5ad(prediction, backed="r")
    try:
        kinds = file.obs[str(columns.cell_type)].astype(str).to_numpy()
        names = np.unique(kinds).tolist()
        progress.begin("Testing genes", len(names), "cell types")
        for kind in names:
            part = file[np.flatnonzero(kinds == kind)].to_memory()
            values = scipy.sparse.csr_matrix(part.X)
            if target_sum is not None:
                values = log1p_rows(values, factors_to(target_sum, total_counts(values)).astype(np.float32))
            perturbation = part.obs[str(columns.perturbation)].astype(str).to_numpy()
            yield _table(kind, values, perturbation, str(columns.control), list(map(str, part.var_names)))
            progress.advance()
    finally:
        file.file.close()


def _table(
    cell_type: str, values: scipy.sparse.csr_matrix, perturbation: np.ndarray, control: str, genes: list[str]
) -> pd.DataFrame:
    """The rows of one cell type: perturbation after perturbation, gene after gene."""
    controls = perturbation == control
    logs = values.astype(np.float64)
    natural = logs.expm1()

    def means(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(logs[rows].mean(0)).ravel(), np.asarray(natural[rows].mean(0)).ravel()

    of_controls, counts_of_controls = means(controls)
    parts = []
    for name in sorted(set(perturbation) - {control}):
        mine = perturbation == name
        mean, counts = means(mine)
        fold = (counts + SMALL) / (counts_of_controls + SMALL)
        made = (cell_type, name, genes, mine.sum(), controls.sum(), mean, of_controls, mean - of_controls, fold)
        parts.append(pd.DataFrame(dict(zip(COLUMNS, (*made, np.log2(fold)), strict=True))))
    table = pd.concat(parts, ignore_index=True)
    return table if find_spec("pdex") is None else _tested(table, values, perturbation, control, genes)


def _tested(
    table: pd.DataFrame, values: scipy.sparse.csr_matrix, perturbation: np.ndarray, control: str, genes: list[str]
) -> pd.DataFrame:
    """The same with `TESTED`, by pdex."""
    from anndata import AnnData
    from pdex import pdex

    obs = pd.DataFrame({"perturbation": pd.Categorical(perturbation)}, index=list(map(str, range(len(perturbation)))))
    cells = AnnData(values, obs=obs, var=pd.DataFrame(index=genes))
    found = pdex(cells, groupby="perturbation", mode="ref", reference=control, is_log1p=True, as_pandas=True)
    found = found.rename(columns={"target": "perturbation", "feature": "gene"})[["perturbation", "gene", *TESTED]]
    found["perturbation"], found["gene"] = found["perturbation"].astype(str), found["gene"].astype(str)
    return table.merge(found, on=["perturbation", "gene"], how="left", validate="one_to_one")
