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
from sest.head.model import HeadSizes, StateTransition, n_parameters
from sest.training.limit import operation_bytes, step_cost, step_launches

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


def test_a_step_of_the_default_sizes_launches_and_moves_no_more_than_it_did(trace_step: Tracer) -> None:
    """Upper bounds are what benchmarks/README.md says, rounded up: a change that adds to a phase has a reason."""
    sizes, config = HeadSizes(512, 5120, 18_080), TrainConfig(set_size=128, precision="bf16")
    ops = trace_step(sizes, config, n_values=3700)
    found = {
        phase: (len(of), sum(op.n_bytes for op in of) / 1e9)
        for phase in dict.fromkeys(op.phase for op in ops)
        for of in ([op for op in ops if op.phase == phase],)
    }
    most = {"data": (7, 0.2), "forward": (168, 1.41), "loss": (72, 1.1), "backward": (276, 3.0), "update": (29, 1.8)}
    assert found.keys() == most.keys()
    for phase, (n, gb) in most.items():
        assert found[phase][0] <= n and found[phase][1] <= gb, (phase, found[phase])
    assert sum(op.flops for op in ops) == pytest.approx(step_cost(StateTransition(sizes), 16, 128)[0], rel=0.02)
    assert len(ops) == pytest.approx(step_launches(sizes), rel=0.05)
    assert not [op for op in ops if op.phase == "forward" and op.out.startswith("int32")]  # nothing hashed bit by bit
    own = {"dense_rows", "set_keys", "kept_units", "weighted_sum", "centre_and_largest", "swiglu", "swiglu_backward"}
    assert own <= {op.name for op in ops}  # sest.head.kernels
    assert sum(op.modelled_ms for op in ops) < 4.5


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden": 256, "ffn": 1024}, {"n_layers": 8}, {"n_genes": 5000, "n_layers": 1, "hidden": 128, "ffn": 512}],
    ids=str,
)
def test_the_limit_of_a_run_knows_what_its_operations_read_and_write(
    trace_step: Tracer, changes: dict[str, int], precision: str
) -> None:
    """A formula of sizes against the counts; of 2% to 5%, by which the formula is off where layers are few or small."""
    sizes = HeadSizes(**{"dim": 512, "n_features": 5120, "n_genes": 18_080, **changes})
    ops = trace_step(sizes, TrainConfig(batch_size=16, set_size=128, precision=precision), n_values=sizes.n_genes // 5)
    with torch.device("meta"):
        n = n_parameters(StateTransition(sizes))
    expected = operation_bytes(sizes, n, 16, 128, itemsize=2 if precision == "bf16" else 4)
    assert sum(op.n_bytes for op in ops) == pytest.approx(expected, rel=0.06)


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


@pytest.mark.parametrize(
    ("changes", "host_decides"),
    [
        ({}, set()),
        ({"accumulate": 2}, set()),
        ({"precision": "fp32"}, set()),
        ({"precision": "fp16"}, set()),
        ({"loss": "mse", "clip": 0.0}, set()),
        ({"schedule": "cosine"}, {"_fused_adamw_"}),
        ({"warmup": 10}, {"_fused_adamw_"}),
        ({"ema": 0.9}, {"_foreach_lerp_"}),  # in the first steps
    ],
    ids=str,
)
def test_what_the_host_decides_from_step_to_step_is_the_rate_of_a_schedule_and_of_an_average(
    trace_step: Tracer, changes: dict[str, Any], host_decides: set[str]
) -> None:
    """All else comes from the device's memory, so that a CUDA graph of a step could be repeated.

    How many values a batch has is told to `dense_rows` for PyTorch's operations; Triton's kernel does not read it.
    """
    import step_ops

    one, other = step_ops.trace_steps(SMALL, small(**changes), n_values=20, n_steps=2)
    assert [(op.name, op.out) for op in one] == [(op.name, op.out) for op in other]
    different = {a.name for a, b in zip(one, other, strict=True) if a.from_python != b.from_python}
    assert different == {"dense_rows"} | host_decides


@pytest.mark.parametrize("sizes", [SMALL, HeadSizes(32, 40, 200, 64, n_layers=5, n_encoder_layers=2)], ids=str)
def test_the_limit_of_a_run_knows_how_many_operations_a_step_starts(trace_step: Tracer, sizes: HeadSizes) -> None:
    assert len(trace_step(sizes, small(), n_values=20)) == pytest.approx(step_launches(sizes), rel=0.02)


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
