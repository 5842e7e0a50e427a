"""Dropout whose mask is a function of (seed, set, layer, place): not of how sets are grouped into forward passes.

So a batch of k*B sets, k accumulated batches of B, parts of a batch after running out of memory, and several processes
all drop the same units.

Shapes: B sets, S cells a set, H units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sest.head.mix import mix32

_RANGE = 2**31  # of the hash that is compared with the dropout rate


def dropout_keys(seed: int, number: Tensor) -> Tensor:
    """Keys of sets from the run's seed and their places in the sequence of all sets: (B,) int64 -> (B,) int32."""
    of_seed = int(np.random.SeedSequence([seed, 0xD0]).generate_state(1).view(np.int32)[0])
    return mix32(mix32(number.to(torch.int32)) ^ of_seed)


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
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return torch.where(kept, x * scale, 0.0)


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
    numbers = torch.arange(layers[0].number, layers[0].number + len(layers), dtype=torch.int32, device=keys.device)
    of_layer = mix32(keys + (numbers * 0x3C6EF372).unsqueeze(1))  # (layers, B)
    places = torch.arange(math.prod(shape), dtype=torch.int32, device=keys.device).view(*shape)
    hashes = mix32(places ^ of_layer.view(*of_layer.shape, *[1] * len(shape))).bitwise_and_(_RANGE - 1)
    return hashes >= round(layers[0].p * _RANGE)
