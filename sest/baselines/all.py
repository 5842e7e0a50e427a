"""All baselines by name, fitted together. Shapes as in sest.baselines.effects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from sest.baselines.blocks import BlockStack
from sest.baselines.effects import BASELINES, Effects, Query
from sest.baselines.means import Controls
from sest.baselines.stack import Stack

AT_ONCE = 96  # pairs predicted in float64 at one time: of more, each step would be new memory to clear


class Baselines:
    """Every baseline of `BASELINES`; they are fitted when they are first asked for anything, as that takes seconds."""

    effects: Effects  # what they learn from

    def __init__(self, learned: Mapping[str, Any] | None = None) -> None:
        """`learned`: of a stack that was fitted on the same effects, see `Stack`."""
        self._learned = learned

    def fit(self, effects: Effects) -> Baselines:
        self.effects = effects
        self.__dict__.pop("stack", None)
        return self

    @cached_property
    def stack(self) -> Stack:
        """The stack, which holds the others."""
        return (Stack if self.effects.measured is None else BlockStack)(self._learned).fit(self.effects)

    def predict(self, query: Query) -> dict[str, np.ndarray]:
        """Name -> (N, G) effects, in the order of `BASELINES`."""
        members = self.stack.members(query)
        found = {"controls": Controls().fit(self.effects).predict(query), **members}
        found["stack"] = self.stack.predict(query, members)
        return {name: found[name] for name in BASELINES}


def pseudobulk_parts(fitted: Baselines, query: Query) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """Stretches of pairs, and name -> (n, G) float32 means of their cells: controls and effect, cut at 0."""
    for rows, part in query.parts(AT_ONCE):
        added_to = part.control_means
        mean, found = np.empty(added_to.shape), {}
        for name, effect in fitted.predict(part).items():
            found[name] = np.maximum(np.add(added_to, effect, out=mean), 0.0, out=mean).astype(np.float32)
        yield rows, found


def baseline_pseudobulks(fitted: Baselines, query: Query) -> dict[str, np.ndarray]:
    """Name -> (N, G) of all pairs; see `pseudobulk_parts`."""
    return joined(pseudobulk_parts(fitted, query), len(query), fitted.effects.delta.shape[1])


def joined(parts: Iterable[tuple[slice, dict[str, np.ndarray]]], n_pairs: int, n_genes: int) -> dict[str, np.ndarray]:
    """Name -> (n_pairs, n_genes) of all stretches."""
    found = {name: np.empty((n_pairs, n_genes), np.float32) for name in BASELINES}
    for rows, part in parts:
        for name, values in part.items():
            found[name][rows] = values
    return found
