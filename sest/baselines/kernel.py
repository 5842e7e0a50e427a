"""A Gaussian process over (context, perturbation) pairs: what similar pairs do, as far as it stands out of the noise.

Shapes as in sest.baselines.effects; A sizes of a gene's signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from sest.baselines.effects import Contexts, Effects, Query, gene_blocks, product
from sest.baselines.means import cosines

SIZES = 2.0 ** np.arange(-7, 7)  # (A,) of a gene's signal, beside that of the average gene
SIZE_STEPS = 20  # of EM for how common each size is
MOST_FITTED = 400  # pairs from which the parameters are fitted; the prediction is from MOST_PAIRS
MOST_PAIRS = 1000  # pairs, those of most cells: the cost grows with their cube
SHRINK, SMALLEST, LARGEST = 0.25, 0.2, 20.0  # of a perturbation's squared strength, beside the average one


@dataclass(frozen=True)
class Parameters:
    """Variances of what effects have in common, in units of the noise of one cell."""

    everywhere: float  # all pairs
    perturbation: float  # pairs of similar perturbations, in all contexts
    context: float  # pairs of similar contexts
    both: float  # similar perturbations in similar contexts
    noise: float
    length: float  # at which contexts stop being similar, squared, in units of `Effects.distances`


class Kernel:
    """z ~ N(0, size_g K + N) for every gene g, where z are effects in units of the noise of the controls.

    K = a0 + a1 Kp s s' + a2 Kc + a3 Kp Kc s s', with Kp the cosine of perturbation features, Kc = exp(-d^2 / 2 l^2) of
    control means and s how strong a perturbation is. N = a4 (diag(1 / n_cells) + [same context] / n_controls): the
    noise of a control mean is common to all effects of its context, and is predicted as well, as it is in the effects
    to predict. a and l are those of the largest marginal likelihood over all genes; the size of a gene is averaged over
    its posterior, whose prior (how common each size is) is fitted too.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, sections 2.2 and 5.4.1.
    """

    def __init__(self, parameters: Parameters | None = None) -> None:
        """`parameters`: fixed ones, instead of fitted."""
        self.parameters = parameters

    def fit(self, effects: Effects) -> Kernel:
        effects = effects.most_cells(MOST_PAIRS)
        self._effects, self._sd = effects, effects.gene_sd()
        self._scale = self._noise_of(effects.controls)[effects.context][:, None]  # (n, 1)
        self._strength = self._strengths()
        alike, distances, noise = self._parts()
        if self.parameters is None:
            self.parameters = _fitted(*self._some_rows(alike, distances, noise))
        kernel = _kernel(self.parameters, alike, np.exp(-distances / (2 * self.parameters.length)))
        noise *= self.parameters.noise
        lower = np.linalg.cholesky(noise)
        half = scipy.linalg.solve_triangular(lower, kernel, lower=True)
        d, u = np.linalg.eigh(scipy.linalg.solve_triangular(lower, half.T, lower=True))
        d = np.maximum(d, 0.0)
        self._to_y = scipy.linalg.solve_triangular(lower, u, lower=True, trans="T")  # (n, n): L^-T U
        variance = d[:, None] * SIZES + 1.0  # (n, A)
        y, log_likelihood = np.empty_like(effects.delta), np.empty((effects.delta.shape[1], len(SIZES)))
        to_y = self._to_y.astype(y.dtype)  # of many effects in float32, as they are and as y is kept
        for genes in gene_blocks(y.shape[1]):
            block = to_y.T @ self._z(genes).astype(y.dtype)
            y[:, genes] = block
            log_likelihood[genes] = -0.5 * ((block**2).T @ (1.0 / variance) + np.log(variance).sum(0))
        share = _shares_of_sizes(log_likelihood)  # (G, A)
        here = effects.context == np.arange(len(effects.controls.names))[:, None]
        of_context = self.parameters.noise * here / effects.controls.n_cells[effects.context] @ self._to_y
        self._of_signal, self._of_noise = y, np.empty((len(here), y.shape[1]))
        for genes in gene_blocks(y.shape[1]):
            block = y[:, genes].astype(np.float64)
            self._of_signal[:, genes] = ((SIZES / variance) @ share[genes].T) * block
            self._of_noise[:, genes] = of_context @ (((1.0 / variance) @ share[genes].T) * block)
        return self

    def _z(self, genes: slice, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Effects of some genes, and some pairs, in units of the noise of the controls."""
        z: np.ndarray = self._effects.delta[rows, genes] / (self._sd[genes] * self._scale[rows])
        return z

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        assert self.parameters is not None
        effects, a = self._effects, self.parameters
        at_context, at = effects.contexts_of(query), effects.perturbations_of(query)
        strength = np.where(at >= 0, self._strength[at], 1.0)
        near = np.exp(-effects.distances(query.controls)[query.context][:, effects.context] / (2 * a.length))
        alike = cosines(query.features, effects.features)[:, effects.perturbation]
        kernel = _kernel(a, alike * np.outer(strength, self._strength[effects.perturbation]), near)
        z = product(kernel @ self._to_y, self._of_signal)
        known = np.flatnonzero(at_context >= 0)  # whose controls' noise is in the effects that were learned from
        z[known] += self._of_noise[at_context[known]]
        predicted: np.ndarray = z * self._sd * self._noise_of(query.controls)[query.context][:, None]
        return predicted

    def _noise_of(self, controls: Contexts) -> np.ndarray:
        """(C,) how noisy the cells of a context are, beside the average one."""
        size = np.sqrt((controls.variance / self._sd**2).mean(1))
        return np.where(size > 0, size, 1.0)

    def _strengths(self) -> np.ndarray:
        """(P,) how strong each perturbation is, 1 on average and where it did not train."""
        effects = self._effects
        n_genes = effects.delta.shape[1]
        squares = sum((self._z(genes) ** 2).sum(1) for genes in gene_blocks(n_genes))
        excess = squares / n_genes - 1 / effects.n_cells - 1 / effects.controls.n_cells[effects.context]
        average = float(excess.mean())
        squared = np.ones(len(effects.perturbations))
        if average > 0:
            sums = np.bincount(effects.perturbation, excess, len(squared))
            counts = np.bincount(effects.perturbation, minlength=len(squared))
            there = counts > 0
            squared[there] = (1 - SHRINK) * sums[there] / counts[there] / average + SHRINK
        return np.sqrt(np.clip(squared, SMALLEST, LARGEST))

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All (n, n): cosines of perturbations times their strengths, distances of contexts, noise of one cell."""
        effects = self._effects
        p, c, n_controls = effects.perturbation, effects.context, effects.controls.n_cells
        alike = cosines(effects.features, effects.features)[np.ix_(p, p)] * np.outer(
            self._strength[p], self._strength[p]
        )
        noise = np.diag(1 / effects.n_cells) + (c[:, None] == c) / n_controls[c]
        return alike, effects.distances(effects.controls)[np.ix_(c, c)], noise

    def _some_rows(self, *parts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of at most MOST_FITTED pairs the second moments over genes, and the parts (n, n)."""
        n, n_genes = self._effects.delta.shape
        rows = np.arange(n)
        if n > MOST_FITTED:
            rows = np.sort(np.random.default_rng(n).choice(n, MOST_FITTED, replace=False))
        moments = np.zeros((len(rows), len(rows)))
        for genes in gene_blocks(n_genes):
            z = self._z(genes, rows)
            moments += z @ z.T
        return moments / n_genes, *(part[np.ix_(rows, rows)] for part in parts)


