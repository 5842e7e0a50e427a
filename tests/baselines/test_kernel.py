"""The kernel against the textbook's formula, written out gene by gene, and on effects whose truth is known."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest

from helpers.effects import new_context, query, simulated
from sest.baselines.effects import Query
from sest.baselines.kernel import SIZES, Kernel, Parameters

FIXED = Parameters(everywhere=0.01, perturbation=0.3, context=0.02, both=0.1, noise=1.2, length=0.05)


def by_formula(fitted: Kernel, asked: Query, gene: int) -> np.ndarray:
    """(k* + N*)(size K + N)^-1 z of one gene, averaged over the posterior of its size by Bayes' rule."""
    e, a = fitted._effects, FIXED
    sd = np.sqrt(e.controls.variance[0] * 1.1)  # all contexts alike
    strength = fitted._strength
    everyone = [(c, p) for c, p in zip(e.context.tolist(), e.perturbation.tolist(), strict=True)]
    at = [(c, e.perturbations.index(name)) for c, name in zip(asked.context.tolist(), asked.perturbations, strict=True)]

    def covariance(x: tuple[int, int], y: tuple[int, int], n_cells: float | None) -> tuple[float, float]:
        alike = float(x[1] == y[1]) * strength[x[1]] * strength[y[1]]
        d = np.mean(((e.controls.mean[x[0]] - e.controls.mean[y[0]]) / sd) ** 2)
        near = np.exp(-d / (2 * a.length))
        signal = a.everywhere + a.perturbation * alike + a.context * near + a.both * alike * near
        noise = a.noise * (x[0] == y[0]) / e.controls.n_cells[0]
        return signal, noise + (a.noise / n_cells if n_cells else 0.0)

    pairs = range(len(everyone))
    both = [[covariance(everyone[i], everyone[j], e.n_cells[i] if i == j else None) for j in pairs] for i in pairs]
    k, n = np.moveaxis(np.array(both), 2, 0)
    k_star, n_star = np.moveaxis(np.array([[covariance(x, y, None) for y in everyone] for x in at]), 2, 0)
    nu = np.sqrt(1 / 1.1)
    z = e.delta / (sd * nu)

    def log_likelihoods(one: np.ndarray) -> np.ndarray:
        found = []
        for size in SIZES:
            c = size * k + n
            found.append(-0.5 * (one @ np.linalg.solve(c, one) + np.linalg.slogdet(c)[1]))
        return np.array(found)

    logs = np.array([log_likelihoods(z[:, g]) for g in range(z.shape[1])])
    likelihood = np.exp(logs - logs.max(1, keepdims=True))
    prior = np.full(len(SIZES), 1 / len(SIZES))
    for _ in range(20):
        share = likelihood * prior
        share /= share.sum(1, keepdims=True)
        prior = share.mean(0)
    predicted = sum(
        share[gene, i] * (size * k_star + n_star) @ np.linalg.solve(size * k + n, z[:, gene])
        for i, size in enumerate(SIZES)
    )
    return np.asarray(predicted * sd[gene] * nu)


def test_predictions_are_those_of_the_formula() -> None:
    effects, _ = simulated(n_contexts=2, n_perturbations=6, n_genes=15)
    some = effects.some(np.arange(len(effects)) != 3)
    fitted, asked = Kernel(FIXED).fit(some), effects.query(np.array([3, 4, 8]))
    got = fitted.predict(asked)
    for gene in (0, 7, 14):
        np.testing.assert_allclose(got[:, gene], by_formula(fitted, asked, gene), rtol=1e-7, atol=1e-10)


def test_it_denoises_what_other_contexts_know() -> None:
    """Of a context left out whole it comes nearer to the truth than the mean effect over the other contexts."""
    effects, truth = simulated(signal=0.2)
    asked = np.flatnonzero(effects.context == 2)
    rest = effects.some(effects.context != 2)
    got = Kernel().fit(rest).predict(effects.query(asked))
    mean = (effects.delta[:30] + effects.delta[30:60]) / 2
    assert np.abs(got - truth[asked]).mean() < 0.8 * np.abs(mean - truth[asked]).mean()


def test_where_there_is_no_effect_it_predicts_hardly_any() -> None:
    effects, _ = simulated(signal=0.0)
    rest = effects.some(effects.context != 2)
    got = Kernel().fit(rest).predict(effects.query(np.flatnonzero(effects.context == 2)))
    assert np.abs(got).mean() < 0.1 * np.abs(effects.delta).mean()


def test_the_noise_of_a_control_mean_is_common_to_the_effects_of_its_context() -> None:
    """A shift of all effects of a context is expected of a new perturbation there, and of none elsewhere."""
    effects, _ = simulated(signal=0.0)
    effects.delta[effects.context == 0] += 0.3 * np.sign(np.random.default_rng(1).normal(size=200))
    shift = effects.delta[effects.context == 0].mean(0)
    fitted = Kernel(Parameters(1e-9, 1e-9, 1e-9, 1e-9, 1.0, 1.0)).fit(effects)
    here, elsewhere = (
        fitted.predict(query(effects, 0, ["new"]))[0],
        fitted.predict(new_context(effects, ["new"], effects.controls.mean[0]))[0],
    )
    np.testing.assert_allclose(here, shift * 50 * 30 / (50 * 30 + 200), rtol=0.01, atol=1e-6)
    np.testing.assert_allclose(elsewhere, 0.0, atol=1e-5)


def test_the_same_effects_give_the_same_numbers_and_pairs_beyond_a_limit_are_those_of_most_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    effects, _ = simulated()
    one, other = Kernel().fit(effects), Kernel().fit(effects)
    assert one.parameters == other.parameters
    asked = effects.query(np.array([0, 40]))
    np.testing.assert_array_equal(one.predict(asked), other.predict(asked))
    effects.n_cells[:40] = 60
    monkeypatch.setattr("sest.baselines.kernel.MOST_PAIRS", 40)
    few = Kernel(FIXED)
    np.testing.assert_array_equal(
        few.fit(effects).predict(asked), Kernel(FIXED).fit(effects.some(np.arange(40))).predict(asked)
    )
    monkeypatch.setattr("sest.baselines.kernel.MOST_FITTED", 20)
    assert np.isfinite(astuple(Kernel().fit(effects).parameters or FIXED)).all()
