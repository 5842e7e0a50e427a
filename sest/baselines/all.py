"""All baselines by name, fitted together. Shapes as in sest.baselines.effects."""

from __future__ import annotations

import numpy as np

from sest.baselines.effects import Effects, Query
from sest.baselines.means import Controls
from sest.baselines.stack import Stack

BASELINES = ("controls", "context_mean", "perturbation_mean", "nearest", "ridge", "kernel", "stack")
AT_ONCE = 256  # pairs predicted in float64 at one time


class Baselines:
    """Every baseline of `BASELINES`."""

    def fit(self, effects: Effects) -> Baselines:
        self.controls, self.stack = Controls().fit(effects), Stack().fit(effects)
        return self

    def predict(self, query: Query) -> dict[str, np.ndarray]:
        """Name -> (N, G) effects, in the order of `BASELINES`."""
        found = {"controls": self.controls.predict(query), **self.stack.members(query)}
        found["stack"] = self.stack.predict(query)
        return {name: found[name] for name in BASELINES}


def baseline_pseudobulks(effects: Effects, query: Query, means: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Name -> (N, G) float32 means of cells by every baseline, fitted on `effects`: controls and effect, cut at 0.

    `means`: (C, G) of other control cells of the query's contexts, to which the effects are added instead.
    """
    fitted = Baselines().fit(effects)
    found = {name: np.empty((len(query), effects.delta.shape[1]), np.float32) for name in BASELINES}
    for rows, part in query.parts(AT_ONCE):
        for name, predicted in fitted.predict(part).items():
            added_to = part.control_means if means is None else means[part.context]
            found[name][rows] = np.maximum(added_to + predicted, 0.0)
    return found
