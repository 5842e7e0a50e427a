"""A moving average of a head's weights over its steps: what validates and predicts where `--ema` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sest.head.adamw import AdamW

EMA = "ema"  # kind of tensor in the optimizer's state: saved and resumed as AdamW's moments are


class WeightAverage:
    """w' = d w' + (1 - d) w after every step, where d rises to `decay`: min(decay, (1 + step) / (10 + step)).

    The average stands in the optimizer's state, so that checkpoints carry it. Nothing here waits for a GPU.
    """

    def __init__(self, model: nn.Module, optimizer: AdamW, decay: float) -> None:
        self._weights: list[Tensor] = list(model.parameters())
        self._optimizer, self._decay = optimizer, decay

    @property
    def _average(self) -> list[Tensor]:
        return [self._optimizer.state[weight][EMA] for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1; the first are the average."""
        if EMA not in self._optimizer.state[self._weights[0]]:
            for weight in self._weights:
                self._optimizer.state[weight][EMA] = weight.detach().clone()
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, in the same memory."""
        own = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, own)
