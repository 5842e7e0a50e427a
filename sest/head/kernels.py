"""Operations of a step and of the encoder that are one kernel each on a GPU: in Triton, else in PyTorch's operations.

Each is an operator of PyTorch: a trace sees one operation. Triton comes with PyTorch for GPUs and needs a C compiler
once; where it does not work, that is said and the numbers are the same.

Shapes: B sets, S cells a set, n cells, G genes, D width of a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sest.head.mix import mix32

logger = logging.getLogger(__name__)

HASHES = 2**31  # of `kept_units`
_SMALL_SUM = ((60, (2, 3, 10)), (60, (2, 3, 10)), (6, (2, 3, 1)), (20, (2, 1, 10)), (6, (2, 3, 1)), (2, (2, 1, 1)))
_Result = TypeVar("_Result")


def operator_or(
    plain: Callable[..., _Result], operator: Callable[..., _Result], device: torch.device
) -> Callable[..., _Result]:
    """PyTorch's operations on a CPU and in a compiled network, which makes kernels of its own; else the operator.

    To call an operator costs a CPU more than its kernel, and the first call 2 s, in which the compiler is imported.
    """
    return plain if device.type == "cpu" or torch.compiler.is_compiling() else operator


@torch.library.custom_op("sest::set_keys", mutates_args=())
def set_keys(number: Tensor, of_seed: int) -> Tensor:
    """Hash of a seed (32 bits) and the numbers of sets: (B,) int64 -> (B,) int32."""
    kernels = triton_kernels(number.device)
    return plain_set_keys(number, of_seed) if kernels is None else kernels.set_keys(number, of_seed)


@set_keys.register_fake
def _(number: Tensor, of_seed: int) -> Tensor:
    return torch.empty_like(number, dtype=torch.int32)


def plain_set_keys(number: Tensor, of_seed: int) -> Tensor:
    """`set_keys` in PyTorch's operations."""
    return mix32(mix32(number.to(torch.int32)) ^ of_seed)


@torch.library.custom_op("sest::kept_units", mutates_args=())
def kept_units(keys: Tensor, first: int, n_layers: int, n_places: int, least: int) -> Tensor:
    """Where a hash of (key, layer, place), 0 .. `HASHES` - 1, is at least `least`: (layers, B, places) bool.

    Args:
        keys: (B,) int32.
        first: number of the first layer; the others follow it.
        least: below `HASHES`.
    """
    kernels = triton_kernels(keys.device)
    hashed = plain_kept_units if kernels is None else kernels.kept_units
    return hashed(keys, first, n_layers, n_places, least)


@kept_units.register_fake
def _(keys: Tensor, first: int, n_layers: int, n_places: int, least: int) -> Tensor:
    return keys.new_empty(n_layers, len(keys), n_places, dtype=torch.bool)


def plain_kept_units(keys: Tensor, first: int, n_layers: int, n_places: int, least: int) -> Tensor:
    """`kept_units` in PyTorch's operations, which `torch.compile` makes a part of the kernels around them."""
    numbers = torch.arange(first, first + n_layers, dtype=torch.int32, device=keys.device)
    of_layer = mix32(keys + (numbers * 0x3C6EF372).unsqueeze(1))  # (layers, B)
    places = torch.arange(n_places, dtype=torch.int32, device=keys.device)
    return mix32(places ^ of_layer.unsqueeze(2)).bitwise_and_(HASHES - 1) >= least


@torch.library.custom_op("sest::dense_rows", mutates_args=())
def dense_rows(
    begin: Tensor, length: Tensor, factor: Tensor, indices: Tensor, data: Tensor, n_genes: int, n_values: int
) -> Tensor:
    """Cells among stored values as dense log1p values, (n, G) float32.

    The formula of `sest.cells.scale.log1p_rows`, against which tests/data hold it.

    Args:
        begin, length: (n,) int64: where the values of each cell begin, and how many it has.
        factor: (n,) float32 that counts are multiplied with; 0: the values are log1p already.
        indices: (nnz,) int32 genes, or int16 that holds uint16.
        data: (nnz,) values.
        n_values: of all n cells, so that sizes are known without asking the device.
    """
    kernels = triton_kernels(data.device)
    dense = plain_dense_rows if kernels is None else kernels.dense_rows
    return dense(begin, length, factor, indices, data, n_genes, n_values)


