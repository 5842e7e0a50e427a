"""Ridge regression from perturbation features to effects, in its dual (kernel) form.

Shapes as in sest.baselines.effects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sest.baselines.effects import Effects, Query, some_genes

ALPHAS = tuple(10.0**power for power in range(-4, 5))
"""Penalties tried, in units of the mean eigenvalue of the centred Gram matrix of the features."""


class Ridge:
    """Linear in the features, with a free intercept; every pair is a row.

    Two penalties are chosen, each by the squared error of what is left out, in closed form: for perturbations that
    trained, leaving out one pair (in other contexts the perturbation stays); for unseen ones, leaving out one
    perturbation. A left-out block's residual is (I - H_bb)^-1 r_b, H the hat matrix (exact for ridge; Hastie,
    Tibshirani, Friedman, The Elements of Statistical Learning, 2nd ed., section 7.10). Works on the n x n Gram matrix,
    so F may be far above n.
    """

    def __init__(self, alphas: Sequence[float] = ALPHAS) -> None:
        self.alphas = tuple(alphas)

    def fit(self, effects: Effects) -> Ridge:
        self._effects = effects
        x = np.asarray(effects.features[effects.perturbation], np.float64)  # (n, F)
        self._feature_mean, self._intercept = x.mean(0), effects.delta.mean(0)
        self._x = x - self._feature_mean
        values, vectors = np.linalg.eigh(self._x @ self._x.T)
        kept = values > max(float(values[-1]) * 1e-10, 0.0)
        values, vectors = values[kept], vectors[:, kept]  # (r,), (n, r)
        self._unit = float(values.sum()) / len(x)
        self._values, self._vectors = values, vectors
        self._projected = vectors.T @ (effects.delta - self._intercept)  # (r, G)
        self.alpha_seen = self._best(np.arange(len(x)))
        self.alpha_unseen = self._best(effects.perturbation)
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        scores = (np.asarray(query.features, np.float64) - self._feature_mean) @ self._x.T @ self._vectors  # (N, r)
        seen = self._effects.perturbations_of(query) >= 0
        penalty = np.where(seen, self.alpha_seen, self.alpha_unseen)[:, None] * self._unit
        effects: np.ndarray = self._intercept + (scores / (self._values + penalty)) @ self._projected
        return effects

    def errors(self, group: np.ndarray) -> np.ndarray:
        """(alphas,) mean squared error where each group of pairs, (n,) codes, is left out; infinite of one group."""
        if len(np.unique(group)) == 1:
            return np.full(len(self.alphas), np.inf)
        genes = some_genes(self._projected.shape[1])
        y = (self._effects.delta[:, genes] - self._intercept[genes]).astype(np.float64)
        return np.array(
            [self._left_out(alpha * self._unit, group, y, self._projected[:, genes]) for alpha in self.alphas]
        )

    def _best(self, group: np.ndarray) -> float:
        errors = self.errors(group)
        if not np.isfinite(errors).all():
            return self.alphas[-1]
        close = errors <= errors.min() * (1 + 1e-9)  # of equal ones the largest penalty
        return self.alphas[int(np.flatnonzero(close)[-1])]

    def _left_out(self, penalty: float, group: np.ndarray, y: np.ndarray, projected: np.ndarray) -> float:
        shrink = self._values / (self._values + penalty)  # (r,)
        residual = y - self._vectors @ (shrink[:, None] * projected)
        total = 0.0
        for code in np.unique(group):
            rows = np.flatnonzero(group == code)
            v = self._vectors[rows]
            hat = (v * shrink) @ v.T + 1.0 / len(y)
            total += float((np.linalg.solve(np.eye(len(rows)) - hat, residual[rows]) ** 2).sum())
        return total / y.size
