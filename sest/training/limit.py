"""What limits a training step: its floating-point operations, its memory traffic and the operations that it starts,
against what the device reaches.

Shapes: B sets, S cells a set, G genes, H hidden width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from sest.head.model import HeadSizes, StateTransition, n_parameters
from sest.machine.devices import DTYPES, float32_products

PASSES_OVER_CELLS = 12  # reads and writes of a (B, S, G) float32 tensor a step: densify, ReLU, loss and their backward
BYTES_A_PARAMETER = 28  # AdamW reads weight, gradient and two moments, and writes all but the gradient
# Operations of a step that is not compiled, in a half; benchmarks/step_ops.py counts them: of a layer of the backbone,
# of a linear layer of an MLP, and of all else, once a forward pass
LAUNCHES_A_LAYER, LAUNCHES_A_LINEAR, LAUNCHES_A_PASS = 60, 12, 148
# Bytes that these operations read and write on a GPU, in a half and in float32, fitted to the same counts within 5%:
# of a cell and gene; cell, layer and hidden number; cell, layer and inner number; cell, linear layer and hidden number;
# parameter
OPERATION_BYTES = {2: (69, 150, 38, 55, 54), 4: (114, 405, 77, 73, 47)}


@dataclass(frozen=True)
class Limit:
    """The cost of a step and the speed of the device, measured alone."""

    flops: float  # of an optimizer step
    bytes: float  # read and written by it: by each of its operations, or at least
    flops_per_s: float  # of a matrix product in the step's precision
    bytes_per_s: float  # of copying, reads and writes together
    launches: float = 0.0  # operations that the host starts, one by one; a compiled step has few
    seconds_a_launch: float = 0.0

    @property
    def _seconds(self) -> dict[str, float]:
        return {
            "compute": self.flops / self.flops_per_s,
            "memory": self.bytes / self.bytes_per_s,
            "launches": self.launches * self.seconds_a_launch,
        }

    @property
    def seconds(self) -> float:
        """Of a step that does nothing but compute, move numbers, or start operations, whichever takes longest."""
        return max(self._seconds.values())

    @property
    def it_per_s(self) -> float:
        return 1.0 / self.seconds

    @property
    def limited_by(self) -> str:
        """ "compute", "memory" or "launches"."""
        return max(self._seconds, key=lambda name: self._seconds[name])


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


def operation_bytes(sizes: HeadSizes, n_parameters: int, n_sets: int, set_size: int, itemsize: int) -> float:
    """Bytes that the operations of a step on a GPU read and write, where each reads and writes for itself.

    Args:
        itemsize: bytes of a number in the products.
    """
    a_gene, a_hidden, an_inner, a_linear, a_parameter = OPERATION_BYTES[itemsize]
    linear = sizes.n_encoder_layers + sizes.n_decoder_layers
    a_cell = a_gene * sizes.n_genes + sizes.hidden * (a_hidden * sizes.n_layers + a_linear * linear)
    a_cell += an_inner * sizes.n_layers * sizes.ffn
    return float(n_sets * set_size * a_cell + a_parameter * n_parameters)


def step_launches(sizes: HeadSizes) -> int:
    """Operations of a step of one forward pass that is not compiled."""
    linear = 2 * sizes.n_encoder_layers + sizes.n_decoder_layers
    return LAUNCHES_A_LAYER * sizes.n_layers + LAUNCHES_A_LINEAR * linear + LAUNCHES_A_PASS


def measure_limit(
    model: StateTransition,
    n_sets: int,
    set_size: int,
    precision: str,
    *,
    passes: int = 1,
    compiled: bool = False,
    seconds: float = 0.05,
) -> Limit:
    """The limit on the device where the model lies; its speed is the best of about `seconds` of trying, once a process.

    Each operation of a step on a GPU reads and writes its numbers in memory. Compiled ones share passes, and those of a
    CPU its caches: there it is the least that any step moves.

    Args:
        n_sets: of an optimizer step, in all of its forward passes.
        passes: forward passes of an optimizer step.
        compiled: whether its operations are started together.
    """
    device = next(model.parameters()).device
    flops_per_s, bytes_per_s, a_launch = _device_speed(device, precision, seconds)
    if device.type == "cuda":  # the half gigabyte that this took is no memory of the training
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    flops, moved = step_cost(model, n_sets, set_size)
    launches = 0 if compiled else passes * step_launches(model.sizes)
    if device.type == "cuda" and not compiled:
        itemsize = DTYPES[precision].itemsize
        moved = max(moved, operation_bytes(model.sizes, n_parameters(model), n_sets, set_size, itemsize))
    return Limit(flops, moved, flops_per_s, bytes_per_s, launches, a_launch)


@cache
def _device_speed(device: torch.device, precision: str, seconds: float) -> tuple[float, float, float]:
    """FLOPs a second of a matrix product, bytes a second of copying, and seconds of the smallest operation.

    Measured once a process: runs of several seeds are trained on one device.
    """
    is_gpu = device.type == "cuda"
    n, n_launches = 4096 if is_gpu else 512, 200
    a = torch.ones(n, n, device=device, dtype=DTYPES[precision])
    source = torch.ones(2**26 if is_gpu else 2**22, device=device)
    out, one = torch.empty_like(source), torch.ones(1, device=device)
    with float32_products(precision):
        flops = 2 * n**3 / _shortest(lambda: torch.mm(a, a), device, seconds)
    return (
        flops,
        2 * source.nbytes / _shortest(lambda: out.copy_(source), device, seconds),
        _shortest(lambda: [one.add_(1.0) for _ in range(n_launches)], device, seconds / 5) / n_launches,
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
