"""The cost of a step, and what a device reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sest.head.loss import energy_distance
from sest.head.model import HeadSizes, n_parameters, new_model
from sest.training.limit import Limit, measure_limit, step_cost, step_launches

SIZES = HeadSizes(dim=32, n_features=40, n_genes=200, hidden=48, n_layers=2, n_heads=4, ffn=96, dropout=0.0)
B, S = 3, 16


def test_flops_of_a_step_are_those_that_torch_counts() -> None:
    model = new_model(SIZES, 0)
    basal, features, target = torch.randn(B, S, 32), torch.randn(B, 40), torch.rand(B, S, 200)
    with FlopCounterMode(display=False) as counter:
        energy_distance(model(basal, features), target).mean().backward()
    # ours counts the gradient of the inputs of the first layers too, which nobody asks for: at most 3% here
    assert counter.get_total_flops() == pytest.approx(step_cost(model, B, S)[0], rel=0.06)


def test_bytes_of_a_step_grow_with_the_cells_and_hold_the_optimizer() -> None:
    model = new_model(SIZES, 0)
    _, one = step_cost(model, 1, S)
    _, three = step_cost(model, 3, S)
    assert three - one == 2 * 12 * 4 * S * 200
    assert one - (three - one) / 2 == 28 * n_parameters(model)


def test_the_limit_is_whichever_takes_longer() -> None:
    limit = Limit(flops=100.0, bytes=10.0, flops_per_s=50.0, bytes_per_s=10.0)
    assert (limit.seconds, limit.it_per_s, limit.limited_by) == (2.0, 0.5, "compute")
    assert replace(limit, bytes_per_s=2.0).limited_by == "memory"
    assert replace(limit, bytes_per_s=2.0).it_per_s == 0.2
    started = replace(limit, launches=1000.0, seconds_a_launch=0.004)
    assert (started.seconds, started.limited_by) == (4.0, "launches")


def test_the_device_is_measured() -> None:
    limit = measure_limit(new_model(SIZES, 0), B, S, "fp32", seconds=0.0)
    assert limit.launches == step_launches(SIZES) and 1e-8 < limit.seconds_a_launch < 1e-2
    twice = measure_limit(new_model(SIZES, 0), B, S, "fp32", passes=2, seconds=0.0)
    assert twice.launches == 2 * limit.launches
    assert measure_limit(new_model(SIZES, 0), B, S, "fp32", compiled=True, seconds=0.0).launches == 0
    assert 1e8 < limit.flops_per_s < 1e13 and 1e8 < limit.bytes_per_s < 1e12  # of any CPU that runs this
