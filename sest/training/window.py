"""What the steps since the last log line came to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sest.config import TrainConfig
from sest.machine.memory import used_bytes
from sest.training.limit import Limit

# what differs between two runs that take the same steps
MEASURED = ("it_per_s", "data_wait", "device_wait", "limit_it_per_s", "limited_by", "memory_bytes", "crc32c")


WINDOW = "window"  # in a checkpoint's state.json: what `Window.to_values` gives
SUMS = ("loss", "grad_norm", "bad", "streak", "worst_streak", "steps")


class Window:
    """Sums since the last log line, kept on the device until it is written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss, self._norm, self._bad, self._streak, self._worst = torch.zeros(5, device=device).unbind()
        self._steps, self._paused, self._waited = 0, 0.0, 0.0
        self._restored = 0  # of the steps, those of an earlier process, whose time is not known
        self._began = self._mark = time.monotonic()
        self.worst_streak = 0

    def add(self, loss: Tensor, norm: Tensor, bad: Tensor) -> None:
        self._loss += torch.where(bad, 0.0, loss)
        self._norm += torch.where(bad, 0.0, norm)
        self._bad += bad
        self._streak.copy_((self._streak + 1) * bad)
        self._worst.copy_(torch.maximum(self._worst, self._streak))
        self._steps += 1
        self._mark = time.monotonic()

    def pause(self) -> None:
        """What happened since the last step (validation, saving) is no training time."""
        self._paused += time.monotonic() - self._mark
        self._mark = time.monotonic()

    def n_bad(self) -> int:
        """Skipped steps since the last line; waits for the device."""
        return int(self._bad)

    def to_values(self) -> dict[str, float]:
        """What the next line needs, for state.json; waits for the device."""
        sums = torch.stack([self._loss, self._norm, self._bad, self._streak, self._worst]).tolist()
        return dict(zip(SUMS, (*sums, self._steps), strict=True))

    def restore(self, values: Mapping[str, float]) -> None:
        """Go on from `to_values`."""
        for name, tensor in zip(SUMS, (self._loss, self._norm, self._bad, self._streak, self._worst), strict=False):
            tensor.fill_(values[name])
        self._steps = self._restored = int(values["steps"])

    def line(self, step: int, lr: float, skipped: int, waited: float, limit: Limit) -> dict[str, Any]:
        """The log line of the steps since the last one; waits for the device.

        Shares of the time: `data_wait`, the loop waited for batches; `device_wait`, it waited here for steps it had
        given to a GPU (next to nothing where the GPU waits for the loop instead).

        Args:
            skipped: steps skipped before them.
            waited: seconds spent waiting for batches since the run began.
            limit: of a step on this device.
        """
        asked = time.monotonic()
        loss, norm, bad, worst = torch.stack([self._loss, self._norm, self._bad, self._worst]).tolist()
        self.worst_streak = int(worst)
        now = time.monotonic()
        seconds = max(now - self._began - self._paused, 1e-9)
        good = max(self._steps - int(bad), 1)
        line: dict[str, Any] = {
            "step": step,
            "loss": loss / good if bad < self._steps else math.nan,
            "grad_norm": norm / good if bad < self._steps else math.nan,
            "lr": lr,
            "it_per_s": max(self._steps - self._restored, 1) / seconds,
            "data_wait": min((waited - self._waited) / seconds, 1.0),
            "skipped_steps": skipped + int(bad),
            "limit_it_per_s": limit.it_per_s,
            "limited_by": limit.limited_by,
            "memory_bytes": used_bytes(self._device),
        }
        if self._device.type == "cuda":
            line["device_wait"] = min((now - asked) / seconds, 1.0)
        for tensor in (self._loss, self._norm, self._bad, self._worst):
            tensor.zero_()
        self._steps, self._restored, self._paused, self._waited = 0, 0, 0.0, waited
        self._began = self._mark = time.monotonic()
        return line


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step after `step` steps: up to `lr` in the warm-up, then as the schedule says.

    Source of the half cosine, lr (1 + cos(pi t)) / 2: Loshchilov & Hutter 2017, without restarts.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(config.max_steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
