"""Cells moved to another mean: exactly, with the zeros that counts have."""

from __future__ import annotations

import numpy as np
import pytest

from sest.blend.transport import move_to_mean
from sest.cells.scale import LARGEST_PREDICTED_LOG1P


def counts(n: int, rate: np.ndarray, seed: int) -> np.ndarray:
    """log1p cells (n, G) of Poisson counts with these rates, which differ from cell to cell."""
    rng = np.random.default_rng(seed)
    return np.log1p(rng.poisson(rate * rng.gamma(5, 0.2, (n, 1)))).astype(np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.mark.parametrize("n", [2, 100])
def test_the_mean_is_the_one_asked_for(n: int) -> None:
    rates = np.linspace(0.01, 20, 300)
    cells, donors = counts(n, rates, 0), counts(200, rates, 1)
    wanted = donors.mean(0) * np.random.default_rng(2).choice([0.0, 0.3, 0.9, 1.0, 1.5, 4.0], 300)
    got = move_to_mean(cells, wanted, donors, rng())
    assert got.dtype == np.float32 and got.min() >= 0 and got.max() <= LARGEST_PREDICTED_LOG1P
    np.testing.assert_allclose(got.mean(0, dtype=np.float64), wanted, rtol=1e-5, atol=1e-6)  # float32


def test_the_share_of_zeros_moves_with_the_mean_as_that_of_counts_does() -> None:
    rates = np.full(400, 0.5)
    cells = counts(300, rates, 0)
    for factor in (0.5, 2.0):
        other = counts(300, factor * rates, 1)
        got = move_to_mean(cells, np.full(400, other.mean()), cells, rng())
        share, before, wanted = ((x > 0).mean() for x in (got, cells, other))
        assert abs(share - wanted) < 0.4 * abs(before - wanted)  # values change a little as well


def test_cells_that_have_the_mean_stay_as_they_are() -> None:
    cells = counts(50, np.full(20, 1.0), 0)
    np.testing.assert_allclose(move_to_mean(cells, cells.mean(0, dtype=np.float64), cells, rng()), cells, rtol=1e-6)


def test_a_gene_that_no_cell_has_is_switched_on_in_few() -> None:
    """0.03 is what 100 cells have of which three have 1; its mean does not stand in every cell."""
    got = move_to_mean(np.zeros((100, 1), np.float32), np.array([0.03]), np.zeros((5, 1), np.float32), rng())
    assert (got > 0).sum() == 3 and got.mean() == pytest.approx(0.03)
    donors = np.array([[2.0], [0.0]], np.float32)
    got = move_to_mean(np.zeros((100, 1), np.float32), np.array([0.2]), donors, rng())
    assert (got > 0).sum() < 20 and got.mean() == pytest.approx(0.2)


def test_what_is_cut_at_the_largest_value_is_made_up_for_by_other_cells() -> None:
    cells = np.array([[13.0], [1.0], [0.0], [0.0]], np.float32)
    got = move_to_mean(cells, np.array([10.0]), cells, rng())
    assert got.max() <= LARGEST_PREDICTED_LOG1P and got.mean() == pytest.approx(10.0)
    assert move_to_mean(cells, np.array([99.0]), cells, rng()).min() == pytest.approx(LARGEST_PREDICTED_LOG1P)


def test_the_same_randomness_gives_the_same_cells() -> None:
    cells = counts(40, np.full(30, 0.7), 0)
    one, other = (move_to_mean(cells, np.full(30, 0.4), cells, rng()) for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_a_sample_of_more_cells_scatters_around_the_mean_as_such_samples_do() -> None:
    """64 of 320 moved cells against 64 drawn from 320 that were moved together: the same spread of their means."""
    rates = np.full(300, 2.0)
    population = counts(3000, rates, 0)
    present, wanted = population.mean(0), population.mean(0) * 0.7
    random, alone, together = np.random.default_rng(1), [], []
    for _ in range(60):
        cells = population[random.choice(3000, 320, replace=False)]
        sample = move_to_mean(cells[:64], wanted, cells, random, present=present, beside=256)
        alone.append(sample.mean(0) - wanted)
        together.append(move_to_mean(cells, wanted, cells, random)[:64].mean(0) - wanted)
    assert np.std(alone) == pytest.approx(np.std(together), rel=0.15)
    assert abs(np.mean(alone)) < 0.02 * wanted.mean()
