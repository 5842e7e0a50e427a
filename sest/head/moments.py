"""AdamW's state by the names of parameters, as checkpoints keep it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def optimizer_to_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state as "<kind>/<parameter name>" tensors; names in the order of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{kind}/{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def tensors_to_optimizer(tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Put `optimizer_to_tensors` back, on each parameter's device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = {k.split("/", 1)[0]: v for k, v in tensors.items() if k.split("/", 1)[1] == name}
        optimizer.state[parameter] = {kind: value.to(parameter.device).clone() for kind, value in state.items()}
