"""The loops over values of CSR rows: each compiled, and before it the same a row at a time, where numba is not there.

None of them leaves its arrays, whatever a damaged file says (IndexError). `sest.data.gather` and `sest.cells.scale` say
what they do and with which shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sest.machine.jit import compiled

SMALL_COUNTS = 64  # whole numbers below this, most of all counts, take their log1p from a table made once a cell
LARGEST_LOG1P_OF_COUNTS = 35.0  # a larger value cannot be a log1p (upstream's limit per cell)
LARGEST_TOTAL_OF_COUNTS = 5e6  # nor can a cell's values if sum(expm1) is larger (upstream's limit per cell)
NO_VALUES, NO_GENE = "a row's values are not there", "a gene is not there"


@compiled(None, nogil=True, inside=True)
def _values_of(cell: Any, indptr: Any, indices: Any, data: Any) -> Any:
    """Where the values of a cell begin and end, which must be among those that are there."""
    first, last = indptr[cell], indptr[cell + 1]
    if not 0 <= first <= last <= min(len(indices), len(data)):
        raise IndexError(NO_VALUES)
    return first, last


def row_lengths(rows: np.ndarray, indptr: np.ndarray, n_values: int) -> np.ndarray:
    """(n,) int64: how many values each of `rows` has, which must be among the n_values that are there."""
    first, last = indptr[rows], indptr[rows + 1]
    if not ((first >= 0) & (first <= last) & (last <= n_values)).all():
        raise IndexError(NO_VALUES)
    return np.asarray(last - first, np.int64)


def _places(rows: np.ndarray, indptr: np.ndarray, n_values: int) -> Iterator[slice]:
    """Where the values of each row are, among the n_values that are there."""
    lengths = row_lengths(rows, indptr, n_values)
    return (slice(a, a + n) for a, n in zip(indptr[rows].tolist(), lengths.tolist(), strict=True))


@compiled(None, nogil=True, inside=True)
def _gene(number: Any, n_genes: int) -> Any:
    """The number of a gene, which must be there."""
    if not 0 <= number < n_genes:
        raise IndexError(NO_GENE)
    return number


def _genes(numbers: np.ndarray, n_genes: int) -> np.ndarray:
    """The numbers of genes, which must all be there."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < n_genes:
        raise IndexError(NO_GENE)
    return numbers.astype(np.intp)  # as indexing does, which takes longer over it


def _log1p(values: np.ndarray, scale: np.floating) -> np.ndarray:
    """float32 log1p, in the type of `scale`, of a cell's values times this; where it is 0 they are log1p already."""
    if not (scale > 0 and len(values)):
        return values.astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # of values below 0 or too large, as the compiled loops
        counts = values.astype(np.intp)
        largest = counts.max()
        if counts.min() >= 0 and largest < len(values) and (values.dtype.kind in "iu" or (counts == values).all()):
            table = np.log1p(np.arange(largest + 1, dtype=scale.dtype) * scale)
            return table.astype(np.float32)[counts]  # most counts are small: of each one logarithm
        return np.log1p(values.astype(scale.dtype) * scale).astype(np.float32)


def _plain_dense(rows: Any, indptr: Any, indices: Any, data: Any, factor: Any, out: Any) -> None:
    places = _places(rows, indptr, min(len(indices), len(data)))
    for dense, scale, values in zip(out, factor[rows], places, strict=False):
        dense[:] = 0.0
        dense[_genes(indices[values], len(dense))] = _log1p(data[values], scale)


@compiled(_plain_dense, nogil=True, inside=True)
def dense_counts(rows: Any, indptr: Any, indices: Any, data: Any, factor: Any, out: Any) -> None:
    table, n_genes = np.empty(SMALL_COUNTS, np.float32), out.shape[1]
    for i in range(len(rows)):
        cell = rows[i]
        dense, scale = out[i], factor[cell]
        dense[:] = np.float32(0.0)
        for count in range(SMALL_COUNTS):
            table[count] = math.log1p(np.float32(count) * scale) if scale > 0 else np.float32(count)
        first, last = _values_of(cell, indptr, indices, data)
        for k in range(first, last):
            count, gene = data[k], _gene(indices[k], n_genes)
            if 0 <= count < SMALL_COUNTS:
                dense[gene] = table[count]
            elif scale > 0:
                dense[gene] = math.log1p(np.float32(count) * scale)
            else:
                dense[gene] = np.float32(count)


