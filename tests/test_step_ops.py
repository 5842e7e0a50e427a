"""A training step as a GPU would run it, traced without one: what it launches and moves, and that it waits for nothing.

benchmarks/step_ops.py traces `Trainer.step` on PyTorch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from sest.config import TrainConfig
from sest.head.model import HeadSizes

if TYPE_CHECKING:
    from step_ops import Op

SMALL = HeadSizes(32, 40, 200, hidden=64, n_layers=2)
Tracer = Callable[..., "list[Op]"]


@pytest.fixture
def trace_step(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import step_ops

    return step_ops.trace_step


def small(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 4, "set_size": 8, "precision": "bf16", **changes})


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"precision": "fp32"}, {"loss": "mse"}, {"clip": 0.0}, {"ema": 0.9}, {"precision": "fp16"}],
    ids=str,
)
def test_a_step_waits_for_nothing_and_each_of_its_batches_is_one_copy(
    trace_step: Tracer, changes: dict[str, Any], on_device: bool
) -> None:
    ops = trace_step(SMALL, small(**changes), n_values=20, on_device=on_device)
    assert not [op for op in ops if op.waits]
    assert [op.phase for op in ops if op.from_host] == ["data"] * changes.get("accumulate", 1)
    assert {op.phase for op in ops} == {"data", "forward", "loss", "backward", "update"}


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch, trace_step: Tracer) -> None:
    import sest.training.trainer as trainer

    def pageable(seed: int, number: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(np.zeros(len(number), np.int32), device=number.device)

    monkeypatch.setattr(trainer, "dropout_keys", pageable)
    assert [op.name for op in trace_step(SMALL, small(), n_values=20) if op.waits] == ["_to_copy"]
    monkeypatch.setattr(trainer, "dropout_keys", lambda seed, number: number[number > 0])  # needs the numbers
    with pytest.raises(NotImplementedError, match="nonzero"):
        trace_step(SMALL, small(), n_values=20)
    monkeypatch.setattr(trainer, "dropout_keys", lambda seed, number: number[: number.sum().item()])
    with pytest.raises(RuntimeError, match="meta tensors"):
        trace_step(SMALL, small(), n_values=20)
