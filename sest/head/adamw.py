"""AdamW (Loshchilov and Hutter, 2019) in PyTorch's fused kernel, and its state by name, as checkpoints keep it.

`torch.optim.AdamW` calls the same function, but imports PyTorch's compiler first: 2 s of every start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETAS, EPS = (0.9, 0.999), 1e-8  # PyTorch's defaults


class AdamW:
    """AdamW on the parameters that have gradients; weights and moments stay as they are where `found_inf` is 1.

    Has what `torch.amp.GradScaler` asks of an optimizer.
    """

    _step_supports_amp_scaling = True  # a scaler leaves the division of gradients, and bad steps, to the kernel
    grad_scale: Tensor | None = None  # what gradients are divided by; a scaler sets and deletes this and the next
    found_inf: Tensor | None = None  # float, 0 or 1

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]  # as GradScaler finds them
        self.lr, self.weight_decay = lr, weight_decay
        self.state = defaultdict[Tensor, dict[str, Tensor]](dict)  # empty until `new_moments`

    def new_moments(self) -> None:
        """Make the state that a first step needs: zeros for all that trains and has none."""
        made = {  # all of it or none, where memory runs out
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
            for parameter in self.parameters
            if parameter.requires_grad and "step" not in self.state.get(parameter, {})
        }
        for parameter, state in made.items():
            self.state[parameter] |= state

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters against their gradients."""
        moved: list[Tensor] = [p for p in self.parameters if p.grad is not None]
        states = [self.state[p] for p in moved]
        if not all("step" in state for state in states):
            self.new_moments()
        adamw(
            moved,
            [p.grad for p in moved if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def to_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """The state as "<kind>/<parameter name>" tensors; names in the order of the parameters."""
        return {
            f"{kind}/{name}": value
            for name, parameter in zip(names, self.parameters, strict=True)
            for kind, value in self.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor], names: list[str]) -> None:
        """Put `to_tensors` back, on each parameter's device."""
        for name, parameter in zip(names, self.parameters, strict=True):
            state = {k.split("/", 1)[0]: v for k, v in tensors.items() if k.split("/", 1)[1] == name}
            self.state[parameter] = {kind: value.to(parameter.device).clone() for kind, value in state.items()}


def bytes_of_state(parameters: Iterable[nn.Parameter], *, averaged: bool) -> int:
    """Bytes of `AdamW.to_tensors` from the first step on: of what trains two moments and a float32 step.

    Args:
        averaged: whether it also has an average of every parameter (see `sest.head.average`).
    """
    trained = [(p.nbytes, p.requires_grad) for p in parameters]
    return sum((2 * n + 4 if trains else 0) + (n if averaged else 0) for n, trains in trained)
