"""Ridge regression from perturbation features to effects, in its dual (kernel) form.

Shapes as in sest.baselines.effects.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sest.baselines.effects import Effects, Query, product, some_genes

MOST_PAIRS = 1000  # pairs, those of most cells: with more features than that the cost grows with the cube of either
MOST_PAIRS_OF_FEW = 20_000  # with fewer features it grows with the pairs
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

    def __init__(self, alphas: Sequence[float] = ALPHAS, chosen: tuple[float, float] | None = None) -> None:
        """`chosen`: the penalties for perturbations that trained and for unseen ones, instead of the best `alphas`."""
        self.alphas, self._chosen = tuple(alphas), chosen

    def fit(self, effects: Effects) -> Ridge:
        self._effects = effects
        learned = effects.most_cells(MOST_PAIRS if effects.features.shape[1] > MOST_PAIRS else MOST_PAIRS_OF_FEW)
        x = np.asarray(learned.features[learned.perturbation], np.float64)  # (n, F)
        self._feature_mean, self._intercept = x.mean(0), learned.delta.mean(0, dtype=np.float64)
        self._x = x - self._feature_mean
        few = x.shape[1] < len(x)
        values, vectors = np.linalg.eigh(self._x.T @ self._x if few else self._x @ self._x.T)
        kept = values > max(float(values[-1]) * 1e-10, 0.0)
        values, vectors = values[kept], vectors[:, kept]  # (r,), (n, r)
        if few:
            vectors = self._x @ vectors / np.sqrt(values)
        self._unit = float(values.sum()) / len(x)
        self._values, self._vectors = values, vectors
        self._delta = learned.delta  # the vectors are orthogonal to 1, so that the intercept need not be taken off
        if self._chosen is not None:
            self.alpha_seen, self.alpha_unseen = self._chosen
            return self
        genes = some_genes(learned.delta.shape[1])
        self._y = learned.delta[:, genes].astype(np.float64) - self._intercept[genes]
        self.alpha_seen = self.alpha_unseen = self._best(np.arange(len(x)))
        if len(np.unique(learned.perturbation)) < len(x):
            self.alpha_unseen = self._best(learned.perturbation)
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        scores = (np.asarray(query.features, np.float64) - self._feature_mean) @ self._x.T @ self._vectors  # (N, r)
        seen = self._effects.perturbations_of(query) >= 0
        penalty = np.where(seen, self.alpha_seen, self.alpha_unseen)[:, None] * self._unit
        effects = product(scores / (self._values + penalty) @ self._vectors.T, self._delta)
        effects += self._intercept
        return effects

    def errors(self, group: np.ndarray) -> np.ndarray:
        """(alphas,) mean squared error where each group of pairs, (n,) codes, is left out; infinite of one group.

        Only inner products over genes are needed: with H = U V' the residual is r = (I - H) y, and a block of r r' is
        y y' - U P y' - (U P y')' + U P P' U', where P = V' y. The genes come in once, whatever the number of penalties.
        """
        if len(np.unique(group)) == 1:
            return np.full(len(self.alphas), np.inf)
        y, v = self._y, self._vectors
        p = v.T @ y
        of_y, of_p = y @ p.T, p @ p.T  # (n, r), (r, r)
        order, blocks = np.argsort(group, kind="stable"), []
        sizes = np.unique(group, return_counts=True)[1]
        first = np.cumsum(sizes) - sizes
        for size in np.unique(sizes).tolist():
            rows = order[first[sizes == size][:, None] + np.arange(size)]  # (groups of this size, size)
            blocks.append((rows, np.einsum("bsg,btg->bst", y[rows], y[rows])))
        errors = [self._left_out(alpha * self._unit, blocks, of_y, of_p) for alpha in self.alphas]
        return np.maximum(errors, 0.0) / y.size

    def _best(self, group: np.ndarray) -> float:
        errors = self.errors(group)
        if not np.isfinite(errors).all():
            return self.alphas[-1]
        close = errors <= errors.min() * (1 + 1e-9)  # of equal ones the largest penalty
        return self.alphas[int(np.flatnonzero(close)[-1])]

    def _left_out(
        self, penalty: float, blocks: Sequence[tuple[np.ndarray, np.ndarray]], of_y: np.ndarray, of_p: np.ndarray
    ) -> float:
        """Sum of squared errors, over all blocks; each is the rows of its groups and their y y'."""
        v = self._vectors
        u = v * (self._values / (self._values + penalty))
        u_of_p, total = u @ of_p, 0.0
        for rows, of_block in blocks:
            cross = u[rows] @ of_y[rows].transpose(0, 2, 1)
            squares = of_block - cross - cross.transpose(0, 2, 1) + u_of_p[rows] @ u[rows].transpose(0, 2, 1)
            rest = np.eye(rows.shape[1]) - u[rows] @ v[rows].transpose(0, 2, 1) - 1.0 / len(v)  # I - H, symmetric
            once = np.linalg.solve(rest, squares).transpose(0, 2, 1)
            total += float(np.trace(np.linalg.solve(rest, once), axis1=1, axis2=2).sum())
        return total
