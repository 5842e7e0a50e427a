"""cells/csr.py: where numba is not there the same values come out, and no array is left there either.

What the loops compute is tested in both forms with those that call them: tests/data/test_gather.py, test_scale.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from sest.cells import csr

N_GENES = 50
# NumPy and the C library round float32 logarithms apart, by one step at most; sums and decisions do not differ
ONE_STEP = 2.0**-23


def cells(kind: str) -> sp.csr_matrix:
    """40 cells, some without values."""
    rng = np.random.default_rng(len(kind))
    values = rng.poisson(np.exp(rng.normal(-0.5, 1.5, N_GENES)), (40, N_GENES)).astype(np.float64)
    if kind == "large counts":
        values *= rng.choice([1, 1000], values.shape)
    elif kind == "log1p":
        values = np.log1p(values * 3.7)
    elif kind == "log1p of many":
        values = np.log1p(values * 2e5)
    elif kind == "scaled":
        values *= rng.normal(0, 1, values.shape)
    elif kind == "zeros and ones":
        values = np.minimum(values, 1)
    values[::7] = 0
    return sp.csr_matrix(values.astype(np.float32))


KINDS = ["counts", "large counts", "log1p", "log1p of many", "scaled", "zeros and ones"]


def both(loop: Any, *arguments: Any, out: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    """What the compiled loop writes into `out`, and what the plain one does."""
    found = []
    for form in (loop, loop.plain):
        into = tuple(array.copy() for array in out)
        form(*arguments, *into)
        found.append(into)
    return found


def assert_same(found: list[tuple[np.ndarray, ...]], rtol: float) -> None:
    compiled, plain = found
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_give_the_same_values(kind: str, whole: bool) -> None:
    block = cells(kind)
    indptr, indices = block.indptr.astype(np.int64), block.indices.astype(np.uint16)
    data = block.data.astype(np.int16) if whole else block.data
    rng = np.random.default_rng(0)
    rows, factor = rng.integers(0, 40, 30), rng.choice([0, 0.37, 2.5], 40).astype(np.float32)
    many = csr.dense_counts if whole else csr.dense_values
    assert_same(both(many, rows, indptr, indices, data, factor, out=(np.full((30, N_GENES), 7.0, "f4"),)), ONE_STEP)
    size = int(csr.row_lengths(rows, indptr, block.nnz).sum())
    assert_same(both(csr.copy_values, rows, indptr, data, 0, out=(np.zeros(size, data.dtype),)), 0)
    assert_same(both(csr.copy_values, rows, indptr, indices, N_GENES, out=(np.zeros(size, np.int32),)), 0)
    ends, weight = np.array([0, 0, 4, 11, 30]), np.array([1, 0.25, 0.5, 1])
    sums = np.zeros((4, N_GENES)), np.zeros((2, N_GENES))
    with np.errstate(invalid="ignore"):  # logarithms of values below -1
        found = both(csr.sums_of_groups, rows, ends, indptr, indices, data, factor, weight, whole, out=sums)
        rtol = 1e-6 if kind == "scaled" else 2 * ONE_STEP  # squares; values of both signs cancel out
        assert_same(found, rtol)


@pytest.mark.parametrize("target_sum", [0.0, 1e4])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scaled"])
def test_both_forms_add_the_same_cells_to_groups(kind: str, target_sum: float) -> None:
    block, rng = cells(kind), np.random.default_rng(1)
    rows, into = rng.integers(0, 40, 30), rng.integers(0, 3, 30)
    column = np.where(np.arange(N_GENES) % 5, np.arange(N_GENES) % 11, -1)  # several genes in one place
    arrays = block.indptr, block.indices, block.data
    found = both(csr.add_values, rows, into, *arrays, column, target_sum, out=(np.ones((3, 11)),))
    assert_same(found, 1e-12 if kind != "log1p" else 1e-9)  # float64 totals of a cell are summed in another order


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_see_the_same_in_a_scan(kind: str) -> None:
    block = cells(kind)
    loop: Any = csr.scan_values
    compiled, plain = loop(block.indptr, block.data), loop.plain(block.indptr, block.data)
    assert plain == pytest.approx(compiled, rel=1e-12)  # the sum of all values is float64 in another order
    if kind == "log1p of many":  # cells whose logarithms have to be taken back
        assert compiled[4] == 34
    nothing = sp.csr_matrix((3, N_GENES), dtype=np.float32)
    assert loop.plain(nothing.indptr, nothing.data) == loop(nothing.indptr, nothing.data)
