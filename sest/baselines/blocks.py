"""A stack where not all contexts measured all genes: one for every block of genes that the same contexts measured.

A gene's effects are learned from the contexts that have it and from no others, in which it is not zero but not known.
Shapes as in sest.baselines.effects.
"""

from __future__ import annotations

import numpy as np

from sest.baselines.effects import Effects, Query
from sest.baselines.stack import Stack


class BlockStack(Stack):
    """Has its weights block by block; those that are told are of the largest one."""

    def fit(self, effects: Effects) -> BlockStack:
        self._effects = effects
        self._blocks = [(genes, None if part is None else Stack().fit(part)) for genes, part in effects.blocks()]
        return self

    def predict(self, query: Query) -> np.ndarray:
        """(N, G) effects; 0 on genes that no context with training pairs measured."""
        result = np.zeros((len(query), self._effects.delta.shape[1]))
        for genes, stack in self._blocks:
            if stack is not None:
                result[:, genes] = stack.predict(query.of_genes(genes))
        return result

    def members(self, query: Query) -> dict[str, np.ndarray]:
        """(N, G) effects of every baseline that is stacked."""
        result: dict[str, np.ndarray] = {}
        for genes, stack in self._blocks:
            for name, effects in stack.members(query.of_genes(genes)).items() if stack is not None else ():
                result.setdefault(name, np.zeros((len(query), self._effects.delta.shape[1])))[:, genes] = effects
        return result

    def weights_of(self, kind: str) -> dict[str, float]:
        """The weight of every baseline for pairs of this kind, on the largest block."""
        _, stack = max(((genes, s) for genes, s in self._blocks if s is not None), key=lambda block: len(block[0]))
        return stack.weights_of(kind)
