"""The values of a file of cells in any form on disk (CSR, CSC, dense; any real dtype) as float32 CSR rows.

N cells, G genes. What the files say of themselves is checked before SciPy sees it; the order of a row's indices,
repeats and the values themselves are left to `sest.files.cell_file`.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import zarr

from sest.errors import shown
from sest.files.nodes import Array, Group, Node, attribute, bad, check_numbers, check_whole, child, container, is_array

logger = logging.getLogger(__name__)

READ_VALUES = 2**21  # values handled at once while streaming: some 100 MB of temporaries
WINDOW_VALUES = 2**24  # values of the rows kept in memory for CSC and dense files: 128 MB as CSR


class Matrix(Protocol):
    """Values on disk, read in blocks of rows."""

    shape: tuple[int, int]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows to read, and to keep, when [start, stop) is wanted; they contain `start`."""

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Return rows [start, stop) with indices in range; order, duplicates and values are not yet checked."""


def open_matrix(matrix: Node) -> Matrix:
    """Check X or a layer as far as can be seen without reading its values.

    Raises InputError for another form than CSR, CSC and dense, values that are no numbers, and inconsistent shapes.
    """
    if is_array(matrix):
        check_numbers(matrix)
        if len(matrix.shape) != 2:
            raise bad(matrix, f"has shape {matrix.shape}; expected cells x genes")
        _check_gene_count(matrix, matrix.shape[1])
        return _Dense(matrix)
    form, shape_name = attribute(matrix, "encoding-type"), "shape"
    if not form and (old := attribute(matrix, "h5sparse_format")):  # AnnData before 0.7
        form, shape_name = f"{old}_matrix", "h5sparse_shape"
    shape = _whole(np.asarray(matrix.attrs.get(shape_name, ())), matrix)
    if form not in ("csr_matrix", "csc_matrix"):
        raise bad(matrix, f"is stored as {form!r}; expected csr_matrix, csc_matrix or a dense array")
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape.astype(np.int64) < 0).any():
        raise bad(matrix, "does not say its shape as cells x genes")
    n_cells, n_genes = (int(n) for n in shape)
    _check_gene_count(matrix, n_genes)
    return (_Csr if form == "csr_matrix" else _Csc)(matrix, (n_cells, n_genes))


class _Csr:
    """CSR on disk: rows are read exactly where they are asked for."""

    def __init__(self, group: Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._indptr, self._indices, self._data = _compressed(group, *shape)
        # HDF5 keeps what it has decompressed; of Zarr many chunks are read at once, or each would be read many times
        self._least = max(READ_VALUES, 4 * self._data.chunks[0]) if isinstance(self._data, zarr.Array) else 0

    def span(self, start: int, stop: int) -> tuple[int, int]:
        if not self._least:
            return start, stop
        fit = int(np.searchsorted(self._indptr, self._indptr[start] + self._least, side="right")) - 1
        return start, min(max(stop, fit), self.shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        a, b = int(self._indptr[start]), int(self._indptr[stop])
        indices = _indices(self._indices, a, b, self.shape[1])
        indptr = self._indptr[start : stop + 1] - a
        return sp.csr_matrix((_float32(self._data[a:b]), indices, indptr), shape=(stop - start, self.shape[1]))


class _Csc:
    """CSC on disk: no row can be found without reading everything, so one pass fills a window of many rows."""

    def __init__(self, group: Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._indptr, self._indices, self._data = _compressed(group, shape[1], shape[0])
        self._said = False

    @cached_property
    def _row_starts(self) -> np.ndarray:  # (N+1,) int64: stored values in the rows before each
        counts = np.zeros(self.shape[0], dtype=np.int64)
        for a in range(0, self._data.shape[0], READ_VALUES):
            b = min(a + READ_VALUES, self._data.shape[0])
            counts += np.bincount(_indices(self._indices, a, b, self.shape[0]), minlength=self.shape[0])
        if counts.max() > self.shape[1]:
            raise bad(self._indices, f"is damaged: cell {int(counts.argmax())} has more values than there are genes")
        return np.concatenate([[0], np.cumsum(counts)])

    def span(self, start: int, stop: int) -> tuple[int, int]:
        starts = self._row_starts
        fit = int(np.searchsorted(starts, starts[start] + WINDOW_VALUES, side="right")) - 1
        passes = 1 + int(starts[-1]) // WINDOW_VALUES
        if passes > 2 and not self._said:
            self._said = True
            name = container(self._data)
            logger.warning(
                "%s is stored by gene (CSC): %d passes; saved again with X.tocsr() it takes one.", name, passes
            )
        return start, max(start + 1, min(fit, self.shape[0]))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        indptr = self._row_starts[start : stop + 1] - self._row_starts[start]
        fill = indptr[:-1].copy()  # where the next value of each row goes
        indices = np.empty(int(indptr[-1]), dtype=np.int32)
        data = np.empty(int(indptr[-1]), dtype=np.float32)
        for a in range(0, self._data.shape[0], READ_VALUES):
            columns, slab = self._slab(a, min(a + READ_VALUES, self._data.shape[0]), start, stop)
            counts = np.diff(slab.indptr)
            to = np.repeat(fill - slab.indptr[:-1], counts) + np.arange(slab.nnz)
            indices[to] = slab.indices + columns
            data[to] = slab.data
            fill += counts
        return sp.csr_matrix((data, indices, indptr), shape=(stop - start, self.shape[1]))

    def _slab(self, a: int, b: int, start: int, stop: int) -> tuple[int, sp.csr_matrix]:
        """Return the first column of stored values [a, b), and those of them in rows [start, stop), from there."""
        first = int(np.searchsorted(self._indptr, a, side="right")) - 1
        last = int(np.searchsorted(self._indptr, b, side="left"))
        rows = _indices(self._indices, a, b, self.shape[0])
        inside = (rows >= start) & (rows < stop)
        kept = np.concatenate([[0], np.cumsum(inside)])
        indptr = kept[np.clip(self._indptr[first : last + 1], a, b) - a]
        data = _float32(self._data[a:b])[inside] if kept[-1] else np.empty(0, dtype=np.float32)
        slab = sp.csc_matrix((data, rows[inside] - start, indptr), shape=(stop - start, last - first))
        return first, slab.tocsr()


class _Dense:
    """Dense on disk: windows of rows that end where its chunks end."""

    def __init__(self, dataset: Array) -> None:
        self.shape: tuple[int, int] = dataset.shape
        self._dataset = dataset
        rows = max(1, WINDOW_VALUES // max(1, self.shape[1]))
        chunk = dataset.chunks[0] if dataset.chunks else 1
        self._rows = rows - rows % chunk if chunk <= rows else rows

    def span(self, start: int, stop: int) -> tuple[int, int]:
        first = start - start % self._rows
        return first, min(first + self._rows, self.shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        block = self._dataset[start:stop]
        step = rows_at_once(self.shape[1])
        pieces = [sp.csr_matrix(_float32(block[i : i + step])) for i in range(0, stop - start, step)]
        return sp.vstack(pieces, format="csr")


def rows_at_once(n_genes: int) -> int:
    """Rows of at most READ_VALUES values, stored or not; at least one."""
    return max(1, READ_VALUES // n_genes)


def _check_gene_count(matrix: Node, n_genes: int) -> None:
    if n_genes > WINDOW_VALUES:
        raise bad(matrix, f"has {n_genes} genes; at most {WINDOW_VALUES} are read")


def _compressed(group: Group, n_major: int, n_minor: int) -> tuple[np.ndarray, Array, Array]:
    """Return (indptr int64 (n_major+1,), indices, data) of a CSR or CSC group, checked as far as indptr shows."""
    names = ("indptr", "indices", "data")
    if missing := [name for name in names if name not in group]:
        raise bad(group, f"has no {shown(missing)}: it is not a sparse matrix")
    indptr_set, indices, data = (child(group, name) for name in names)
    for part, kinds in ((indptr_set, "iuf"), (indices, "iuf"), (data, "iufb")):
        check_numbers(part)
        if len(part.shape) != 1 or part.dtype.kind not in kinds:
            raise bad(part, f"has shape {part.shape} and type {part.dtype}; expected one row of numbers")
    if indptr_set.shape[0] != n_major + 1:
        raise bad(indptr_set, f"has {indptr_set.shape[0]} entries where the shape asks for {n_major + 1}")
    if indices.shape != data.shape:
        raise bad(group, f"has {indices.shape[0]} indices for {data.shape[0]} values")
    check_whole(indptr_set)
    indptr = _whole(indptr_set[:], indptr_set).astype(np.int64)
    steps = np.diff(indptr)
    if indptr[0] != 0 or indptr[-1] != data.shape[0] or (steps < 0).any():
        raise bad(indptr_set, f"is damaged: it must rise from 0 to the number of values ({data.shape[0]})")
    if (steps > n_minor).any():
        raise bad(indptr_set, f"is damaged: entry {int(np.argmax(steps > n_minor))} spans more than {n_minor} values")
    return indptr, indices, data


def _whole(numbers: np.ndarray, where: Node) -> np.ndarray:
    """Doubles, as R writes them, as the whole numbers they are; anything else as it is."""
    if numbers.dtype.kind != "f":
        return numbers
    if not (np.all(np.abs(numbers) < 2**53) and (numbers == np.rint(numbers)).all()):
        raise bad(where, "holds numbers that are not whole")
    return numbers.astype(np.int64)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        return values.astype(np.float32, copy=False)


def _indices(dataset: Array, start: int, stop: int, limit: int) -> np.ndarray:
    """Return stored indices [start, stop), all within [0, limit): SciPy would write outside its memory for others."""
    indices = _whole(dataset[start:stop], dataset)
    if len(indices) and (indices.min() < 0 or indices.max() >= limit):
        raise bad(
            dataset, f"is damaged: it runs from {indices.min()} to {indices.max()}, but only 0 to {limit - 1} exist"
        )
    return indices.astype(np.int32 if limit <= np.iinfo(np.int32).max else np.int64, copy=False)