@dense_rows.register_fake
def _(
    begin: Tensor, length: Tensor, factor: Tensor, indices: Tensor, data: Tensor, n_genes: int, n_values: int
) -> Tensor:
    return factor.new_empty(len(begin), n_genes)


def plain_dense_rows(
    begin: Tensor, length: Tensor, factor: Tensor, indices: Tensor, data: Tensor, n_genes: int, n_values: int
) -> Tensor:
    """`dense_rows` in PyTorch's operations."""
    row = torch.repeat_interleave(length, output_size=n_values)  # of each value
    ahead = begin - (length.cumsum(0) - length)  # how much further on a cell's values stand there than here
    at = torch.arange(n_values, device=data.device).add_(ahead[row])
    place = indices[at].long()
    if indices.dtype == torch.int16 and n_genes > 2**15:
        place &= 0xFFFF
    place.add_(row, alpha=n_genes)
    values, scale = data[at].float(), factor[row]
    dense = torch.zeros(len(length) * n_genes, device=data.device)
    dense[place] = torch.where(scale > 0, (values * scale).log1p_(), values)
    return dense.view(len(length), n_genes)


@torch.library.custom_op("sest::weighted_sum", mutates_args=())
def weighted_sum(
    sum: Tensor, x: Tensor, of_x: Tensor, shift: Tensor, of_shift: Tensor, unit: Tensor, dtype: torch.dtype
) -> Tensor:
    """unit * (sum + of_x * x + of_shift * shift), computed in float32 and rounded once: (B, S, G) in `dtype`.

    Args:
        sum: (B, S, G) float32.
        x: (B, S, G) in any type; its genes lie beside each other.
        of_x, of_shift: (B, S, 1) float32.
        shift: (B, 1, G) float32.
        unit: (B, 1, 1) float32.
    """
    kernels = triton_kernels(sum.device)
    add = plain_weighted_sum if kernels is None else kernels.weighted_sum
    return add(sum, x, of_x, shift, of_shift, unit, dtype)


