"""A stack where not all contexts measured all genes: one for every block of genes that the same contexts measured.

A gene's effects are learned from the contexts that have it and from no others, in which it is not zero but not known.
Shapes as in sest.baselines.effects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sest.baselines.effects import Effects, Query
from sest.baselines.stack import Stack


class BlockStack(Stack):
    """Has its weights block by block; those that are told are of the largest one."""

    def __init__(self, learned: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._learned = None if learned is None else list(learned["blocks"])

    def fit(self, effects: Effects) -> BlockStack:
        self._effects = effects
        self._blocks = [
            (genes, None if part is None else Stack(self._learned[i] if self._learned else None).fit(part))
            for i, (genes, part) in enumerate(effects.blocks())
        ]
        return self

    def learned(self) -> dict[str, Any]:
        """Plain values: what was chosen for each block so far."""
        return {"blocks": [None if stack is None else stack.learned() for _, stack in self._blocks]}

    def predict(self, query: Query, members: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """(N, G) effects; 0 on genes that no context with training pairs measured."""
        result = np.zeros((len(query), self._effects.delta.shape[1]))
        for genes, stack in self._blocks:
            if stack is not None:
                known = None if members is None else {name: part[:, genes] for name, part in members.items()}
                result[:, genes] = stack.predict(query.of_genes(genes), known)
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
