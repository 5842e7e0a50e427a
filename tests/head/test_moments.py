"""AdamW's state by name, and back."""

from __future__ import annotations

import pytest
import torch

from sest.head.average import WeightAverage
from sest.head.model import HeadSizes, new_model
from sest.head.moments import bytes_of_optimizer, optimizer_to_tensors, tensors_to_optimizer

SIZES = HeadSizes(4, 3, 5, hidden=8, n_layers=1, n_heads=2, ffn=8)


def test_an_optimizer_comes_back_with_every_moment() -> None:
    def trained(model: torch.nn.Module) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        return optimizer

    model = new_model(SIZES, 0)
    names = [name for name, _ in model.named_parameters()]
    optimizer = trained(model)
    tensors = optimizer_to_tensors(optimizer, names)
    assert {key.split("/")[0] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    fresh = torch.optim.AdamW(model.parameters(), fused=True)
    tensors_to_optimizer(tensors, fresh, names)
    again = optimizer_to_tensors(fresh, names)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)
    assert all(a is not b for a, b in zip(tensors.values(), again.values(), strict=True))


def test_parameters_that_do_not_train_have_no_state() -> None:
    model = new_model(SIZES, 0)
    names = [name for name, _ in model.named_parameters()]
    model.eval().basal_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 2, 4), torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    tensors = optimizer_to_tensors(optimizer, names)
    assert tensors and not [key for key in tensors if "basal_encoder" in key]
    tensors_to_optimizer(tensors, optimizer, names)
    assert optimizer_to_tensors(optimizer, names).keys() == tensors.keys()


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_bytes_of_the_state_are_known_before_the_first_step(averaged: bool, frozen: bool) -> None:
    model = new_model(SIZES, 0)
    names = [name for name, _ in model.named_parameters()]
    model.basal_encoder.requires_grad_(not frozen)
    expected = bytes_of_optimizer(model.parameters(), averaged=averaged)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.zeros(1, 2, 4), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int32)).sum().backward()
    optimizer.step()
    if averaged:
        WeightAverage(model, optimizer, 0.9).update(1)
    assert sum(tensor.nbytes for tensor in optimizer_to_tensors(optimizer, names).values()) == expected
