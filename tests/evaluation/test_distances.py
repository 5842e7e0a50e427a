"""The energy distance without self-distances: against all distances written out, and its mean where nothing differs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.spatial.distance
import torch

from sest.blend.transport import move_to_mean
from sest.evaluation.distances import (
    CELLS,
    Cells,
    Controls,
    energy_distances,
    l1_distances,
    sampled,
    unbiased_energy_distance,
)
from sest.head.loss import ObservedSets, energy_distance


def of_tensors(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ObservedSets(y).energy_distances(x)[1]


def cells(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).normal(shift, 1, (n, 30)), 0).astype(np.float32)


def by_hand(x: np.ndarray, y: np.ndarray, draw: np.ndarray | None = None) -> float:
    """From all distances; with `draw`, those within x of cells of different draws alone."""
    between, within = scipy.spatial.distance.cdist(x, y).mean(), scipy.spatial.distance.pdist(x)
    if draw is not None:
        within = within[scipy.spatial.distance.pdist(draw[:, None].astype(float)) > 0]
    return float(between - 0.5 * within.mean() - 0.5 * scipy.spatial.distance.pdist(y).mean())


@pytest.mark.parametrize(("n", "m"), [(20, 20), (2, 9), (40, 3)])
def test_it_is_that_of_all_distances_of_different_cells(n: int, m: int) -> None:
    x, y = cells(n, 0), cells(m, 1, 0.3)
    assert unbiased_energy_distance(x, y) == pytest.approx(by_hand(x, y), rel=1e-9)
    got = of_tensors(torch.from_numpy(x)[None], torch.from_numpy(y)[None])
    assert float(got) == pytest.approx(by_hand(x, y), abs=1e-4)  # float32 sums of distances of about 5


def test_predictions_of_the_same_sets_share_what_is_known_of_these() -> None:
    """Both distances of two predictions: those of each alone, to float32 rounding of distances of about 5."""
    y, *predicted = (torch.from_numpy(np.stack([cells(20, 10 * i + j) for j in range(3)])) for i in range(3))
    first = ObservedSets(y)
    for observed in (first, ObservedSets(y, within=first.within)):
        for x in predicted:
            loss, unbiased = observed.energy_distances(x)
            np.testing.assert_allclose(loss, energy_distance(x, y), atol=2e-5)
            np.testing.assert_array_equal(unbiased, of_tensors(x, y))


def test_copies_of_a_cell_and_cells_of_one_control_are_not_compared() -> None:
    """As sets of few cells are filled with copies, and few controls are drawn again: mean 0 for one distribution."""
    rng, found, of_sets = np.random.default_rng(0), [], []
    for i in range(300):
        few, pool = cells(6, 2 * i), cells(10, 2 * i + 1)
        a, b, c = rng.choice(6, 16), rng.choice(10, 16), rng.choice(10, 16)
        x, y = torch.from_numpy(pool[b])[None], torch.from_numpy(few[a])[None]
        observed, other = ObservedSets(y, numbers=a[None]), torch.from_numpy(pool[c])[None]
        found.append(float(observed.energy_distances(x, other=other, controls=(b[None], c[None]))[1]))
        of_sets.append(float(observed.energy_distances(x, controls=(b[None],))[1]))
    for values in (found, of_sets):
        assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    draw, source = np.repeat([0, 1], 8), np.arange(16) % 8
    one = Cells.about(np.zeros(30), np.tile(cells(8, 0), (2, 1)))
    assert one.within(draw, source) == pytest.approx(scipy.spatial.distance.pdist(cells(8, 0)).mean(), rel=1e-5)
    assert np.isnan(one.within(draw, np.zeros(16, int)))
    alone = ObservedSets(y, numbers=np.zeros((1, 16), int)).energy_distances(x)[1]
    assert np.isnan(float(alone))


def test_its_mean_over_samples_of_one_distribution_is_zero_where_the_loss_s_is_not() -> None:
    pairs = [(cells(8, 2 * i), cells(8, 2 * i + 1)) for i in range(300)]
    found = np.array([unbiased_energy_distance(x, y) for x, y in pairs])
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(len(found))
    x, y = (torch.from_numpy(np.stack([pair[i] for pair in pairs])) for i in (0, 1))
    assert float(energy_distance(x, y).mean()) > 0.3
    np.testing.assert_allclose(of_tensors(x, y).numpy(), found, atol=1e-4)


@pytest.mark.parametrize("how", ["moved to one mean", "set apart"])
def test_cells_that_were_predicted_together_gain_nothing_by_it(how: str) -> None:
    """The right distribution, in two draws of 16 that know nothing of each other: 0 in the mean, and else below it."""
    draw, rng = np.repeat([0, 1], 16), np.random.default_rng(0)
    apart: list[float] = []
    together: list[float] = []
    many = cells(20_000, 0)
    mean = many.mean(0, dtype=np.float64)
    for _ in range(300):
        real, x = rng.choice(many, 32), rng.choice(many, 32)
        for one in (x[:16], x[16:]):  # rows of x
            if how == "moved to one mean":
                one[:] = move_to_mean(one, mean, one, rng)
            else:  # for each cell the one that is opposite to it
                one[8:] = 2 * many.mean(0) - one[:8]
        a, b, c = (sp.csr_matrix(side) for side in (real, x, real[:2]))
        for found, of in ((apart, draw), (together, None)):
            found.append(energy_distances(a, b, Controls(c, c, mean), {"model": mean}, 32, rng, of)["model"])
    error = np.std(apart) / np.sqrt(len(apart))
    expected = 0.0
    if how == "set apart":  # half of the cells are of the mirrored distribution
        mirrored = np.concatenate([many[:2000], 2 * many.mean(0) - many[2000:4000]])
        expected = by_hand(mirrored, many[4000:8000])
    assert abs(np.mean(apart) - expected) < 3 * error
    assert np.mean(together) < expected - 10 * error


def test_cells_of_too_little_spread_lose_more_by_it_than_by_the_loss() -> None:
    """What a head earns there that predicts cells nearer together than real ones are."""
    real, narrow, honest = cells(16, 0), [], []
    for i in range(40):
        drawn = cells(16, i + 1)
        honest.append(drawn)
        narrow.append(drawn.mean(0) + 0.9 * (drawn - drawn.mean(0)))
    y = torch.from_numpy(np.stack([real] * 40))
    sets = [torch.from_numpy(np.stack(x).astype(np.float32)) for x in (narrow, honest)]
    biased, unbiased = ([float(of(x, y).mean()) for x in sets] for of in (energy_distance, of_tensors))
    assert biased[0] - biased[1] < unbiased[0] - unbiased[1] - 0.01


def test_a_single_cell_has_no_distance_to_others_of_its_kind() -> None:
    assert np.isnan(unbiased_energy_distance(cells(1, 0), cells(5, 1)))
    assert np.isnan(float(of_tensors(torch.zeros(1, 1, 3), torch.zeros(1, 5, 3))))


def test_at_most_so_many_cells_of_each_group_are_drawn() -> None:
    group, names = np.repeat([0, -1, 2, 1], [100, 50, 30, 200]), {0: ("a",), 2: ("a", "P")}
    chosen = sampled(group, names, 0)
    assert chosen[:100].sum() == CELLS and not chosen[100:150].any() and chosen[150:180].all()
    assert not chosen[180:].any() and (chosen == sampled(group, names, 0)).all()
    assert (chosen != sampled(group, names, 1)).any()
    again = sampled(np.where(group == 0, 7, group), {7: ("a",)}, 0)  # the same cells, whatever else there is
    assert (again[:100] == chosen[:100]).all()


def test_baselines_are_controls_moved_to_their_mean() -> None:
    real, model, controls, own = (cells(20, seed, seed / 10) for seed in range(4))
    means = {"model": model.mean(0), "controls": controls.mean(0), "stack": own.mean(0) + 0.2}
    a, b, c, d = (sp.csr_matrix(x) for x in (real, model, controls, own))
    beside = Controls(c, d, own.mean(0))
    got = energy_distances(a, b, beside, means, 50, np.random.default_rng(5))
    moved, rng = np.empty_like(own), np.random.default_rng(5)
    for half in (0, 1):  # 25 of the 50 cells are predicted together, and 10 of these are here
        moved[half::2] = move_to_mean(own[half::2], means["stack"], own, rng, present=own.mean(0), beside=15)
    halves = np.arange(20) % 2
    expected = {
        "model": by_hand(model, real),
        "controls": by_hand(controls, real),
        "stack": by_hand(moved, real, halves),
    }
    assert got == pytest.approx(expected, rel=1e-9)
    draw = np.repeat([0, 1, 7], [12, 5, 3])
    apart = energy_distances(a, b, beside, means, 50, np.random.default_rng(5), draw=draw)
    assert apart == pytest.approx(expected | {"model": by_hand(model, real, draw)}, rel=1e-9)
    together = energy_distances(a, b, beside, means, 50, np.random.default_rng(5), draw=np.zeros(20, int))
    assert np.isnan(list(together.values())).all()
    assert beside.real_within == pytest.approx(scipy.spatial.distance.pdist(controls).mean(), rel=1e-9)
    alone = energy_distances(a[:1], b, beside, means, 50, np.random.default_rng(5))
    assert np.isnan(list(alone.values())).all()


@pytest.mark.parametrize(("n", "m", "n_genes"), [(1, 1, 1), (3, 5, 1023), (4, 2, 1024), (37, 41, 2500), (64, 7, 3)])
@pytest.mark.usefixtures("loops")
def test_l1_distances_are_scipy_s(n: int, m: int, n_genes: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, n_genes)), rng.normal(size=(m, n_genes))
    b[-1] = b[0]  # ties stay ties
    found = l1_distances(a, b)
    np.testing.assert_allclose(found, scipy.spatial.distance.cdist(a, b, "cityblock"), rtol=1e-12)
    np.testing.assert_array_equal(found[:, -1], found[:, 0])
    np.testing.assert_array_equal(l1_distances(a[:, ::-1], b[:, ::-1]).shape, found.shape)  # not contiguous
    a[0, 0] = np.nan
    assert np.isnan(l1_distances(a, b)[0]).all() and np.isfinite(l1_distances(a, b)[1:]).all()
