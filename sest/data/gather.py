"""Rows of a CSR as dense log1p expression on a CPU, or summed by group: one pass over the values.

The arrays may lie in memory or be mapped from a file. Shapes: n rows, N cells, G genes. The twin for GPUs is
`sest.data.resident.ResidentCells.expression`; both are the formula of `sest.cells.scale.log1p_rows`, against which
tests/data hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import scipy.sparse

from sest.cells import csr
from sest.errors import InputError

VALUES_AT_ONCE = 2**20  # of `gene_moments`: at most 40 MB are held beside the values themselves


def dense_log1p(
    rows: np.ndarray, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, factor: np.ndarray, out: np.ndarray
) -> None:
    """Write cells as log1p values into `out`, in the calling thread and without the interpreter's lock.

    Args:
        rows: (n,) int64 cells, each in 0 .. N - 1, as is checked.
        indptr: (N + 1,) int64.
        indices: (nnz,) unsigned or signed whole numbers below G, as is checked; a gene at most once a cell.
        data: (nnz,) counts, whole or float32, or log1p values.
        factor: (N,) float32 that counts are multiplied with; 0 marks cells whose values are log1p already.
        out: (n, G) float32.

    Raises:
        InputError: the CSR names values or genes that are not there: its file is damaged.
    """
    check_rows(rows, len(indptr) - 1)
    assert len(factor) >= len(indptr) - 1 and len(out) >= len(rows)
    loop = csr.dense_counts if np.issubdtype(data.dtype, np.integer) else csr.dense_values
    with _as_files_say():
        loop(rows, indptr, indices, data, factor, out)


def take_rows(
    rows: np.ndarray, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (n,) of a CSR as a CSR of their own: indptr (n + 1,) int64, indices (m,) int32, data (m,) as stored.

    Raises:
        InputError: as of `dense_log1p`.
    """
    check_rows(rows, len(indptr) - 1)
    of_rows = np.zeros(len(rows) + 1, np.int64)
    with _as_files_say():
        lengths = csr.row_lengths(rows, indptr, min(len(indices), len(data)))
    np.cumsum(lengths, out=of_rows[1:])
    to_indices, to_data = np.empty(of_rows[-1], np.int32), np.empty(of_rows[-1], data.dtype)
    copy_rows(rows, indptr, indices, to_indices, below=n_genes)
    copy_rows(rows, indptr, data, to_data)
    return of_rows, to_indices, to_data


def copy_rows(rows: np.ndarray, indptr: np.ndarray, values: np.ndarray, out: np.ndarray, *, below: int = 0) -> None:
    """Write the values (nnz,) of rows (n,) one after the other into `out` (m,), without the interpreter's lock.

    Args:
        below: whole numbers that must be below this, as gene numbers are; 0: any values.

    Raises:
        InputError: as of `dense_log1p`.
    """
    check_rows(rows, len(indptr) - 1)
    with _as_files_say():
        csr.copy_values(rows, indptr, values, below, out)


