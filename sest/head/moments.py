"""AdamW's state by the names of parameters, as checkpoints keep it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as "<kind>/<parameter name>" tensors; names in the order of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{kind}/{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def new_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give a new AdamW the state that its first step would make: zeros for all that trains."""
    if optimizer.state:
        return
    state = {
        parameter: {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    }
    optimizer.state.update(state)  # all of it or none, where memory runs out


def bytes_of_optimizer(parameters: Iterable[nn.Parameter], *, averaged: bool) -> int:
    """Bytes of `optimizer_to_tensors` from the first step on: of what trains two moments and a float32 step.

    Args:
        averaged: whether it also has an average of every parameter (see `sest.head.average`).
    """
    trained = [(p.nbytes, p.requires_grad) for p in parameters]
    return sum((2 * n + 4 if trains else 0) + (n if averaged else 0) for n, trains in trained)


def tensors_to_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Put `optimizer_to_tensors` back, on each parameter's device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = {k.split("/", 1)[0]: v for k, v in tensors.items() if k.split("/", 1)[1] == name}
        optimizer.state[parameter] = {kind: value.to(parameter.device).clone() for kind, value in state.items()}