@compiled(_plain_dense, nogil=True, inside=True)
def dense_values(rows: Any, indptr: Any, indices: Any, data: Any, factor: Any, out: Any) -> None:
    for i in range(len(rows)):
        cell = rows[i]
        dense, scale = out[i], factor[cell]
        dense[:] = np.float32(0.0)
        first, last = _values_of(cell, indptr, indices, data)
        for k in range(first, last):
            value = np.float32(data[k])
            dense[_gene(indices[k], out.shape[1])] = math.log1p(value * scale) if scale > 0 else value


def _plain_copy(rows: Any, indptr: Any, values: Any, below: Any, out: Any) -> None:
    begin = 0
    for place in _places(rows, indptr, len(values)):
        end = begin + place.stop - place.start
        if end > len(out):
            raise IndexError(NO_VALUES)
        out[begin:end] = _genes(values[place], below) if below else values[place]
        begin = end


@compiled(_plain_copy, nogil=True, inside=True)
def copy_values(rows: Any, indptr: Any, values: Any, below: Any, out: Any) -> None:
    place = 0
    for i in range(len(rows)):
        first, last = _values_of(rows[i], indptr, values, values)
        if place + last - first > len(out):  # a mapped file has changed since it was measured
            raise IndexError(NO_VALUES)
        for k in range(first, last):
            if below:
                _gene(values[k], below)
            out[place] = values[k]
            place += 1


def _plain_sums(
    order: Any,
    ends: Any,
    indptr: Any,
    indices: Any,
    data: Any,
    factor: Any,
    weight: Any,
    whole: bool,
    sums: Any,
    squares: Any,
) -> None:
    n_genes, first_squared = sums.shape[1], len(sums) - len(squares)
    for group in range(len(sums)):
        total, square = np.zeros(n_genes), np.zeros(n_genes)
        rows = order[ends[group] : ends[group + 1]]
        places = _places(rows, indptr, min(len(indices), len(data)))
        for scale, values in zip(factor[rows], places, strict=True):
            genes, logged = _genes(indices[values], n_genes), _log1p(data[values], scale).astype(np.float64)
            np.add.at(total, genes, logged)
            if group >= first_squared:
                np.add.at(square, genes, logged * logged)
        sums[group] = total * weight[group]
        if group >= first_squared:
            squares[group - first_squared] = square


@compiled(_plain_sums, nogil=True, inside=True)
def sums_of_groups(
    order: Any,
    ends: Any,
    indptr: Any,
    indices: Any,
    data: Any,
    factor: Any,
    weight: Any,
    whole: bool,
    sums: Any,
    squares: Any,
) -> None:
    n_genes, first_squared = sums.shape[1], len(sums) - len(squares)
    total, square, table = np.empty(n_genes), np.empty(n_genes), np.empty(SMALL_COUNTS)
    for group in range(len(sums)):
        total[:], square[:] = 0.0, 0.0
        squared = group >= first_squared
        for i in range(ends[group], ends[group + 1]):
            cell = order[i]
            scale = factor[cell]
            if whole:
                for count in range(SMALL_COUNTS):
                    table[count] = math.log1p(np.float32(count) * scale) if scale > 0 else np.float32(count)
            first, last = _values_of(cell, indptr, indices, data)
            for k in range(first, last):
                value, gene = np.float32(data[k]), _gene(indices[k], n_genes)
                if whole and 0 <= value < SMALL_COUNTS:
                    logged = table[int(value)]
                else:
                    logged = np.float64(math.log1p(value * scale) if scale > 0 else value)
                total[gene] += logged
                if squared:
                    square[gene] += logged * logged
        for gene in range(n_genes):
            sums[group, gene] = total[gene] * weight[group]
        if squared:
            squares[group - first_squared] = square


def _plain_add(
    rows: Any, into: Any, indptr: Any, indices: Any, data: Any, column: Any, target_sum: float, sums: Any
) -> None:
    places = _places(rows, indptr, min(len(indices), len(data)))
    for group, place in zip(into, places, strict=True):
        values = data[place]
        total = values.sum(dtype=np.float64) if target_sum > 0 else 0.0
        if total > 0:
            values = _log1p(values, np.float64(target_sum / total))
        genes = column[_genes(indices[place], len(column))]
        kept = genes >= 0
        np.add.at(sums[group], genes[kept], values[kept].astype(np.float64))