def group_sums(
    code: np.ndarray,
    n_groups: int,
    n_genes: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    factor: np.ndarray,
    *,
    rows: np.ndarray | None = None,
    squared: int = 0,
    mean: bool = False,
    dtype: type[np.floating] = np.float64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of log1p cells by group; each is added up in float64, in the cells' order.

    Args:
        code: (N,) int group of every cell, or (n,) of those in `rows`, below n_groups; -1: in none, and not read.
        indptr, indices, data, factor: as `dense_log1p` takes them.
        rows: (n,) int64 cells; None: all.
        squared, mean, dtype: as of `ordered_sums`.

    Returns:
        (n_groups, G) sums or means, 0 of a group without cells; (n_groups,) cells; (squared, G) sums of squares.

    Raises:
        InputError: as of `dense_log1p`.
    """
    assert code.max(initial=-1) < n_groups and len(code) == (len(indptr) - 1 if rows is None else len(rows))
    order = np.flatnonzero(code >= 0)
    n_cells = np.bincount(code[order], minlength=n_groups)
    order = order[np.argsort(code[order], kind="stable")]
    order = order if rows is None else rows[order]
    values = n_genes, indptr, indices, data, factor
    sums, squares = ordered_sums(order, n_cells, *values, squared=squared, mean=mean, dtype=dtype)
    return sums, n_cells, squares


def ordered_sums(
    rows: np.ndarray,
    n_cells: np.ndarray,
    n_genes: int,
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    factor: np.ndarray,
    *,
    squared: int = 0,
    mean: bool = False,
    dtype: type[np.floating] = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of log1p cells by group, of which each has its cells beside each other.

    Args:
        rows: (n,) int64 cells.
        n_cells: (groups,) how many of them each group has, one group after another.
        indptr, indices, data, factor: as `dense_log1p` takes them.
        squared: how many of the last groups also get sums of squares.
        mean: means instead of sums.
        dtype: of the result.

    Returns:
        (groups, G) sums or means, and (squared, G) sums of squares, as `group_sums`.

    Raises:
        InputError: as of `dense_log1p`.
    """
    assert squared <= len(n_cells) and n_cells.sum() == len(rows) and len(indptr) - 1 <= len(factor)
    check_rows(rows, len(indptr) - 1)
    weight = 1.0 / np.maximum(n_cells, 1) if mean else np.ones(len(n_cells))
    sums: np.ndarray = np.empty((len(n_cells), n_genes), dtype)
    squares = np.empty((squared, n_genes))
    whole = bool(np.issubdtype(data.dtype, np.integer))
    ends = np.concatenate([[0], np.cumsum(n_cells)])
    with _as_files_say():
        csr.sums_of_groups(rows, ends, indptr, indices, data, factor, weight, whole, sums, squares)
    return sums, squares


def add_log1p(
    rows: np.ndarray,
    into: np.ndarray,
    block: scipy.sparse.csr_matrix,
    column: np.ndarray,
    target_sum: float | None,
    sums: np.ndarray,
) -> None:
    """Add log1p cells to sums of groups, in the cells' order: each value is rounded to float32, its sum is float64.

    Args:
        rows: (n,) rows of `block`; others are not read.
        into: (n,) the group of each.
        block: float32 CSR rows, all genes of a file.
        column: (genes of the file,) place in `sums` of every gene, -1 of those that are left out.
        target_sum: counts are normalised to this over all genes of the file; None: values are log1p already.
        sums: (groups, G) float64, which grows.

    Raises:
        InputError: as of `dense_log1p`.
    """
    check_rows(rows, block.shape[0])
    check_rows(into, len(sums))
    assert len(into) == len(rows) and len(column) == block.shape[1] and column.max(initial=-1) < sums.shape[1]
    with _as_files_say():
        csr.add_values(rows, into, block.indptr, block.indices, block.data, column, float(target_sum or 0.0), sums)


def check_rows(rows: np.ndarray, n_cells: int) -> None:
    """Refuse rows that are not among 0 .. n_cells - 1: the compiled loops would read anywhere.

    Raises:
        IndexError: such rows.
    """
    if len(rows) and not 0 <= rows.min() <= rows.max() < n_cells:
        raise IndexError(f"rows {rows.min()} .. {rows.max()} of {n_cells} cells")


@contextmanager
def _as_files_say() -> Iterator[None]:
    """Around a compiled loop, which stops where a CSR of damaged files would lead it out of its arrays."""
    try:
        yield
    except IndexError as error:
        raise InputError(
            f"Values of cells are damaged ({error}). Check the cache with `sest info --verify` and delete the hidden "
            "folder .derived in it: what is there is made again."
        ) from error


def gene_moments(rows: scipy.sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each gene over cells (n, G), both (G,) float64: no float64 copy of all values is made."""
    (n_cells, n_genes), sums = rows.shape, np.zeros((2, rows.shape[1]))
    for start in range(0, rows.nnz, VALUES_AT_ONCE):
        genes = rows.indices[start : start + VALUES_AT_ONCE].astype(np.intp)
        values = rows.data[start : start + VALUES_AT_ONCE].astype(np.float64)
        sums += np.bincount(genes, values, n_genes), np.bincount(genes, values * values, n_genes)
    mean, square = sums / n_cells
    return mean, np.maximum(square - mean**2, 0.0)
