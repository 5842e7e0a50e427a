"""Dropout whose mask is a function of (seed, set, layer, place): not of how sets are grouped into forward passes.

So a batch of k*B sets, k accumulated batches of B, parts of a batch after running out of memory, and several processes
all drop the same units.

Shapes: B sets, S cells a set, H units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sest.head import kernels


def dropout_keys(seed: int, number: Tensor) -> Tensor:
    """Keys of sets from the run's seed and their places in the sequence of all sets: (B,) int64 -> (B,) int32."""
    of_seed = int(np.random.SeedSequence([seed, 0xD0]).generate_state(1).view(np.int32)[0])
    hashed = kernels.operator_or(kernels.plain_set_keys, kernels.set_keys, number.device)
    return hashed(number, of_seed)


class SetDropout(nn.Module):
    """Zero a share `p` of the units and scale the others by 1 / (1 - p), in training only.

    Args:
        number: of this layer among the model's, so that layers drop different units.
    """

    def __init__(self, p: float, number: int = 0) -> None:
        super().__init__()
        self.p, self.number = p, number

    def forward(self, x: Tensor, keys: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Drop units of (B, S, H) or (B, H) by the keys (B,) of `dropout_keys`.

        Args:
            kept: this layer's of `kept_units`, where it is known.

        Raises:
            ValueError: no keys in training.
        """
        if not self.training or self.p == 0:
            return x
        if kept is None:
            kept = kept_units([self], keys, x.shape[1:])[0]
        dropped: Tensor = _Dropped.apply(x, kept, 1 / (1 - self.p) if self.p < 1 else 0.0)
        return dropped


class _Dropped(torch.autograd.Function):
    """scale * x where `kept`, else 0, and the same of its gradient: one kernel each on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _scaled(x, kept, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(gradients[0], kept, ctx.scale), None, None


def _scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    if x.device.type == "cpu" or torch.compiler.is_compiling():
        return torch.where(kept, x * scale, 0.0)
    return torch.ops.aten.native_dropout_backward(x, kept, scale)  # what PyTorch's own dropout does to a gradient


def kept_units(layers: Sequence[SetDropout], keys: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Which units layers keep, hashed for all of them at once: (layers, B, *shape) bool from keys (B,).

    Args:
        layers: of one rate, numbered one after the other.
        shape: (S, H) or (H,) of what they drop from.

    Raises:
        ValueError: no keys.
    """
    if keys is None:
        raise ValueError("a head in training mode needs dropout keys (see dropout_keys), or call .eval()")
    hashed = kernels.operator_or(kernels.plain_kept_units, kernels.kept_units, keys.device)
    least = min(round(layers[0].p * kernels.HASHES), kernels.HASHES - 1)
    return hashed(keys, layers[0].number, len(layers), math.prod(shape), least).view(len(layers), -1, *shape)
