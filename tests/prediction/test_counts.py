"""Whole counts: exact where nothing is predicted to change, and changed as sequenced counts change elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from sest.prediction.counts import MOST_FOLD, changed_counts, counts_of, fold_changes


def cells(n: int = 200, n_genes: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    """Counts, what they are multiplied by to have 10,000, and their log1p in float32 as sest computes it."""
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(0.5, 0.01, (n, n_genes))
    counts[:, 0] += 1
    factor = (1e4 / counts.sum(1)).astype(np.float32)
    return counts, factor, sp.csr_matrix(np.log1p(counts.astype(np.float32) * factor[:, None]))


def test_control_cells_come_back_count_for_count() -> None:
    counts, factor, values = cells()
    np.testing.assert_array_equal(counts_of(values, factor).toarray(), counts)
    share = counts.sum(0) / counts.sum()
    fold = fold_changes(np.asarray(values.mean(0)).ravel(), np.zeros(50), float(np.median(factor)))
    same = changed_counts(sp.csr_matrix(counts), fold, share, np.random.default_rng(1))
    assert same.dtype == np.float32
    np.testing.assert_array_equal(same.toarray(), counts)


@pytest.mark.parametrize("factor", [0.5, 10.0])
@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.5, 8.0])
def test_two_means_of_log1p_values_are_the_ratio_of_their_poisson_rates(factor: float, ratio: float) -> None:
    """Means by simulation, whose error is 2% where 2,000 of a million counts are above zero, and below 0.2% of most."""
    rng, rates = np.random.default_rng(0), np.array([0.02, 0.3, 2.0, 30.0, 900.0])
    before, after = (np.log1p(factor * rng.poisson(r, (1_000_000, 5))).mean(0) for r in (rates, ratio * rates))
    got = fold_changes(before, after - before, factor)
    assert (abs(got / ratio - 1) < [0.05, 0.02, 0.01, 0.01, 0.01]).all()


def test_a_fold_change_has_its_limits() -> None:
    present = np.array([1.0, 1.0, 0.0, 0.5])
    got = fold_changes(present, np.array([-1.0, -7.0, 3.0, 0.0]), 10.0)
    assert got.tolist() == [0.0, 0.0, MOST_FOLD, 1.0]


def test_sums_change_by_the_fold_change_and_counts_keep_their_spread() -> None:
    rng = np.random.default_rng(0)
    fold = np.array([0.0, 0.3, 1.0, 1.7, 4.0])
    rates = rng.gamma(4.0, 0.25, (50_000, 1)) * np.array([2.0, 5.0, 1.0, 3.0, 0.5])
    counts = rng.poisson(rates)
    share = counts.sum(0) / counts.sum()
    got = changed_counts(sp.csr_matrix(counts), fold, share, rng).toarray()
    assert (got == np.rint(got)).all() and (got >= 0).all()
    np.testing.assert_allclose(got.mean(0), counts.mean(0) * fold, rtol=0.02)  # 5 standard errors
    real = rng.poisson(rates * fold)  # what sequencing cells of the changed rates gives
    np.testing.assert_allclose((got == 0).mean(0), (real == 0).mean(0), atol=0.05)
    np.testing.assert_array_equal(got[:, 2], counts[:, 2])
    np.testing.assert_allclose(got[:, 1].var(), real[:, 1].var(), rtol=0.05)  # thinned counts are such counts


def test_what_is_given_is_left_alone_and_zeros_are_not_stored() -> None:
    counts = sp.csr_matrix(np.array([[3, 0, 5], [0, 2, 0]]))
    before = counts.copy()
    got = changed_counts(counts, np.array([0.0, 1.0, 0.5]), np.full(3, 1 / 3), np.random.default_rng(0))
    assert (counts != before).nnz == 0 and (got.data > 0).all() and got.has_sorted_indices
    assert got.toarray()[:, 0].sum() == 0 and got.toarray()[:, 1].tolist() == [0, 2]
