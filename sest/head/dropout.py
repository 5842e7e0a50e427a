"""Dropout whose mask is a function of (seed, set, layer, place): not of how sets are grouped into forward passes.

So a batch of k*B sets, k accumulated batches of B, parts of a batch after running out of memory, and several processes
all drop the same units.

Shapes: B sets, S cells a set, H units.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Drop units of (B, S, H) or (B, H) by the keys (B,) of `dropout_keys`.

        Raises:
            ValueError: no keys in training.
        """
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise ValueError("a head in training mode needs dropout keys (see dropout_keys), or call .eval()")
        shape = x.shape[1:]
        places = torch.arange(shape.numel(), dtype=torch.int32, device=x.device).view(shape)
        of_layer = mix32(keys + self.number * 0x3C6EF372).view(-1, *[1] * len(shape))
        kept = (mix32(places ^ of_layer) & (_RANGE - 1)) >= round(self.p * _RANGE)
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return torch.where(kept, x * scale, 0.0)
