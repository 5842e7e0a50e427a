"""The moving average of the weights: the formula, step by step; and that the weights themselves come back."""

from __future__ import annotations

import pytest
import torch

from sest.head.adamw import AdamW
from sest.head.average import EMA, WeightAverage


def trained(n_steps: int, decay: float) -> tuple[torch.nn.Linear, WeightAverage, AdamW, list[float]]:
    """A line trained for some steps; its first weight after each."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), 0.1, 0.01)
    average, seen = WeightAverage(model, optimizer, decay), []
    for step in range(1, n_steps + 1):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        seen.append(float(model.weight[0, 0].detach()))
    return model, average, optimizer, seen


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_that_of_the_formula(decay: float) -> None:
    model, average, _, seen = trained(20, decay)
    by_hand = seen[0]
    for step, weight in enumerate(seen[1:], 2):
        d = min(decay, (1 + step) / (10 + step))
        by_hand = d * by_hand + (1 - d) * weight
    with average.in_place():
        assert float(model.weight[0, 0].detach()) == pytest.approx(by_hand, abs=1e-6)  # float32 against float64


@pytest.mark.filterwarnings("ignore:the .type, exc, tb. signature of throw")  # torch's no_grad on a generator
def test_the_weights_come_back_in_the_same_memory_whatever_happens_inside() -> None:
    model, average, _, seen = trained(5, 0.9)
    place = model.weight.data_ptr()

    def fail_inside() -> None:
        with average.in_place():
            assert model.weight.data_ptr() == place and float(model.weight[0, 0].detach()) != seen[-1]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert float(model.weight[0, 0].detach()) == seen[-1] and model.weight.data_ptr() == place


def test_it_stands_in_the_optimizers_state_which_goes_on_as_without_it() -> None:
    model, _, optimizer, seen = trained(5, 0.9)
    assert all(optimizer.state[weight][EMA].shape == weight.shape for weight in model.parameters())
    torch.manual_seed(0)
    other = torch.nn.Linear(3, 2)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    for _ in range(5):
        other(torch.randn(4, 3)).square().sum().backward()
        plain.step()
        plain.zero_grad()
    assert float(other.weight[0, 0].detach()) == seen[-1]
