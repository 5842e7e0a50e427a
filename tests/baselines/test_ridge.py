"""Ridge against a second implementation: the primal normal equations, and refitting without what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.effects import contexts, query
from sest.baselines.effects import Effects
from sest.baselines.ridge import ALPHAS, Ridge


def linear(n: int, width: int, n_contexts: int = 1, seed: int = 0) -> Effects:
    """n perturbations whose effects on 4 genes are linear in `width` features, plus a little noise."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, width))
    perturbation, context = np.tile(np.arange(n), n_contexts), np.repeat(np.arange(n_contexts), n)
    truth = features @ rng.standard_normal((width, 4)) / np.sqrt(width) + 0.3
    delta = truth[perturbation] + 0.05 * rng.standard_normal((n * n_contexts, 4))
    names = tuple(f"p{i}" for i in range(n))
    controls = contexts(np.ones((n_contexts, 4)))
    return Effects(controls, names, features, delta, context, perturbation, np.full(len(delta), 10))


def brute_force(x: np.ndarray, y: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
    """Primal ridge with a free intercept from the augmented normal equations; nothing shared with the module."""
    design = np.hstack([np.ones((len(x), 1)), x])
    ridge = penalty * np.eye(design.shape[1])
    ridge[0, 0] = 0.0
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ y)
    return np.hstack([np.ones((len(at), 1)), at]) @ weights


def unit_of(x: np.ndarray) -> float:
    """Mean eigenvalue of the centred Gram matrix."""
    return float(((x - x.mean(axis=0)) ** 2).sum() / len(x))


@pytest.mark.parametrize("width", [3, 50], ids=["fewer features than perturbations", "more"])
@pytest.mark.parametrize("smallest", [1.0, 1e-3], ids=["of one size", "one a thousandth"])
def test_ridge_equals_the_primal_solution(width: int, smallest: float) -> None:
    effects = linear(12, width)
    effects.features[:, 0] *= smallest
    at = np.random.default_rng(1).standard_normal((5, width))
    fitted = Ridge(alphas=(0.1,)).fit(effects)
    got = fitted.predict(query(effects, 0, [f"new{i}" for i in range(5)], at))
    expected = brute_force(effects.features, effects.delta, at, 0.1 * unit_of(effects.features))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("width", [3, 50])
@pytest.mark.parametrize("n_contexts", [1, 2])
def test_errors_equal_refitting_without_each_pair_or_each_perturbation(width: int, n_contexts: int) -> None:
    effects = linear(8, width, n_contexts)
    x, y = effects.features[effects.perturbation], effects.delta
    fitted, unit = Ridge().fit(effects), unit_of(x)
    for group in (np.arange(len(y)), effects.perturbation):
        for alpha, error in zip(ALPHAS, fitted.errors(group), strict=True):
            left_out = np.empty_like(y)
            for code in np.unique(group):
                rest = group != code
                left_out[~rest] = brute_force(x[rest], y[rest], x[~rest], alpha * unit)
            assert error == pytest.approx(float(((left_out - y) ** 2).mean()), rel=1e-6)
    assert fitted.alpha_unseen == ALPHAS[int(np.argmin(fitted.errors(effects.perturbation)))]


def test_it_finds_a_linear_effect_of_features_and_ignores_features_that_say_nothing() -> None:
    effects = linear(60, 3)
    told = Ridge().fit(effects)
    effects.features[:] = np.random.default_rng(7).standard_normal((60, 3))
    noise = Ridge().fit(effects)
    assert told.alpha_unseen < 0.1 and noise.alpha_unseen >= 1.0


def test_one_hot_features_of_several_contexts_learn_from_the_others() -> None:
    """Left out alone a pair is known from its other context; without its perturbation nothing is known of it."""
    effects = linear(20, 3, n_contexts=2)
    one_hot = Effects(
        effects.controls, effects.perturbations, np.eye(20), effects.delta, effects.context, effects.perturbation,
        effects.n_cells,
    )  # fmt: skip
    fitted = Ridge().fit(one_hot)
    assert fitted.alpha_seen < 0.1
    seen = fitted.predict(query(one_hot, 0, ["p3"]))[0]
    assert np.abs(seen - effects.delta[[3, 23]].mean(0)).max() < 0.1
    unseen = fitted.predict(query(one_hot, 0, ["new"]))[0]
    np.testing.assert_allclose(unseen, effects.delta.mean(0), atol=0.3)


def test_of_one_pair_it_is_its_effect_and_of_equal_features_the_mean() -> None:
    effects = linear(1, 3)
    np.testing.assert_allclose(
        Ridge().fit(effects).predict(query(effects, 0, ["new"] * 2, np.ones((2, 3)))), effects.delta[[0, 0]]
    )
    effects = linear(5, 3)
    effects.features[:] = 1.0
    np.testing.assert_allclose(Ridge().fit(effects).predict(query(effects, 0, ["new"]))[0], effects.delta.mean(axis=0))
