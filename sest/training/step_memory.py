"""How many sets a step has memory for (`--batch-size auto`), by trying on zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sest.errors import InputError
from sest.head.model import HeadSizes
from sest.machine.memory import SHARE, available_bytes

LARGEST_BATCH = 64  # sets: beyond it a step gets no faster by the cell, and learning would want another rate
BYTES_A_PARAMETER = 14  # gradient and both moments of AdamW in float32, and autocast's copy in a half


def bytes_of_set(
    model: nn.Module,
    sizes: HeadSizes,
    set_size: int,
    criterion: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], Any],
) -> int:
    """Bytes that a set adds to a step: what autograd keeps for it, and the predicted and observed cells.

    Measured on zeros, as what two sets take more than one; leaves weights and gradients alone.
    """
    wide = set_size * sizes.n_genes * 4
    one, two = (_bytes_kept(model, sizes, n, set_size, criterion, autocast) for n in (1, 2))
    return two - one + 4 * wide  # target, gradient of the prediction, and the loss's centred copies


def _bytes_kept(
    model: nn.Module,
    sizes: HeadSizes,
    n_sets: int,
    set_size: int,
    criterion: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], Any],
) -> int:
    """Bytes that autograd keeps for a forward pass, beside the weights."""
    device = next(model.parameters()).device
    cells = _zeros(sizes, n_sets, set_size, device)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _loss(model, cells, criterion, autocast)
    return sum(kept.values())


def _zeros(sizes: HeadSizes, n_sets: int, set_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Controls, features, keys of dropout and targets of a batch."""
    return (
        torch.zeros(n_sets, set_size, sizes.dim, device=device),
        torch.zeros(n_sets, sizes.n_features, device=device),
        torch.zeros(n_sets, dtype=torch.int32, device=device),
        torch.zeros(n_sets, set_size, sizes.n_genes, device=device),
    )


def _loss(
    model: nn.Module,
    cells: tuple[Tensor, ...],
    criterion: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], Any],
) -> Tensor:
    with autocast():
        predicted = model(*cells[:-1])
    return criterion(predicted, cells[-1]).sum()


def largest_batch(
    model: nn.Module,
    sizes: HeadSizes,
    set_size: int,
    criterion: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], Any],
) -> int:
    """The largest power of two of sets, at most LARGEST_BATCH, that fits the free memory beside gradients and moments.

    Raises:
        InputError: not even one fits.
    """
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    fixed = BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())
    one = bytes_of_set(model, sizes, set_size, criterion, autocast)
    room = SHARE * free - fixed
    if one > room:
        raise InputError(
            f"A set of {set_size} cells takes {one / 1e9:.1f} GB beside {fixed / 1e9:.1f} GB of gradients and moments; "
            f"{free / 1e9:.1f} GB are free. Use a smaller --set-size or --hidden."
        )
    batch = 1
    while batch < LARGEST_BATCH and 2 * batch * one <= room:
        batch *= 2
    return batch
