"""Rows of a CSR as dense log1p values and as a CSR of their own, against values worked out by hand."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp

from sest.cells.csr import SMALL_COUNTS
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.data.gather import add_log1p, dense_log1p, gene_moments, group_sums, take_rows
from sest.errors import InputError

pytestmark = pytest.mark.usefixtures("loops")

# Four cells of four genes: 0 3 0 1 | nothing | 100 0 0 0 | 0 0 2 5
INDPTR = np.array([0, 2, 2, 3, 5])
INDICES = np.array([1, 3, 0, 2, 3], np.uint16)
COUNTS = np.array([3, 1, 100, 2, 5])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_counts_times_their_cells_factor_become_log1p_and_the_rest_zero(dtype: type) -> None:
    factor = np.array([2.0, 7.0, 0.5, 0.0], np.float32)  # 0: the values are log1p already
    out = np.full((5, 4), np.nan, np.float32)  # whatever a buffer held before
    rows = np.array([3, 0, 1, 2, 0])  # any order, a row twice
    dense_log1p(rows, INDPTR, INDICES, COUNTS.astype(dtype), factor, out)
    first = [0, np.log(7), 0, np.log(3)]
    expected = [[0, 0, 2, 5], first, [0, 0, 0, 0], [np.log(51), 0, 0, 0], first]
    np.testing.assert_allclose(out, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("factor", [0.0, 0.37])
def test_counts_in_and_beyond_the_table_of_small_ones_are_treated_alike(factor: float) -> None:
    counts = np.array([SMALL_COUNTS - 1, SMALL_COUNTS, SMALL_COUNTS + 1, 30_000, -1], np.int16)
    out = np.empty((1, 5), np.float32)
    indices = np.arange(5, dtype=np.uint16)
    dense_log1p(np.array([0]), np.array([0, 5]), indices, counts, np.array([factor], np.float32), out)
    np.testing.assert_allclose(out[0], np.log1p(counts * factor) if factor else counts, rtol=1e-6)


def test_gene_numbers_use_all_of_their_two_bytes() -> None:
    out = np.empty((1, 2**16), np.float32)
    last = np.array([2**16 - 1], np.uint16)
    dense_log1p(np.array([0]), np.array([0, 1]), last, np.array([1], np.int16), np.ones(1, np.float32), out)
    assert out[0].nonzero()[0].tolist() == [2**16 - 1] and out[0, -1] == np.float32(np.log(2))


def test_rows_that_are_taken_form_a_csr_of_their_own() -> None:
    indptr, indices, data = take_rows(np.array([3, 1, 0, 3]), INDPTR, INDICES, COUNTS.astype(np.int16), 4)
    assert indptr.tolist() == [0, 2, 2, 4, 6] and indptr.dtype == np.int64
    assert indices.tolist() == [2, 3, 1, 3, 2, 3] and indices.dtype == np.int32
    assert data.tolist() == [2, 5, 3, 1, 2, 5] and data.dtype == np.int16
    for part in take_rows(np.zeros(0, np.int64), INDPTR, INDICES, COUNTS, 4)[1:]:
        assert len(part) == 0


@pytest.mark.parametrize("row", [4, -1, 99])
def test_rows_that_are_not_there_are_refused(row: int) -> None:
    """The compiled loops would read anywhere."""
    rows = np.array([0, row])
    with pytest.raises(IndexError, match="of 4 cells"):
        take_rows(rows, INDPTR, INDICES, COUNTS, 4)
    with pytest.raises(IndexError, match="of 4 cells"):
        dense_log1p(rows, INDPTR, INDICES, COUNTS, np.ones(4, np.float32), np.empty((2, 4), np.float32))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_sums_by_group_are_those_of_log1p_cells_and_of_their_squares(dtype: type) -> None:
    factor = np.array([2.0, 7.0, 0.5, 0.0], np.float32)  # 0: the values are log1p already
    values: tuple[np.ndarray, ...] = (INDPTR, INDICES, COUNTS.astype(dtype), factor)
    sums, n_cells, squares = group_sums(np.array([2, 0, -1, 2]), 3, 4, *values, squared=1)
    assert n_cells.tolist() == [1, 0, 2]
    log = np.log([3.0, 7.0])
    # log1p is rounded to float32
    np.testing.assert_allclose(sums, [[0] * 4, [0] * 4, [0, log[1], 2, 5 + log[0]]], rtol=1e-7)
    np.testing.assert_allclose(squares, [[0, log[1] ** 2, 4, 25 + log[0] ** 2]], rtol=1e-6)
    means, _, _ = group_sums(np.array([2, 0, -1, 2]), 3, 4, *values, mean=True, dtype=np.float32)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, [[0] * 4, [0] * 4, [0, log[1] / 2, 1, 2.5 + log[0] / 2]], rtol=1e-6)


def test_sums_of_many_cells_are_exact_to_float64() -> None:
    """So many values of 0.1 in float32 would be off by 0.01%."""
    n = 100_000
    data, factor = np.full(n, 0.1, np.float32), np.zeros(n, np.float32)
    sums, _, _ = group_sums(np.zeros(n, np.int64), 1, 1, np.arange(n + 1), np.zeros(n, np.uint16), data, factor)
    assert sums[0, 0] == pytest.approx(n * float(np.float32(0.1)), rel=1e-10)


@pytest.mark.parametrize("target_sum", [None, 1e4, 12.5])
def test_cells_added_by_group_are_the_same_float32_values_that_log1p_rows_gives(target_sum: float | None) -> None:
    rng = np.random.default_rng(0)
    values = rng.poisson(0.8, (40, 30)) * rng.choice([1.0, 1.0, 0.5, 100.0], (40, 30))
    values[7], values[8] = 0, 0  # cells without counts
    values[8, 29] = 4  # counts of genes that are left out only
    block = sp.csr_matrix(values.astype(np.float32))
    column = np.full(30, -1)
    column[rng.permutation(29)[:20]] = np.arange(20)
    rows, into = np.array([3, 7, 8, 0, 39, 12, 3]), np.array([1, 0, 0, 1, 2, 1, 2])  # any order, a row twice
    sums = np.ones((4, 20))  # what was there stays
    add_log1p(rows, into, block, column, target_sum, sums)
    logs = block if target_sum is None else log1p_rows(block, factors_to(target_sum, total_counts(block)))
    expected = np.ones((4, 20))
    np.add.at(expected, into, logs.toarray()[rows][:, np.argsort(column)[10:]].astype(np.float64))
    np.testing.assert_allclose(sums, expected, rtol=1e-12)  # sums of float64 in the same order


def test_rows_and_groups_that_are_not_there_are_refused_when_cells_are_added() -> None:
    block, sums = sp.csr_matrix(np.ones((2, 3), np.float32)), np.zeros((4, 3))
    for rows, into, message in (([0, 2], [0, 0], "2 .* of 2|of 2 cells"), ([0, 1], [0, 4], "of 4")):
        with pytest.raises(IndexError, match=message):
            add_log1p(np.array(rows), np.array(into), block, np.arange(3), None, sums)
    assert not sums.any()


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize(
    ("indptr", "indices"),
    [
        ([0, 2, 2, 3, 5], [1, 3, 0, 4, 3]),  # a gene after the last one
        ([0, 2, 2, 3, 5], [1, 3, 0, 2, 65_535]),
        ([0, 2, 2, 3, 5], [1, 3, 0, -1, 3]),
        ([0, 2, 2, 3, 6], [1, 3, 0, 2, 3]),  # values after the last one
        ([0, 2, 2, 3, 2**62], [1, 3, 0, 2, 3]),
        ([0, 2, 2, 5, 3], [1, 3, 0, 2, 3]),  # a row that ends before it begins
        ([0, 2, 2, -3, 5], [1, 3, 0, 2, 3]),
    ],
)
def test_no_loop_leaves_its_arrays_whatever_a_damaged_csr_says(
    indptr: list[int], indices: list[int], dtype: type
) -> None:
    rows: np.ndarray = np.array([0, 1, 2, 3])
    data: np.ndarray = COUNTS.astype(dtype)
    csr = np.array(indptr), np.array(indices, np.int32), data
    out = np.zeros((12, 4), np.float32)  # between what nothing may write to
    sums = np.zeros((12, 4))
    damage = pytest.raises(InputError, match=r"are damaged \((a gene is|a row's values are) not there\)")
    with damage:
        dense_log1p(rows, *csr, np.ones(4, np.float32), out[4:8])
    with damage:
        take_rows(rows, *csr, 4)
    with damage:
        group_sums(np.zeros(4, np.int64), 1, 4, *csr, np.ones(4, np.float32))
    block = sp.csr_matrix((4, 4), dtype=np.float32)
    block.indptr, block.indices, block.data = csr[0], csr[1], data.astype(np.float32)
    with damage:
        add_log1p(rows, np.array([0, 1, 2, 3]), block, np.arange(4), 1e4, sums[4:8])
    assert not out[:4].any() and not out[8:].any() and not sums[:4].any() and not sums[8:].any()


@pytest.mark.parametrize("at_once", [3, 2**20])
def test_moments_of_genes_are_those_of_the_dense_cells(at_once: int) -> None:
    cells = sp.random(40, 7, 0.4, format="csr", dtype=np.float32, random_state=1)
    cells.data[:5] = 0.0  # stored zeros
    with mock.patch("sest.data.gather.VALUES_AT_ONCE", at_once):
        mean, variance = gene_moments(cells)
        none = gene_moments(cells[:2, :0])
    dense = cells.toarray().astype(np.float64)
    np.testing.assert_allclose(mean, dense.mean(0), rtol=1e-14)
    np.testing.assert_allclose(variance, dense.var(0), rtol=1e-12, atol=1e-15)
    assert [part.shape for part in none] == [(0,), (0,)]
