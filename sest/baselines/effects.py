"""What baselines learn from and predict: mean effects of perturbations, and the controls of the contexts they are in.

An effect is the mean of a pair's perturbed cells minus the mean of the context's controls. Shapes: C contexts, n
training pairs, N pairs to predict, G genes, P perturbations, F feature width. Space: log1p of counts normalised to
target_sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sest.errors import InputError

BASELINES = ("controls", "context_mean", "perturbation_mean", "nearest", "ridge", "kernel", "stack")
VARIANCE_FLOOR = 0.1  # of the mean over genes, added to the variance of a gene that few cells express


@dataclass(frozen=True, eq=False)
class Contexts:
    """The control cells of C contexts; names say which contexts of a `Query` are those of training."""

    names: tuple[str, ...]
    mean: np.ndarray  # (C, G)
    variance: np.ndarray  # (C, G) between cells
    n_cells: np.ndarray  # (C,)

    def of_genes(self, genes: np.ndarray) -> Contexts:
        """The same of some genes."""
        return Contexts(self.names, self.mean[:, genes], self.variance[:, genes], self.n_cells)


@dataclass(frozen=True, eq=False)
class Query:
    """Pairs whose effects are wanted."""

    controls: Contexts
    context: np.ndarray  # (N,) index into `controls`
    perturbations: tuple[str, ...]  # (N,)
    features: np.ndarray  # (N, F)

    def __len__(self) -> int:
        return len(self.perturbations)

    @property
    def control_means(self) -> np.ndarray:
        """(N, G) of each pair's context."""
        means: np.ndarray = self.controls.mean[self.context]
        return means

    def parts(self, rows: int) -> Iterator[tuple[slice, Query]]:
        """Itself in stretches of at most `rows` pairs, and where they are."""
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            yield part, self.some(part)

    def of_genes(self, genes: np.ndarray) -> Query:
        """The same of some genes."""
        return Query(self.controls.of_genes(genes), self.context, self.perturbations, self.features)

    def some(self, rows: slice | np.ndarray) -> Query:
        """Some of its pairs."""
        names = np.array(self.perturbations, object)[rows]
        return Query(self.controls, self.context[rows], tuple(names), self.features[rows])


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of the training pairs."""

    controls: Contexts
    perturbations: tuple[str, ...]  # (P,)
    features: np.ndarray  # (P, F)
    delta: np.ndarray  # (n, G), float32 where there are many; what is computed from it is float64 all the same
    context: np.ndarray  # (n,) index into `controls`
    perturbation: np.ndarray  # (n,) index into `perturbations`
    n_cells: np.ndarray  # (n,) perturbed cells behind each effect
    measured: np.ndarray | None = None  # (C, G) bool: the genes that were measured in a context; None: all were

    def __post_init__(self) -> None:
        n_pairs = len(self.delta)
        assert n_pairs == len(self.context) == len(self.perturbation) == len(self.n_cells)
        assert self.features.shape[0] == len(self.perturbations)
        if n_pairs == 0:
            raise InputError("No perturbed cells in the training split: the baselines have nothing to learn from.")

    def __len__(self) -> int:
        return len(self.delta)

    def some(self, pairs: np.ndarray) -> Effects:
        """The same of some of the pairs, (n,) bool or indices."""
        return replace(
            self,
            delta=self.delta[pairs],
            context=self.context[pairs],
            perturbation=self.perturbation[pairs],
            n_cells=self.n_cells[pairs],
        )

    def most_cells(self, most: int) -> Effects:
        """The same of at most so many pairs, those of most cells, and of their perturbations alone."""
        found = self if len(self) <= most else self.some(np.sort(np.argsort(-self.n_cells, kind="stable")[:most]))
        used, perturbation = np.unique(found.perturbation, return_inverse=True)
        if len(used) == len(self.perturbations):
            return found
        names = tuple(self.perturbations[i] for i in used)
        return replace(found, perturbations=names, features=self.features[used], perturbation=perturbation)

    def of_genes(self, genes: np.ndarray) -> Effects:
        """The same of some genes."""
        measured = None if self.measured is None else self.measured[:, genes]
        return replace(self, controls=self.controls.of_genes(genes), delta=self.delta[:, genes], measured=measured)

    def blocks(self) -> Iterator[tuple[np.ndarray, Effects | None]]:
        """Genes (indices) that the same contexts measured, and the effects on them in these; None: there are none."""
        assert self.measured is not None
        patterns, block = np.unique(self.measured, axis=1, return_inverse=True)
        for number, contexts in enumerate(patterns.T):
            genes, pairs = np.flatnonzero(block.ravel() == number), contexts[self.context]
            if not pairs.any():
                yield genes, None
                continue
            some, of = self.some(pairs).of_genes(genes), self.controls
            kept = np.flatnonzero(contexts)
            controls = Contexts(
                tuple(of.names[i] for i in kept),
                of.mean[np.ix_(kept, genes)],
                of.variance[np.ix_(kept, genes)],
                of.n_cells[kept],
            )
            yield genes, replace(some, controls=controls, context=np.searchsorted(kept, some.context), measured=None)

    def query(self, pairs: np.ndarray) -> Query:
        """What asks for some of the pairs."""
        perturbation = self.perturbation[pairs]
        names = tuple(self.perturbations[i] for i in perturbation)
        return Query(self.controls, self.context[pairs], names, self.features[perturbation])

    def contexts_of(self, query: Query) -> np.ndarray:
        """(N,) index of each pair's context among those with training pairs; -1 for a new one."""
        trained = {self.controls.names[i]: i for i in np.unique(self.context).tolist()}
        known = np.array([trained.get(name, -1) for name in query.controls.names], np.int64)
        return known[query.context]

    def perturbations_of(self, query: Query) -> np.ndarray:
        """(N,) index of each pair's perturbation among those with training pairs; -1 for an unseen one."""
        trained = {self.perturbations[i]: i for i in np.unique(self.perturbation).tolist()}
        return np.array([trained.get(name, -1) for name in query.perturbations], np.int64)

    def gene_sd(self) -> np.ndarray:
        """(G,) standard deviation of a gene between control cells, pooled over contexts, kept from zero."""
        weight = self.controls.n_cells / self.controls.n_cells.sum()
        pooled = weight @ self.controls.variance
        floor = VARIANCE_FLOOR * float(pooled.mean())
        return np.sqrt(pooled + floor if floor > 0 else np.ones_like(pooled))

    def distances(self, controls: Contexts) -> np.ndarray:
        """(contexts, C) mean over genes of squared differences between control means, in units of `gene_sd`."""
        sd = self.gene_sd()
        a, b = controls.mean / sd, self.controls.mean / sd
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        mean: np.ndarray = np.maximum(squares, 0.0) / a.shape[1]
        return mean


def some_genes(n_genes: int, most: int = 2000) -> np.ndarray:
    """At most `most` genes, always the same: enough to choose a penalty or a weight, which all genes share."""
    if n_genes <= most:
        return np.arange(n_genes)
    return np.sort(np.random.default_rng(n_genes).choice(n_genes, most, replace=False))


def gene_blocks(n_genes: int, size: int = 1024) -> Iterator[slice]:
    """All genes, so many at a time: of (n, G) float32 no float64 copy is made."""
    for start in range(0, n_genes, size):
        yield slice(start, start + size)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(m, G) a @ b in float64, of (m, n) and (n, G): in float32 a row's last digits would depend on the other rows."""
    result = np.empty((len(a), b.shape[1]))
    for genes in gene_blocks(b.shape[1]):
        result[:, genes] = a @ b[:, genes].astype(np.float64)
    return result
