"""What limits a training step: its floating-point operations and its memory traffic, against what the device reaches.

Shapes: B sets, S cells a set, G genes, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sest.head.model import StateTransition, n_parameters

PASSES_OVER_CELLS = 12  # reads and writes of a (B, S, G) float32 tensor a step: densify, ReLU, loss and their backward
BYTES_A_PARAMETER = 28  # AdamW reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Limit:
    """The cost of a step and the speed of the device, measured alone."""

    flops: float  # of an optimizer step
    bytes: float  # read and written by it, at least
    flops_per_s: float  # of a matrix product in the step's precision
    bytes_per_s: float  # of copying, reads and writes together

    @property
    def seconds(self) -> float:
        """Of a step that does nothing but compute, or nothing but move numbers, whichever takes longer."""
        return max(self.flops / self.flops_per_s, self.bytes / self.bytes_per_s)

    @property
    def it_per_s(self) -> float:
        return 1.0 / self.seconds

    @property
    def limited_by(self) -> str:
        """ "compute" or "memory"."""
        return "compute" if self.flops / self.flops_per_s >= self.bytes / self.bytes_per_s else "memory"


def step_cost(model: StateTransition, n_sets: int, set_size: int) -> tuple[float, float]:
    """FLOPs and bytes of an optimizer step over `n_sets` sets: forward, backward (twice as much), loss, AdamW.

    A product of (n, k) and (k, m) counts 2 n k m. The perturbation is encoded once a set; the energy distance takes
    three Gram matrices and two products of its gradient, 10 S^2 G a set.
    """
    sizes = model.sizes
    per_cell = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "pert_encoder" not in name)
    per_set = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "pert_encoder" in name)
    n_cells = n_sets * set_size
    attention = sizes.n_layers * 4 * set_size * sizes.hidden * n_cells
    flops = 3 * (2 * per_cell * n_cells + 2 * per_set * n_sets + attention)
    flops += n_sets * 10 * set_size**2 * sizes.n_genes
    moved = PASSES_OVER_CELLS * 4 * n_cells * sizes.n_genes + BYTES_A_PARAMETER * n_parameters(model)
    return float(flops), float(moved)


def measure_limit(
    model: StateTransition, n_sets: int, set_size: int, dtype: torch.dtype, *, seconds: float = 0.05
) -> Limit:
    """The limit on the device where the model lies; its speed is the best of about `seconds` of trying."""
    device = next(model.parameters()).device
    speeds = _device_speed(device, dtype, seconds)
    if device.type == "cuda":  # the half gigabyte that this took is no memory of the training
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return Limit(*step_cost(model, n_sets, set_size), *speeds)


def _device_speed(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[float, float]:
    """FLOPs a second of a matrix product, and bytes a second of copying."""
    is_gpu = device.type == "cuda"
    n = 4096 if is_gpu else 512
    a = torch.ones(n, n, device=device, dtype=dtype)
    source = torch.ones(2**26 if is_gpu else 2**24, device=device)
    out = torch.empty_like(source)
    return (
        2 * n**3 / _shortest(lambda: torch.mm(a, a), device, seconds),
        2 * source.nbytes / _shortest(lambda: out.copy_(source), device, seconds),
    )


def _shortest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time of one call, in seconds."""

    def timed() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()  # the first call sets things up
    times = [timed()]
    # the best of some, as other programs run too; few where one takes long (halves on a CPU without units for them)
    while sum(times) < seconds or (len(times) < 5 and sum(times) < 4 * seconds):
        times.append(timed())
    return min(times)
