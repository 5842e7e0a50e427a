"""Weights from few pairs: those of least squares where there are many, near the prior where there are few."""

from __future__ import annotations

import numpy as np

from sest.blend.weights import fit_weights

PRIOR = {"stack": 1.0, "head": 0.0}


def pairs(
    n: int, truth: tuple[float, float], noise: float = 0.3, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two predictions of n pairs, and the effects that are their sum with these weights, and noise."""
    rng = np.random.default_rng(seed)
    f = rng.normal(size=(2, n, 50))
    observed = truth[0] * f[0] + truth[1] * f[1] + noise * rng.normal(size=(n, 50))
    return {"stack": f[0], "head": f[1]}, observed


def test_many_pairs_give_the_weights_that_made_them() -> None:
    parts, observed = pairs(400, (0.3, 0.5))
    found = fit_weights(parts, observed, np.zeros(400, int), np.arange(400), PRIOR, 0)
    assert abs(found.means["stack"] - 0.3) < 0.02 and abs(found.means["head"] - 0.5) < 0.02
    assert abs(found.of_controls - 0.2) < 0.03 and found.n_pairs == 400
    assert max(found.spread.values()) < 0.02


def test_few_pairs_stay_near_the_prior_and_show_that_they_swing() -> None:
    swings = []
    for seed in range(10):
        parts, observed = pairs(3, (0.0, 1.0), seed=seed)
        found = fit_weights(parts, observed, np.zeros(3, int), np.arange(3), PRIOR, 0)
        swings.append(found.means["head"])
        assert 0.2 < found.means["head"] < 0.8 and found.spread["head"] > 0  # 3 pairs against the prior's 4
    assert np.std(swings) < 0.15
    none = fit_weights(
        {name: f[:0] for name, f in parts.items()}, observed[:0], np.zeros(0, int), np.arange(0), PRIOR, 0
    )
    assert none.means == PRIOR and none.n_pairs == 0


def test_without_an_effect_neither_counts() -> None:
    parts, observed = pairs(200, (0.0, 0.0), noise=0.1)
    found = fit_weights(parts, observed, np.zeros(200, int), np.arange(200), PRIOR, 0)
    assert found.of_controls > 0.95


def test_contexts_count_by_their_pairs_whatever_the_size_of_their_effects() -> None:
    """In the first context the head is right, in the second, of effects ten times as large, the stack."""
    one, two = pairs(200, (0.0, 1.0), seed=1), pairs(200, (1.0, 0.0), seed=2)
    parts = {name: np.concatenate([one[0][name], 10 * two[0][name]]) for name in PRIOR}
    observed = np.concatenate([one[1], 10 * two[1]])
    found = fit_weights(parts, observed, np.repeat([0, 1], 200), np.arange(400), PRIOR, 0)
    assert abs(found.means["head"] - 0.5) < 0.05 and abs(found.means["stack"] - 0.5) < 0.05


def test_the_seed_decides_the_resamples() -> None:
    parts, observed = pairs(5, (0.5, 0.3))
    one, same, other = (fit_weights(parts, observed, np.zeros(5, int), np.arange(5), PRIOR, seed) for seed in (0, 0, 1))
    assert one == same and one != other


def test_pairs_of_one_group_count_as_one() -> None:
    """The same three perturbations in four contexts say hardly more than in one."""
    parts, observed = pairs(3, (0.0, 1.0))
    again = {name: np.concatenate([f] * 4) for name, f in parts.items()}
    one = fit_weights(parts, observed, np.zeros(3, int), np.arange(3), PRIOR, 0)
    four = fit_weights(again, np.concatenate([observed] * 4), np.repeat(range(4), 3), np.tile(range(3), 4), PRIOR, 0)
    assert abs(one.means["head"] - four.means["head"]) < 0.03
    apart = fit_weights(again, np.concatenate([observed] * 4), np.repeat(range(4), 3), np.arange(12), PRIOR, 0)
    assert apart.means["head"] > four.means["head"] + 0.1


def test_what_counts_next_to_nothing_counts_nothing() -> None:
    """A pass of the head for a weight of a thousandth would be for nothing."""
    parts, observed = pairs(400, (0.6, 0.004))
    found = fit_weights(parts, observed, np.zeros(400, int), np.arange(400), PRIOR, 0)
    assert found.means["head"] == 0.0 and found.spread["head"] > 0
