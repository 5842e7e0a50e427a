"""Predictions that need no network; every score is shown beside theirs.

All values are pseudobulks: means over cells of log1p(counts normalised to target_sum), shape (G,) a prediction.
`context_mean` says that nothing happens, `perturbation_mean` that a perturbation does everywhere what it did in
training, `ridge` reads the effect from the perturbation's features. N = rows to predict, G = genes, P = feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sest.errors import InputError, shown

ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties tried, in units of the mean eigenvalue of the centred feature Gram matrix."""


@dataclass(frozen=True)
class TrainingMeans:
    """Pseudobulk effects of the training split, one row a (context, perturbation) pair."""

    contexts: tuple[str, ...]
    perturbations: tuple[str, ...]
    delta: np.ndarray
    """(n_pairs, G) mean of the perturbed cells minus mean of that context's controls, log1p."""
    pair_context: np.ndarray
    """(n_pairs,) index into `contexts`."""
    pair_perturbation: np.ndarray
    """(n_pairs,) index into `perturbations`."""
    n_cells: np.ndarray
    """(n_pairs,) perturbed cells behind each row."""

    def __post_init__(self) -> None:
        n_pairs = len(self.delta)
        assert n_pairs == len(self.pair_context) == len(self.pair_perturbation) == len(self.n_cells)
        if n_pairs == 0:
            raise InputError("No perturbed cells in the training split: the baselines have nothing to learn from.")
        absent = set(range(len(self.perturbations))) - set(np.asarray(self.pair_perturbation).tolist())
        assert not absent, f"perturbations without a pair: {sorted(absent)}"

    def effects(self) -> np.ndarray:
        """(n_perturbations, G): each perturbation's mean delta, every context counting the same."""
        sums = np.zeros((len(self.perturbations), self.delta.shape[1]))
        np.add.at(sums, self.pair_perturbation, self.delta)
        return sums / np.bincount(self.pair_perturbation, minlength=len(self.perturbations))[:, None]


@dataclass(frozen=True)
class Ridge:
    """Fitted ridge regression from perturbation features to effects, in its dual (kernel) form."""

    alpha: float
    """The chosen penalty, in units of `ALPHAS`."""
    leave_one_out_mse: tuple[float, ...]
    """Mean squared error over left-out perturbations and genes, one a candidate penalty."""
    feature_mean: np.ndarray
    """(P,)"""
    features: np.ndarray
    """(n, P) centred training features."""
    dual: np.ndarray
    """(n, G) dual coefficients."""
    intercept: np.ndarray
    """(G,) mean training effect."""

    def delta(self, features: np.ndarray) -> np.ndarray:
        """Predicted effects (N, G), log1p, of perturbations with these features (N, P)."""
        kernel = (np.asarray(features, dtype=np.float64) - self.feature_mean) @ self.features.T  # (N, n)
        return self.intercept + kernel @ self.dual


def context_mean(control_mean: np.ndarray) -> np.ndarray:
    """The control mean of the context, (G,) or (N, G): no perturbation does anything."""
    return np.array(control_mean, dtype=np.float64)


def perturbation_mean(train: TrainingMeans, perturbation: str, control_mean: np.ndarray) -> np.ndarray:
    """Control mean (G,) plus the perturbation's mean delta over its training contexts, clipped at 0: (G,).

    A perturbation unseen in training gets the mean delta over all training perturbations (each counting once), which is
    what perturbed cells have in common: stress, selection, batch.
    """
    return np.maximum(np.asarray(control_mean, dtype=np.float64) + _mean_deltas(train, [perturbation])[0], 0.0)


def fit_ridge(train: TrainingMeans, features: Mapping[str, np.ndarray], alphas: Sequence[float] = ALPHAS) -> Ridge:
    """Ridge regression with a free intercept from perturbation features (P,) to mean effects (G,).

    The penalty is the one of `alphas` with the smallest error when each perturbation is left out once, in closed form:
    left-out residual = residual / (1 - H_ii), H the hat matrix (exact for ridge; Hastie, Tibshirani, Friedman, The
    Elements of Statistical Learning, 2nd ed., section 7.10). Works on the n x n Gram matrix, so P may be far above n.
    With one training perturbation only the intercept is left. Raises InputError for training perturbations without
    features.
    """
    missing = [name for name in train.perturbations if name not in features]
    if missing:
        raise InputError(
            f"No features for training perturbations: {shown(missing)}. The feature file has {len(features)} names."
        )
    x = np.stack([np.asarray(features[name], dtype=np.float64) for name in train.perturbations])  # (n, P)
    y = train.effects()  # (n, G)
    feature_mean, intercept = x.mean(axis=0), y.mean(axis=0)
    x, y = x - feature_mean, y - intercept
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > max(float(values[-1]) * 1e-10, 0.0)
    values, vectors = values[kept], vectors[:, kept]  # (r,), (n, r)
    unit = float(values.sum()) / len(x)
    projected = vectors.T @ y  # (r, G)
    errors = [_leave_one_out(values, vectors, projected, y, alpha * unit) for alpha in alphas]
    best = int(np.argmin(errors)) if len(x) > 1 else int(np.argmax(alphas))
    dual = vectors @ (projected / (values + alphas[best] * unit)[:, None])
    return Ridge(float(alphas[best]), tuple(errors), feature_mean, x, dual, intercept)


def predict_baselines(
    train: TrainingMeans,
    perturbations: Sequence[str],
    control_means: np.ndarray,
    features: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """All baselines for N (context, perturbation) rows: name -> (N, G) log1p pseudobulks.

    `control_means` (N, G) are the controls of each row's context. Without `features` there is no `ridge`. Raises
    InputError for a perturbation (of training or of these rows) without features.
    """
    control_means = np.asarray(control_means, dtype=np.float64)
    predictions = {
        "context_mean": context_mean(control_means),
        "perturbation_mean": np.maximum(control_means + _mean_deltas(train, perturbations), 0.0),
    }
    if features is not None:
        missing = sorted({name for name in perturbations if name not in features})
        if missing:
            raise InputError(f"No features for perturbations to predict: {shown(missing)}.")
        delta = fit_ridge(train, features).delta(np.stack([features[name] for name in perturbations]))
        predictions["ridge"] = np.maximum(control_means + delta, 0.0)
    return predictions


def _mean_deltas(train: TrainingMeans, perturbations: Sequence[str]) -> np.ndarray:
    """(N, G) mean delta of each perturbation over its training contexts, of all perturbations if it is unseen."""
    effects = train.effects()
    known = {name: row for row, name in enumerate(train.perturbations)}
    overall = effects.mean(axis=0)
    return np.stack([effects[known[name]] if name in known else overall for name in perturbations])


def _leave_one_out(
    values: np.ndarray, vectors: np.ndarray, projected: np.ndarray, y: np.ndarray, penalty: float
) -> float:
    """Mean squared error of predicting each row of y (n, G, centred) from the others; infinite if n is 1."""
    shrink = values / (values + penalty)  # (r,)
    hat = 1.0 / len(y) + (vectors**2) @ shrink  # (n,) diagonal of H: intercept and kernel part
    if len(y) == 1:
        return float("inf")
    residual = y - vectors @ (shrink[:, None] * projected)
    return float(((residual / (1.0 - hat)[:, None]) ** 2).mean())
