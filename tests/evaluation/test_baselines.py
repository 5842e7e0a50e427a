"""The baselines against hand-computed values and a brute-force second implementation."""

from __future__ import annotations

import numpy as np
import pytest

from sest.errors import InputError
from sest.evaluation.baselines import (
    ALPHAS,
    TrainingMeans,
    context_mean,
    fit_ridge,
    perturbation_mean,
    predict_baselines,
)

CONTROL = np.array([1.0, 1.0])


def small_training() -> TrainingMeans:
    """Perturbation a in two contexts (100 and 10 cells), b in one; two genes."""
    return TrainingMeans(
        contexts=("k562", "rpe1"),
        perturbations=("a", "b"),
        delta=np.array([[1.0, 0.0], [0.0, -0.5], [-3.0, 0.5]], dtype=np.float32),
        pair_context=np.array([0, 1, 0]),
        pair_perturbation=np.array([0, 0, 1]),
        n_cells=np.array([100, 10, 50]),
    )


def linear_training(n: int, width: int, seed: int = 0) -> tuple[TrainingMeans, dict[str, np.ndarray]]:
    """n perturbations whose effects on 4 genes are linear in `width` features, plus a little noise."""
    rng = np.random.default_rng(seed)
    names = tuple(f"p{i}" for i in range(n))
    features = rng.standard_normal((n, width))
    effects = features @ rng.standard_normal((width, 4)) / np.sqrt(width) + 0.3 + 0.05 * rng.standard_normal((n, 4))
    index = np.arange(n)
    train = TrainingMeans(("c",), names, effects, np.zeros(n, dtype=int), index, np.full(n, 10))
    return train, dict(zip(names, features, strict=True))


def brute_force(x: np.ndarray, y: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
    """Primal ridge with a free intercept from the augmented normal equations; nothing shared with the module."""
    design = np.hstack([np.ones((len(x), 1)), x])
    ridge = penalty * np.eye(design.shape[1])
    ridge[0, 0] = 0.0
    weights = np.linalg.solve(design.T @ design + ridge, design.T @ y)
    return np.hstack([np.ones((len(at), 1)), at]) @ weights


def test_context_mean_is_the_controls_and_not_a_view_of_them() -> None:
    control = CONTROL.copy()
    predicted = context_mean(control)
    predicted[0] = 9.0
    assert control.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(context_mean(CONTROL), CONTROL)


def test_perturbation_mean_adds_the_mean_delta_with_every_context_counting_the_same() -> None:
    np.testing.assert_allclose(perturbation_mean(small_training(), "a", CONTROL), [1.5, 0.75])


def test_perturbation_mean_is_clipped_at_zero() -> None:
    np.testing.assert_allclose(perturbation_mean(small_training(), "b", CONTROL), [0.0, 1.5])


def test_an_unseen_perturbation_gets_the_mean_over_training_perturbations() -> None:
    # a: (0.5, -0.25), b: (-3, 0.5); each perturbation counts once whatever its number of contexts.
    np.testing.assert_allclose(perturbation_mean(small_training(), "new", np.full(2, 4.0)), [2.75, 4.125])


def test_training_means_without_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="No perturbed cells"):
        TrainingMeans((), (), np.zeros((0, 2)), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))


@pytest.mark.parametrize("width", [3, 50], ids=["fewer features than perturbations", "more"])
@pytest.mark.parametrize("smallest", [1.0, 1e-3], ids=["of one size", "one a thousandth"])
def test_ridge_equals_the_primal_solution(width: int, smallest: float) -> None:
    train, features = linear_training(12, width)
    features = {name: vector * ([smallest] + [1.0] * (width - 1)) for name, vector in features.items()}
    x = np.stack([features[name] for name in train.perturbations])
    at = np.random.default_rng(1).standard_normal((5, width))
    fitted = fit_ridge(train, features, alphas=(0.1,))
    unit = ((x - x.mean(axis=0)) ** 2).sum() / len(x)  # mean eigenvalue of the centred Gram matrix
    np.testing.assert_allclose(fitted.delta(at), brute_force(x, train.delta, at, 0.1 * unit), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("width", [3, 50])
def test_ridge_leave_one_out_error_equals_refitting_without_each_perturbation(width: int) -> None:
    train, features = linear_training(8, width)
    x = np.stack([features[name] for name in train.perturbations])
    unit = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    fitted = fit_ridge(train, features)
    for alpha, error in zip(ALPHAS, fitted.leave_one_out_mse, strict=True):
        left_out = [
            brute_force(np.delete(x, i, 0), np.delete(train.delta, i, 0), x[[i]], alpha * unit)[0] for i in range(8)
        ]
        assert error == pytest.approx(float(((np.array(left_out) - train.delta) ** 2).mean()), rel=1e-6)
    assert fitted.alpha == ALPHAS[int(np.argmin(fitted.leave_one_out_mse))]


def test_ridge_finds_a_linear_effect_of_features_and_ignores_features_that_say_nothing() -> None:
    train, features = linear_training(60, 3)
    told = fit_ridge(train, features)
    rng = np.random.default_rng(7)
    noise = fit_ridge(train, {name: rng.standard_normal(3) for name in features})
    variance = float(train.delta.var(axis=0).mean())
    assert told.alpha < 0.1 and min(told.leave_one_out_mse) < 0.05 * variance  # noise alone is 0.01 of it
    assert noise.alpha >= 1.0


def test_ridge_with_one_training_perturbation_is_its_effect() -> None:
    train, features = linear_training(1, 3)
    np.testing.assert_allclose(fit_ridge(train, features).delta(np.ones((2, 3))), np.repeat(train.delta, 2, axis=0))


def test_ridge_with_identical_features_is_the_mean_effect() -> None:
    train, features = linear_training(5, 3)
    fitted = fit_ridge(train, dict.fromkeys(features, np.ones(3)))
    np.testing.assert_allclose(fitted.delta(np.zeros((1, 3)))[0], train.delta.mean(axis=0))


def test_ridge_names_the_training_perturbations_without_features() -> None:
    train, features = linear_training(4, 3)
    del features["p2"]
    with pytest.raises(InputError, match=r"p2.*3 names"):
        fit_ridge(train, features)


def test_predict_baselines_gives_every_baseline_a_row_for_each_pair() -> None:
    train, features = linear_training(6, 3)
    controls = np.arange(8.0).reshape(2, 4) / 10
    predicted = predict_baselines(train, ["p1", "unseen"], controls, {**features, "unseen": np.full(3, -5.0)})
    assert list(predicted) == ["context_mean", "perturbation_mean", "ridge"]
    np.testing.assert_array_equal(predicted["context_mean"], controls)
    for row, name in enumerate(["p1", "unseen"]):
        np.testing.assert_allclose(predicted["perturbation_mean"][row], perturbation_mean(train, name, controls[row]))
    moved = controls + fit_ridge(train, features).delta(np.stack([features["p1"], np.full(3, -5.0)]))
    assert (moved < 0).any()
    np.testing.assert_allclose(predicted["ridge"], np.maximum(moved, 0.0))


def test_predict_baselines_without_features_leaves_ridge_out() -> None:
    train, _ = linear_training(3, 2)
    assert list(predict_baselines(train, ["p0"], np.ones((1, 4)))) == ["context_mean", "perturbation_mean"]


def test_predict_baselines_names_a_perturbation_to_predict_without_features() -> None:
    train, features = linear_training(3, 2)
    with pytest.raises(InputError, match="unseen"):
        predict_baselines(train, ["p0", "unseen"], np.ones((2, 4)), features)
