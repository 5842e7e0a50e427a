"""Baselines that are means of training effects, without a parameter to fit. Shapes as in sest.baselines.effects."""

from __future__ import annotations

import numpy as np

from sest.baselines.effects import Effects, Query, gene_blocks

AT_ONCE = 1024  # feature vectors


class Controls:
    """Nothing happens: perturbed cells are as the controls of their context."""

    def fit(self, effects: Effects) -> Controls:
        self._n_genes = effects.delta.shape[1]
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) zeros."""
        return np.zeros((len(query), self._n_genes))


class ContextMean:
    """Every perturbation does what the perturbations of its context do on average: stress, selection, batch.

    In a new context it is the mean over contexts, each counting the same.
    """

    def fit(self, effects: Effects) -> ContextMean:
        self._effects = effects
        self._means = np.zeros((len(effects.controls.names), effects.delta.shape[1]))
        trained = np.unique(effects.context)
        for context in trained.tolist():
            pairs = np.flatnonzero(effects.context == context)
            for genes in gene_blocks(effects.delta.shape[1]):
                self._means[context, genes] = effects.delta[pairs, genes].mean(0, dtype=np.float64)
        self._overall = self._means[trained].mean(0)
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        at = self._effects.contexts_of(query)
        effects: np.ndarray = np.where((at >= 0)[:, None], self._means[at], self._overall)
        return effects


class PerturbationMean:
    """A perturbation does everywhere what it did in training: its mean effect over contexts, weighted by cells.

    One that did not train has the mean of its context (`ContextMean`).
    """

    def fit(self, effects: Effects) -> PerturbationMean:
        self._effects = effects
        self._context_mean = ContextMean().fit(effects)
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        at, effects = self._effects.perturbations_of(query), self._effects
        result = self._context_mean.predict(query)
        for wanted in np.unique(at[at >= 0]).tolist():
            pairs = np.flatnonzero(effects.perturbation == wanted)
            weight = effects.n_cells[pairs] / effects.n_cells[pairs].sum()
            result[at == wanted] = weight @ effects.delta[pairs].astype(np.float64)
        return result


class Nearest:
    """The effect of the most similar pair: the same perturbation in the most similar context that has it.

    Of a perturbation that did not train, the one with the most similar features (cosine), in the most similar context
    that has it; where none is similar, the mean of its context.
    """

    def fit(self, effects: Effects) -> Nearest:
        self._effects = effects
        self._context_mean = ContextMean().fit(effects)
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects."""
        effects = self._effects
        result = self._context_mean.predict(query)
        distances = effects.distances(query.controls)
        at = effects.perturbations_of(query)
        trained = np.unique(effects.perturbation)
        unseen = np.flatnonzero(at < 0)
        if len(unseen):
            similar = cosines(query.features[unseen], effects.features[trained])
            at[unseen] = np.where(similar.max(1) > 0, trained[similar.argmax(1)], -1)
        for row, wanted in enumerate(at.tolist()):
            if wanted >= 0:
                pairs = np.flatnonzero(effects.perturbation == wanted)
                nearest = pairs[distances[query.context[row], effects.context[pairs]].argmin()]
                result[row] = effects.delta[nearest]
        return result


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, P) cosines of feature vectors (N, F) and (P, F); 0 with a vector of zeros."""
    a, result = _unit(a), np.empty((len(a), len(b)))
    for start in range(0, len(b), AT_ONCE):  # in float64 one-hot vectors are large
        some = slice(start, start + AT_ONCE)
        result[:, some] = a @ _unit(b[some]).T
    return result


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    size = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.where(size > 0, size, 1.0)
    return unit