@weighted_sum.register_fake
def _(
    sum: Tensor, x: Tensor, of_x: Tensor, shift: Tensor, of_shift: Tensor, unit: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(sum, dtype=dtype)


def plain_weighted_sum(
    sum: Tensor, x: Tensor, of_x: Tensor, shift: Tensor, of_shift: Tensor, unit: Tensor, dtype: torch.dtype
) -> Tensor:
    """`weighted_sum` in PyTorch's operations."""
    return (torch.addcmul(sum, x, of_x).addcmul_(of_shift, shift) * unit).to(dtype)


@torch.library.custom_op("sest::centre_and_largest", mutates_args=())
def centre_and_largest(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the cells of each set and largest magnitudes of each: (B, S, G) -> (B, 1, G), (B,), both float32.

    In one pass. Where a number is NaN its gene's mean is, and the largest may leave it out.
    """
    kernels = triton_kernels(cells.device)
    return plain_centre_and_largest(cells) if kernels is None else kernels.centre_and_largest(cells)


@centre_and_largest.register_fake
def _(cells: Tensor) -> tuple[Tensor, Tensor]:
    n_sets, _, n_genes = cells.shape
    return cells.new_empty(n_sets, 1, n_genes, dtype=torch.float32), cells.new_empty(n_sets, dtype=torch.float32)


def plain_centre_and_largest(cells: Tensor) -> tuple[Tensor, Tensor]:
    """`centre_and_largest` in PyTorch's operations."""
    largest = torch.linalg.vector_norm(cells, torch.inf, dim=(1, 2)).float()
    return cells.mean(1, keepdim=True, dtype=torch.float32), largest


@torch.library.custom_op("sest::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape and type, computed in float32 and rounded once."""
    kernels = triton_kernels(gate.device)
    return plain_swiglu(gate, up) if kernels is None else kernels.swiglu(gate, up)


@torch.library.custom_op("sest::swiglu_backward", mutates_args=())
def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` for gate and up; silu(gate) is computed again, as to read it would take longer."""
    kernels = triton_kernels(gate.device)
    back = plain_swiglu_backward if kernels is None else kernels.swiglu_backward
    return back(gradient, gate, up)


swiglu.register_fake(lambda gate, up: torch.empty_like(gate))
swiglu_backward.register_fake(lambda gradient, gate, up: (torch.empty_like(gate), torch.empty_like(up)))
swiglu.register_autograd(
    lambda ctx, gradient: swiglu_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in PyTorch's operations, each of which rounds."""
    return F.silu(gate) * up


def plain_swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_backward` in PyTorch's operations."""
    return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


@torch.library.custom_op("sest::add_norm", mutates_args=("x",))
def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm of x + y over the last axis, (..., D), computed in float32 and rounded once; uses up x."""
    kernels = triton_kernels(x.device)
    norm = plain_add_norm if kernels is None else kernels.add_norm
    return norm(x, y, weight, bias, epsilon)


@add_norm.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return torch.empty_like(x)


def plain_add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`add_norm` in PyTorch's operations, which round x + y too."""
    return F.layer_norm(x.add_(y), x.shape[-1:], weight, bias, epsilon)


def triton_kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels for a GPU where they work, else None; what stands in their way is said once."""
    return _working_kernels() if device.type == "cuda" else None


@cache
def _working_kernels() -> ModuleType | None:
    try:
        from sest.head import triton_kernels as kernels

        _check(kernels, torch.device("cuda"))
    except Exception as error:  # noqa: BLE001  Triton, the compiler and the driver raise what they like
        said = (str(error) or type(error).__name__).splitlines()[0]
        logger.info(f"Triton does not work here, so more kernels are started than it would take ({said}).")
        return None
    return kernels


def _check(kernels: ModuleType, device: torch.device) -> None:
    """Compare every kernel with PyTorch's operations on a few numbers, which also compiles it.

    Raises:
        ArithmeticError: other numbers.
    """
    number = torch.tensor([0, 5, 2**31 + 7], device=device)
    keys = plain_set_keys(number, -3)
    places = (2, 3, 1500, HASHES // 10)
    rows = [torch.tensor([3, 0, 2]), torch.tensor([4, 0, 2]), torch.tensor([0.25, 2.0, 0.0])]
    values = [torch.tensor([7, 7, 0, -1, 1, 2, 3]).to(torch.int16), torch.tensor([9, 9, 1, 2, 0, 3, 4000]).short()]
    cells: Any = (*(tensor.to(device) for tensor in (*rows, *values)), 2**16, 6)
    of_sets: Any = (*(torch.linspace(-2, 3, n, device=device).view(shape) for n, shape in _SMALL_SUM), torch.float32)
    of_cells = torch.linspace(-2, 9, 60, device=device).view(2, 3, 10)
    x, y, of_norm = torch.linspace(0, 99, 1010, device=device).sin().view(10, 101).split((4, 4, 2))
    norm: Any = (y, *of_norm, 1e-5)
    gates: Any = tuple(torch.linspace(-9, 9, 60, device=device) * factor for factor in (0.1, 1.0, -0.3))
    same = (
        torch.equal(kernels.set_keys(number, -3), keys),
        torch.equal(kernels.kept_units(keys, *places), plain_kept_units(keys, *places)),
        torch.allclose(kernels.weighted_sum(*of_sets), plain_weighted_sum(*of_sets)),
        torch.allclose(kernels.dense_rows(*cells), plain_dense_rows(*cells), rtol=1e-6),  # float32
        *map(torch.allclose, kernels.centre_and_largest(of_cells), plain_centre_and_largest(of_cells)),
        torch.allclose(kernels.add_norm(x.clone(), *norm), plain_add_norm(x, *norm), atol=1e-5),
        torch.allclose(kernels.swiglu(*gates[1:]), plain_swiglu(*gates[1:]), atol=1e-6),
        *(
            torch.allclose(ours, theirs, atol=1e-6)
            for ours, theirs in zip(kernels.swiglu_backward(*gates), plain_swiglu_backward(*gates), strict=True)
        ),
    )
    if not all(same):
        raise ArithmeticError("it computes other numbers than PyTorch")
