"""obs and var of a file of cells in every layout AnnData and R have written, a column at a time.

N rows. Layouts: a group of columns (AnnData from 0.7, R), with categories beside the codes, behind a reference, or in
`__categories` under the column's name; before 0.7 one compound array, with categories in uns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import h5py
import numpy as np
import pandas as pd

from sest.errors import InputError, one_line, shown
from sest.files.nodes import (
    DAMAGE,
    Array,
    Group,
    Node,
    attribute,
    bad,
    check_stored,
    check_whole,
    child,
    is_array,
    texts,
)

logger = logging.getLogger(__name__)

MAX_ENTRY = 1024  # bytes a row of a column may take, with text behind it
MOST_COLUMNS = 4096  # of a table that is read whole
FEW_ROWS = 2**16  # a column may be as large as one of so many rows
KNOWN_VERSIONS = ("", "0.1.0", "0.2.0")  # of the encodings of columns
OLD_CATEGORIES = "__categories"  # group of obs or var where AnnData 0.7 and SeuratDisk keep the categories


class Table:
    """obs or var as it lies in a file: names at once, a column when it is asked for; like a DataFrame as far as used.

    Columns that nobody asks for are not read, so that an odd one does no harm.

    Args:
        node: the table.
        categories: column -> its categories, of a table from before AnnData 0.7.

    Raises:
        InputError: on opening, no index; on reading, a column that is none of labels or numbers, which is named.
    """

    columns: tuple[str, ...]

    def __init__(self, node: Node, categories: Mapping[str, Array] | None = None) -> None:
        self.node = node
        self._categories = categories or {}
        self._read: dict[str, pd.Series] = {}
        if is_array(node):
            self.columns, self._index, self._length = _compound(node)
            return
        self._index = attribute(node, "_index") or "_index"
        if self._index.startswith("/") or self._index not in node:
            raise bad(node, f"has no index {self._index!r}")
        names = texts(node, "column-order") if "column-order" in node.attrs else [
            name for name in node if name not in (self._index, OLD_CATEGORIES)
        ]  # fmt: skip
        if outside := [name for name in names if name.startswith("/")]:
            raise bad(node, f"names columns outside itself: {shown(outside)}")
        self.columns = tuple(dict.fromkeys(names))
        self._length = _length(child(node, self._index))

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    @cached_property
    def index(self) -> pd.Index:
        """Names of the rows as text, which may repeat."""
        name = None if self._index in ("_index", "index") else self._index
        column = self._column(self._index)
        is_text = isinstance(column, np.ndarray) and column.dtype == object
        return pd.Index(column if is_text else np.asarray(column).astype(str).astype(object), name=name)

    def __getitem__(self, name: str) -> pd.Series:
        if name not in self._read:
            if name not in self.columns:
                raise KeyError(name)
            self._read[name] = pd.Series(self._column(name), index=self.index, name=name)
        return self._read[name]

    def frame(self, *, lenient: bool = False) -> pd.DataFrame:
        """All columns; `lenient`: without those that cannot be read, which is said."""
        if len(self.columns) > MOST_COLUMNS:
            raise bad(self.node, f"has {len(self.columns):,} columns; at most {MOST_COLUMNS:,} are read together")
        found = {}
        for name in self.columns:
            try:
                found[name] = self[name]
            except InputError as error:
                if not lenient:
                    raise
                logger.warning(f"{error} It is left out.")
        return pd.DataFrame(found, index=self.index)

    def _column(self, name: str) -> Any:
        """(N,) values of a column: numbers, objects or a pandas array."""
        try:
            if is_array(self.node):
                values = _decoded(self.node[name], self.node)
                if name in self._categories:
                    values = _old_categorical(values, _values(self._categories[name], len(self)))
            else:
                values = _any_column(self.node, name, len(self))
        except InputError:
            raise
        except (UnicodeDecodeError, *DAMAGE) as error:
            what = f"has a column {name!r} that cannot be read: {type(error).__name__}: {one_line(error)}"
            raise bad(self.node, what) from error
        if len(values) != len(self):
            raise bad(self.node, f"has a column {name!r} of {len(values)} rows, but {len(self)} rows")
        return values


def table_in(group: Group, name: str, uns: Group | None = None) -> Table:
    """The table of that name. `uns` holds the categories of one from before AnnData 0.7.

    Raises:
        InputError: it is no table.
    """
    node = child(group, name)
    if is_array(node) and node.dtype.names is None:
        raise bad(node, "is no table")
    if not is_array(node) or uns is None or is_array(uns):
        return Table(node)
    stored = {name: child(uns, f"{name}_categories") for name in node.dtype.names if f"{name}_categories" in uns}
    return Table(node, {name: categories for name, categories in stored.items() if is_array(categories)})


def _compound(node: Array) -> tuple[tuple[str, ...], str, int]:
    """Columns, index and length of a compound array; the first field is the index."""
    _check_column(node, node.shape[0] if len(node.shape) == 1 else 0)
    first, *others = node.dtype.names
    return tuple(others), first, int(node.shape[0])


def _length(node: Node) -> int:
    """Rows of a column, by its shape: of codes, values or itself."""
    if not is_array(node):  # categorical (codes) or nullable (values)
        node = child(node, "codes" if "codes" in node else "values")
    if not is_array(node):  # which a link in the file can make a group again, without end
        raise bad(node, "is no column of labels or numbers")
    return int(node.shape[0]) if node.shape else 0


def _any_column(table: Group, name: str, n_rows: int) -> Any:
    """A column of a group, whatever wrote it."""
    node = child(table, name)
    if (version := attribute(node, "encoding-version")) not in KNOWN_VERSIONS:
        raise bad(node, f"is stored in version {version} of its encoding, which is newer than this sest")
    if is_array(node):
        values = _values(node, n_rows)
        if values.dtype.kind != "O" and OLD_CATEGORIES in table and name in child(table, OLD_CATEGORIES):
            return _categorical(values, _values(child(child(table, OLD_CATEGORIES), name), n_rows))
        if "categories" not in node.attrs:
            return values
        target = node.attrs["categories"]
        if not isinstance(target, h5py.Reference):  # a name could lead through a link
            raise bad(node, "names its categories instead of referring to them")
        return _categorical(values, _values(node.file[target], n_rows))
    encoding = attribute(node, "encoding-type")
    if encoding == "categorical" or {"codes", "categories"} <= set(node):
        return _categorical(_values(child(node, "codes"), n_rows), _values(child(node, "categories"), n_rows))
    if encoding.startswith("nullable-") and {"values", "mask"} <= set(node):
        values, mask = (_values(child(node, part), n_rows) for part in ("values", "mask"))
        return _nullable(values, mask.astype(bool))
    raise bad(node, f"is stored as {encoding or 'a group'!r}, which is no column of labels or numbers")


def _values(node: Node, n_rows: int) -> np.ndarray:
    """The entries of a column or of its categories, text as str."""
    _check_column(node, n_rows)
    if isinstance(node, h5py.Dataset) and h5py.check_string_dtype(node.dtype) is not None:
        return np.asarray(node.asstr("utf-8")[:], dtype=object)
    return _decoded(node[:], node)


def _check_column(node: Node, n_rows: int) -> None:
    check_stored(node)
    encoding = attribute(node, "encoding-type") or "array"
    if encoding not in ("array", "string-array", "dataframe", "categorical"):
        raise bad(node, f"is stored as {encoding!r}, which is no column of labels or numbers")
    if len(node.shape) != 1:
        raise bad(node, f"is a table of shape {node.shape} and no column; save it as one, or without it")
    if node.size * node.dtype.itemsize > MAX_ENTRY * max(n_rows, FEW_ROWS):
        raise bad(node, f"is too large for a column of {n_rows} rows: {node.size} entries")
    check_whole(node)


def _decoded(values: Any, node: Node) -> np.ndarray:
    """Numbers and booleans as they are, text as str."""
    values = np.asarray(values)
    if values.dtype.kind in "biufmM":
        return values
    if values.dtype.kind in "OSTU":
        entries = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
        if all(isinstance(value, str) for value in entries):
            return np.array(entries, dtype=object)
    raise bad(node, f"has type {values.dtype}; expected labels or numbers")


def _categorical(codes: np.ndarray, categories: np.ndarray) -> pd.Categorical:
    if codes.dtype.kind == "f":  # doubles, as R writes them
        codes = codes.astype(np.int64)
    return pd.Categorical.from_codes(codes, categories=pd.Index(categories))


def _old_categorical(codes: np.ndarray, categories: np.ndarray) -> Any:
    """As AnnData reads them: codes of a table from before 0.7 that fit the categories uns has under the name."""
    fits = codes.dtype.kind in "iu" and (not len(codes) or (codes.min() >= -1 and codes.max() < len(categories)))
    return _categorical(codes, categories) if fits else codes


def _nullable(values: np.ndarray, mask: np.ndarray) -> Any:
    if values.dtype.kind == "b":
        return pd.arrays.BooleanArray(values, mask)
    if values.dtype.kind in "iu":
        return pd.arrays.IntegerArray(values, mask)
    if values.dtype.kind == "f":
        return pd.arrays.FloatingArray(values, mask)
    values = values.copy()
    values[mask] = pd.NA
    return pd.array(values, dtype="string")