@compiled(_plain_add, nogil=True, inside=True)
def add_values(
    rows: Any, into: Any, indptr: Any, indices: Any, data: Any, column: Any, target_sum: float, sums: Any
) -> None:
    table = np.empty(SMALL_COUNTS)
    for i in range(len(rows)):
        first, last = _values_of(rows[i], indptr, indices, data)
        to, scale = sums[into[i]], 0.0
        if target_sum > 0:
            total = 0.0
            for k in range(first, last):
                total += data[k]
            scale = target_sum / total if total > 0 else 0.0
            table[:] = -1.0
        for k in range(first, last):
            gene = column[_gene(indices[k], len(column))]
            if gene < 0:
                continue
            value = data[k]
            if scale <= 0:
                to[gene] += value
                continue
            small = int(value) if 0 <= value < SMALL_COUNTS else -1
            if small >= 0 and small == value:
                if table[small] < 0:
                    table[small] = np.float32(math.log1p(value * scale))
                to[gene] += table[small]
            else:
                to[gene] += np.float32(math.log1p(value * scale))


def _plain_scan(indptr: Any, data: Any) -> tuple[float, float, int, int, int, int, int]:
    data = data[: indptr[-1]]
    starts = indptr[:-1][np.diff(indptr) > 0]  # of cells with values: those without say nothing
    if not len(starts):
        return -np.inf, 0.0, 0, 0, 0, 0, 0
    is_fractional = data != np.rint(data)
    high, fractional = np.maximum.reduceat(data, starts), np.add.reduceat(is_fractional, starts, dtype=np.int64)
    linear = high > LARGEST_LOG1P_OF_COUNTS
    length = np.diff(starts, append=len(data))
    most = length * np.expm1(np.minimum(high, LARGEST_LOG1P_OF_COUNTS).astype(np.float64))
    unsure = ~linear & ((fractional > 0) | (high <= 1)) & (most > LARGEST_TOTAL_OF_COUNTS)  # seldom
    for cell in np.flatnonzero(unsure):
        values = data[starts[cell] : starts[cell] + length[cell]]
        linear[cell] = np.expm1(values.astype(np.float64)).sum() > LARGEST_TOTAL_OF_COUNTS
    raw, whole = linear | ((fractional == 0) & (high > 1)), fractional == 0
    highest, total, n_negative = float(high.max()), float(data.sum(dtype=np.float64)), int((data < 0).sum())
    n_log1p = (~whole & ~linear).sum()
    return highest, total, n_negative, int(fractional.sum()), int(raw.sum()), int(n_log1p), int((raw & whole).sum())


@compiled(_plain_scan, nogil=True)
def scan_values(indptr: Any, data: Any) -> tuple[float, float, int, int, int, int, int]:
    """Of CSR rows: largest stored value, sum, values below zero and not whole; cells that can only be counts or log1p.

    The last number is that of the cells that can only be counts and are all whole.
    """
    highest, total, n_negative, n_fractional, n_raw, n_log1p, n_whole = -np.inf, 0.0, 0, 0, 0, 0, 0
    for cell in range(len(indptr) - 1):
        first, last = indptr[cell], indptr[cell + 1]
        if first == last:  # cells without values say nothing
            continue
        high, fractional, negative, of_cell = data[first], 0, 0, 0.0
        for k in range(first, last):
            value = data[k]
            high = max(high, value)
            fractional += value != np.rint(value)
            negative += value < 0
            of_cell += value
        linear = high > LARGEST_LOG1P_OF_COUNTS
        matters = not linear and (fractional > 0 or high <= 1)
        if matters and (last - first) * np.expm1(np.float64(high)) > LARGEST_TOTAL_OF_COUNTS:  # seldom
            counts = 0.0
            for k in range(first, last):
                counts += np.expm1(np.float64(data[k]))
            linear = counts > LARGEST_TOTAL_OF_COUNTS
        raw = linear or (fractional == 0 and high > 1)
        n_raw, n_whole = n_raw + raw, n_whole + (raw and fractional == 0)
        n_log1p += fractional > 0 and not linear
        highest, total = max(highest, np.float64(high)), total + of_cell
        n_negative, n_fractional = n_negative + negative, n_fractional + fractional
    return highest, total, n_negative, n_fractional, n_raw, n_log1p, n_whole