def _fitted(moments: np.ndarray, alike: np.ndarray, distances: np.ndarray, noise: np.ndarray) -> Parameters:
    """Parameters of the largest marginal likelihood, all genes having the same size, from their second moments (n, n).

    Parts: see `Kernel._parts`.
    """
    import scipy.optimize  # slow to import, and not needed where parameters are known

    far = float(distances.max()) or 1.0
    signal = max(float(np.mean(np.diag(moments) - np.diag(noise))), 1e-3 * float(np.diag(noise).mean()))

    def negative(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a0, a1, a2, a3, a4, length = np.exp(theta)
        near = np.exp(-distances / (2 * length))
        parts = [a0 * np.ones_like(near), a1 * alike, a2 * near, a3 * alike * near, a4 * noise]
        try:
            factor = scipy.linalg.cho_factor(sum(parts))
        except np.linalg.LinAlgError:  # not positive definite to rounding
            return np.inf, np.zeros(6)
        inverse = scipy.linalg.cho_solve(factor, np.eye(len(moments)))
        value = np.log(np.diag(factor[0])).sum() + 0.5 * np.sum(inverse * moments)
        slope = 0.5 * (inverse - inverse @ moments @ inverse)
        d_length = (a2 + a3 * alike) * near * distances / (2 * length)
        return float(value), np.array([np.sum(slope * part) for part in (*parts, d_length)])

    start = np.log([signal / 4] * 4 + [1.0, far / 2])
    limits = [(np.log(signal) - 12, np.log(signal) + 3)] * 4
    limits += [(np.log(0.2), np.log(5.0)), (np.log(far / 100), np.log(far * 100))]
    found = scipy.optimize.minimize(negative, start, jac=True, method="L-BFGS-B", bounds=limits)
    return Parameters(*np.exp(found.x).tolist())


def _kernel(a: Parameters, alike: np.ndarray, near: np.ndarray) -> np.ndarray:
    """K of pairs whose perturbations are `alike` (cosine times strengths) and whose contexts are `near`."""
    kernel: np.ndarray = a.everywhere + a.perturbation * alike + a.context * near + a.both * alike * near
    return kernel


def _shares_of_sizes(log_likelihood: np.ndarray) -> np.ndarray:
    """(G, A) posterior of each gene's size, from the log likelihood of each size, (G, A); the prior is fitted by EM."""
    likelihood = np.exp(log_likelihood - log_likelihood.max(1, keepdims=True))
    prior = np.full(len(SIZES), 1 / len(SIZES))
    for _ in range(SIZE_STEPS):
        share = likelihood * prior
        share /= share.sum(1, keepdims=True)
        prior = share.mean(0)
    return share
