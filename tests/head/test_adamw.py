"""AdamW: the same bytes as `torch.optim.AdamW`; and its state by name, and back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sest.head.adamw import AdamW, bytes_of_state
from sest.head.average import WeightAverage
from sest.head.model import HeadSizes, StateTransition, new_model

SIZES = HeadSizes(4, 3, 5, hidden=8, n_layers=1, n_heads=2, ffn=8)
LR, DECAY = 0.01, 0.3


def gradients(model: StateTransition, n_steps: int) -> Iterator[int]:
    """Sets those of some steps, the same for every model of these sizes."""
    generator = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        yield step


def names_of(model: StateTransition) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def equal(ours: AdamW, model: StateTransition, theirs: torch.optim.AdamW, other: StateTransition) -> bool:
    """Whether weights, moments and steps have the same bits."""
    assert list(ours.state) and len(ours.state) == len(theirs.state)
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    weights = all(torch.equal(a, b) for a, b in pairs)
    return weights and all(
        torch.equal(ours.state[a][kind], theirs.state[b][kind])
        for a, b in pairs
        for kind in ("step", "exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize("given", ["", "found_inf", "grad_scale"])
def test_a_step_has_the_bits_of_pytorchs_own(given: str) -> None:
    model, other = new_model(SIZES, 0), new_model(SIZES, 0)
    ours = AdamW(model.parameters(), LR, DECAY)
    theirs = torch.optim.AdamW(other.parameters(), LR, weight_decay=DECAY, fused=True)
    for step, _ in zip(gradients(model, 6), gradients(other, 6), strict=True):
        if given:
            value = torch.tensor(float(step % 2) if given == "found_inf" else 1.0 + step)
            setattr(ours, given, value)
            setattr(theirs, given, value)
        ours.lr = theirs.param_groups[0]["lr"] = LR * (step + 1)
        ours.step()
        theirs.step()
        assert equal(ours, model, theirs, other)


def test_a_bad_step_leaves_weights_and_moments() -> None:
    model = new_model(SIZES, 0)
    optimizer = AdamW(model.parameters(), LR, DECAY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in gradients(model, 1):
        optimizer.found_inf = torch.ones(())
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_a_scaler_of_losses_takes_the_steps_that_it_takes_with_pytorchs_own() -> None:
    model, other = new_model(SIZES, 0), new_model(SIZES, 0)
    ours = AdamW(model.parameters(), LR, DECAY)
    theirs = torch.optim.AdamW(other.parameters(), LR, weight_decay=DECAY, fused=True)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step, _ in zip(gradients(model, 6), gradients(other, 6), strict=True):
        of_both: Any = zip(scalers, (ours, theirs), (model, other), strict=True)  # ours has what a scaler asks for
        for scaler, optimizer, head in of_both:
            scaler.scale(torch.zeros(()))  # makes its scale
            bias = head.project_out.get_parameter("0.bias")
            assert bias.grad is not None
            if step == 3:
                bias.grad[0] = torch.inf
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert equal(ours, model, theirs, other) and scalers[0].get_scale() == scalers[1].get_scale()


def test_it_comes_back_with_every_moment() -> None:
    model = new_model(SIZES, 0)
    names, optimizer = names_of(model), AdamW(model.parameters(), LR, DECAY)
    for _ in gradients(model, 2):
        optimizer.step()
    tensors = optimizer.to_tensors(names)
    assert {key.split("/")[0] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    fresh = AdamW(model.parameters(), LR, DECAY)
    assert fresh.to_tensors(names) == {}
    fresh.load_tensors(tensors, names)
    again = fresh.to_tensors(names)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert all(a is not b for a, b in zip(tensors.values(), again.values(), strict=True))


def test_parameters_that_do_not_train_have_no_state() -> None:
    model = new_model(SIZES, 0)
    model.eval().basal_encoder.requires_grad_(False)
    names, optimizer = names_of(model), AdamW(model.parameters(), LR, DECAY)
    model(torch.zeros(1, 2, 4), torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer.to_tensors(names)
    assert tensors and not [key for key in tensors if "basal_encoder" in key]
    optimizer.load_tensors(tensors, names)
    assert optimizer.to_tensors(names).keys() == tensors.keys()


def test_parameters_that_train_later_begin_then() -> None:
    """As with PyTorch's own: each has steps of its own, and an average that is there stays."""
    model, other = new_model(SIZES, 0), new_model(SIZES, 0)
    ours = AdamW(model.parameters(), LR, DECAY)
    theirs = torch.optim.AdamW(other.parameters(), LR, weight_decay=DECAY, fused=True)
    for step, _ in zip(gradients(model, 5), gradients(other, 5), strict=True):
        for head in (model, other):
            for p in head.basal_encoder.parameters():
                p.requires_grad_(step >= 2)
                p.grad = p.grad if step >= 2 else None
        ours.step()
        theirs.step()
        if step == 1:
            ours.load_tensors(ours.to_tensors(names_of(model)), names_of(model))
            WeightAverage(model, ours, 0.9).update(1)
    assert equal(ours, model, theirs, other)
    late = next(model.basal_encoder.parameters())
    assert float(ours.state[late]["step"]) == 3 and len(ours.state[late]) == 4


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_bytes_of_the_state_are_known_before_the_first_step(averaged: bool, frozen: bool) -> None:
    model = new_model(SIZES, 0)
    model.basal_encoder.requires_grad_(not frozen)
    expected = bytes_of_state(model.parameters(), averaged=averaged)
    optimizer = AdamW(model.parameters(), LR, DECAY)
    model(torch.zeros(1, 2, 4), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32)).sum().backward()
    optimizer.step()
    if averaged:
        WeightAverage(model, optimizer, 0.9).update(1)
    assert sum(tensor.nbytes for tensor in optimizer.to_tensors(names_of(model)).values()) == expected


STEP = """
import sys, torch
from sest.head.adamw import AdamW
from sest.head.model import HeadSizes, new_model
model = new_model(HeadSizes(4, 3, 5, hidden=8, n_layers=1, n_heads=2, ffn=8), 0)
model(torch.zeros(1, 2, 4), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32)).sum().backward()
AdamW(model.parameters(), 0.1, 0.1).step()
print("torch._dynamo" in sys.modules)
"""


def test_a_head_and_its_step_import_no_compiler() -> None:
    """2 s of every start: the reason for this class, and for `sest.head.kernels.operator_or`."""
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_tensors_of_the_state_need_no_gradients() -> None:
    optimizer = AdamW(new_model(SIZES, 0).parameters(), LR, DECAY)
    optimizer.new_moments()
    kept: list[Tensor] = [value for state in optimizer.state.values() for value in state.values()]
    assert kept and not any(value.requires_grad or value.any() for value in kept)
