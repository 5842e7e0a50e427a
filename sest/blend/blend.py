"""A prediction's parts and their weights: the stack of baselines, the head, and the head held against itself.

`stack` is sest.baselines.stack. `head` is the mean of the head's cells minus the mean of the controls. `anchored` is
the mean of the head's cells minus the mean of the cells that it predicts, from the same controls, for the control:
errors that it makes for both are gone. What the weights leave to 1 is no effect. Shapes: K pairs, G genes, n training
pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sest.baselines.all import Baselines
from sest.baselines.effects import Contexts, Effects, Query
from sest.baselines.stack import KINDS, Stack, kinds_of
from sest.blend.weights import Weights, fit_weights

PARTS = STACK, HEAD, ANCHORED = "stack", "head", "anchored"
CONTROLS = "controls"
PRIOR = {STACK: 1.0, HEAD: 0.0, ANCHORED: 0.0}
"""The stack has weights of its own, from training pairs left out of it, so that it may be taken as it is."""


@dataclass(frozen=True, eq=False)
class Blend:
    """The weights of the parts, and the baselines with what they learn from."""

    baselines: Baselines
    weights: Weights

    @property
    def effects(self) -> Effects:
        """Of the training pairs."""
        return self.baselines.effects

    @property
    def stack(self) -> Stack:
        return self.baselines.stack

    @property
    def of_head(self) -> float:
        """What the head counts, raw and anchored."""
        return self.weights.means.get(HEAD, 0.0) + self.weights.means.get(ANCHORED, 0.0)

    def effect(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of the parts' effects, each of one shape."""
        return reduce(np.add, (self.weights.means[name] * effect for name, effect in parts.items()))  # one at a time

    def said(self, query: Query) -> list[str]:
        """Which part carries which weight: one sentence for the contexts of each kind of pair."""
        kinds, sentences = kinds_of(self.effects, query), []
        for code in np.unique(kinds).tolist():
            contexts = sorted({query.controls.names[c] for c in query.context[kinds == code]})
            inside = self.stack.weights_of(KINDS[code])
            within = ", ".join(f"{name.replace('_', ' ')} {w:.2f}" for name, w in inside.items() if w >= 0.005)
            parts = [f"stack {self.weights.means[STACK]:.2f} ({within or 'of controls alone'})"]
            parts += [f"{n} {self.weights.means[n]:.2f}" for n in (HEAD, ANCHORED) if n in self.weights.means]
            who = ", ".join(contexts[:3]) + (f" and {len(contexts) - 3} more" if len(contexts) > 3 else "")
            sentences.append(f"{who} ({KINDS[code]}): {', '.join(parts)}, controls {self.weights.of_controls:.2f}.")
        return sentences


def fit_blend(
    baselines: Baselines,
    parts: Mapping[str, np.ndarray],
    observed: np.ndarray,
    context: np.ndarray,
    perturbation: np.ndarray,
    seed: int,
) -> Blend:
    """Weights from validation pairs.

    Args:
        baselines: fitted on the training pairs.
        parts: name of `PARTS` -> (K, G) predicted effects of the validation pairs; the stack among them.
        observed: (K, G) their effects.
        context, perturbation: (K,) codes.
        seed: of the resamples.
    """
    prior = {name: PRIOR[name] for name in parts}
    return Blend(baselines, fit_weights(parts, observed, context, perturbation, prior, seed))


def to_stored(blend: Blend) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plain values and tensors for a checkpoint."""
    effects, weights = blend.effects, blend.weights
    values = {
        "weights": weights.means,
        "spread": weights.spread,
        "n_pairs": weights.n_pairs,
        "contexts": list(effects.controls.names),
        "perturbations": list(effects.perturbations),
        "stack": blend.stack.learned(),
    }
    arrays = {
        "control_mean": effects.controls.mean.astype(np.float32, copy=False),
        "control_variance": effects.controls.variance.astype(np.float32, copy=False),
        "n_controls": effects.controls.n_cells.astype(np.int64, copy=False),
        "features": effects.features.astype(np.float32, copy=False),
        "delta": effects.delta.astype(np.float32, copy=False),
        "context": effects.context.astype(np.int64, copy=False),
        "perturbation": effects.perturbation.astype(np.int64, copy=False),
        "n_cells": effects.n_cells.astype(np.int64, copy=False),
    }
    if effects.measured is not None:
        arrays["measured"] = effects.measured
    return values, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check_stored(values: Mapping[str, Any], a: Mapping[str, np.ndarray]) -> None:
    """Refuse arrays of a wrong shape or type, and codes without a name: C contexts, R perturbations."""
    n_contexts, n_names, genes = len(values["contexts"]), len(values["perturbations"]), a["delta"].shape[1:]
    shapes = {
        **dict.fromkeys(("control_mean", "control_variance"), (n_contexts, *genes)),
        "n_controls": (n_contexts,),
        "features": (n_names, *a["features"].shape[1:]),
        "delta": (len(a["delta"]), *genes),
        **dict.fromkeys(("context", "perturbation", "n_cells"), (len(a["delta"]),)),
        **({"measured": (n_contexts, *genes)} if "measured" in a else {}),
    }
    whole = {"n_controls", "context", "perturbation", "n_cells"}
    for name, shape in shapes.items():
        kinds = "iub" if name in whole else "fb" if name == "measured" else "f"
        if a[name].shape != shape or a[name].dtype.kind not in kinds or not np.isfinite(a[name]).all():
            raise ValueError(f"{name} has shape {a[name].shape} of {a[name].dtype}, not finite numbers {shape}")
    for name, n in (("context", n_contexts), ("perturbation", n_names)):
        if len(a[name]) and not (a[name].min() >= 0 and a[name].max() < n):
            raise ValueError(f"{name} has codes that are not among {n}")


def from_stored(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Blend:
    """What `to_stored` made.

    Raises:
        KeyError, ValueError: what is not there, or does not fit the rest.
    """
    a = {name: tensor.numpy() for name, tensor in tensors.items()}
    _check_stored(values, a)
    mean, variance = (a[name].astype(np.float64) for name in ("control_mean", "control_variance"))
    effects = Effects(
        controls=Contexts(tuple(values["contexts"]), mean, variance, a["n_controls"]),
        perturbations=tuple(values["perturbations"]),
        features=a["features"],
        delta=a["delta"],
        context=a["context"],
        perturbation=a["perturbation"],
        n_cells=a["n_cells"],
        measured=a.get("measured"),
    )
    return Blend(
        Baselines(values.get("stack")).fit(effects),
        Weights(dict(values["weights"]), dict(values["spread"]), int(values["n_pairs"])),
    )
