"""GPU kernels of `sest.head.kernels`, in Triton; what each computes is written there.

Imported only where a GPU is used: PyTorch brings Triton for GPUs alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # numbers that a program takes at a time
_ROWS, _GENES = 8, 256  # of a set that a program takes at a time


@triton.jit
def _mix32(x):  # type: ignore[no-untyped-def]
    """`sest.head.mix.mix32`, of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _set_keys(number, key, of_seed, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(number + i, mask=i < n, other=0).to(tl.int32).to(tl.uint32, bitcast=True)
    x = (_mix32(x).to(tl.int32, bitcast=True) ^ of_seed).to(tl.uint32, bitcast=True)
    tl.store(key + i, _mix32(x).to(tl.int32, bitcast=True), mask=i < n)


@triton.jit
def _kept_units(key, kept, first, n_sets, n_places, least, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    of, part = tl.program_id(0), tl.program_id(1)  # a set of a layer, and a part of its places
    layer, place = first + of // n_sets, part * BLOCK + tl.arange(0, BLOCK)
    number = layer.to(tl.uint32, bitcast=True) * 0x3C6EF372
    hashed = _mix32(tl.load(key + of % n_sets).to(tl.uint32, bitcast=True) + number)
    hashed = _mix32(place.to(tl.uint32, bitcast=True) ^ hashed) & 0x7FFFFFFF
    tl.store(kept + of.to(tl.int64) * n_places + place, hashed.to(tl.int64) >= least, mask=place < n_places)


@triton.jit
def _dense_rows(begin, length, factor, indices, data, dense, n_genes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    first, n, scale = tl.load(begin + row), tl.load(length + row), tl.load(factor + row)
    for at in range(0, n, BLOCK):
        k = at + tl.arange(0, BLOCK)
        gene = tl.load(indices + first + k, mask=k < n, other=0).to(tl.int32)
        if indices.dtype.element_ty == tl.int16:  # which holds uint16
            gene &= 0xFFFF
        value = tl.load(data + first + k, mask=k < n, other=0).to(tl.float32)
        x = value * scale
        above = 1.0 + x  # log1p(x) = x log(1 + x) / ((1 + x) - 1), whose roundings cancel (Higham 2002, section 1.14.1)
        rest = above - 1.0
        logged = tl.where(rest == 0.0, x, tl.log(above) * (x / tl.where(rest == 0.0, 1.0, rest)))
        to = dense + row.to(tl.int64) * n_genes + gene
        tl.store(to, tl.where(scale > 0, logged, value), mask=(k < n) & (gene >= 0) & (gene < n_genes))


@triton.jit
def _weighted_sum(  # type: ignore[no-untyped-def]
    total, x, of_x, shift, of_shift, unit, out, n_cells, n_genes, set_stride, row_stride, BLOCK: tl.constexpr
):
    row, gene = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of, cell, here = row // n_cells, row % n_cells, gene < n_genes
    place = row.to(tl.int64) * n_genes + gene
    there = x + of.to(tl.int64) * set_stride + cell.to(tl.int64) * row_stride + gene
    value = tl.load(total + place, mask=here, other=0.0)
    value += tl.load(there, mask=here, other=0.0).to(tl.float32) * tl.load(of_x + row)
    value += tl.load(shift + of.to(tl.int64) * n_genes + gene, mask=here, other=0.0) * tl.load(of_shift + row)
    tl.store(out + place, (value * tl.load(unit + of)).to(out.dtype.element_ty), mask=here)


@triton.jit
def _plus(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def _larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b)


@triton.jit
def _centre_and_largest(  # type: ignore[no-untyped-def]
    cells, centre, largest, n_cells, n_genes, ROWS: tl.constexpr, GENES: tl.constexpr
):
    of, part = tl.program_id(0), tl.program_id(1)
    gene, row = part * GENES + tl.arange(0, GENES), tl.arange(0, ROWS)
    total = tl.full([ROWS, GENES], 0.0, tl.float32)
    most = total
    for first in range(0, n_cells, ROWS):
        cell = first + row
        place = (of.to(tl.int64) * n_cells + cell[:, None]) * n_genes + gene[None, :]
        here = (cell[:, None] < n_cells) & (gene[None, :] < n_genes)
        value = tl.load(cells + place, mask=here, other=0.0).to(tl.float32)
        total += value
        most = tl.maximum(most, tl.abs(value))
    tl.store(centre + of.to(tl.int64) * n_genes + gene, tl.reduce(total, 0, _plus) / n_cells, mask=gene < n_genes)
    tl.store(largest + of * tl.num_programs(1) + part, tl.reduce(tl.reduce(most, 0, _larger), 0, _larger))


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    small = tl.exp(-tl.abs(x))  # which does not overflow
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def _swiglu(gate, up, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i, (x * _sigmoid(x) * y).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def _swiglu_backward(gradient, gate, up, of_gate, of_up, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
    slope = tl.load(gradient + i, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    share = _sigmoid(x)
    to_gate = slope * y * share * (1.0 + x * (1.0 - share))
    tl.store(of_gate + i, to_gate.to(of_gate.dtype.element_ty), mask=i < n)
    tl.store(of_up + i, (slope * x * share).to(of_up.dtype.element_ty), mask=i < n)


@triton.jit
def _add_norm(x, y, weight, bias, out, n, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    first, i = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BLOCK)
    here = i < n
    value = tl.load(x + first + i, mask=here, other=0.0).to(tl.float32)
    value += tl.load(y + first + i, mask=here, other=0.0).to(tl.float32)
    value = tl.where(here, value - tl.reduce(value, 0, _plus) / n, 0.0)
    value *= 1.0 / tl.sqrt(tl.reduce(value * value, 0, _plus) / n + epsilon)
    value *= tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    value += tl.load(bias + i, mask=here, other=0.0).to(tl.float32)
    tl.store(out + first + i, value.to(out.dtype.element_ty), mask=here)


def set_keys(number: Tensor, of_seed: int) -> Tensor:
    keys, n = torch.empty_like(number, dtype=torch.int32), number.numel()
    with torch.cuda.device_of(number):
        _set_keys[(triton.cdiv(n, _BLOCK),)](number, keys, of_seed, n, BLOCK=_BLOCK)
    return keys


def kept_units(keys: Tensor, first: int, n_layers: int, n_places: int, least: int) -> Tensor:
    kept = torch.empty(n_layers, len(keys), n_places, dtype=torch.bool, device=keys.device)
    grid = (n_layers * len(keys), triton.cdiv(n_places, _BLOCK))
    with torch.cuda.device_of(keys):
        _kept_units[grid](keys, kept, first, len(keys), n_places, least, BLOCK=_BLOCK)
    return kept


def dense_rows(
    begin: Tensor, length: Tensor, factor: Tensor, indices: Tensor, data: Tensor, n_genes: int, n_values: int
) -> Tensor:
    dense = torch.zeros(len(begin), n_genes, device=data.device)
    if len(begin):
        with torch.cuda.device_of(data):
            _dense_rows[(len(begin),)](begin, length, factor, indices, data, dense, n_genes, BLOCK=_BLOCK)
    return dense


def weighted_sum(
    sum: Tensor, x: Tensor, of_x: Tensor, shift: Tensor, of_shift: Tensor, unit: Tensor, dtype: torch.dtype
) -> Tensor:
    (n_sets, n_cells, n_genes), out = sum.shape, torch.empty_like(sum, dtype=dtype)
    sum, of_x, shift, of_shift, unit = (tensor.contiguous() for tensor in (sum, of_x, shift, of_shift, unit))
    grid = (n_sets * n_cells, triton.cdiv(n_genes, _BLOCK))
    with torch.cuda.device_of(sum):
        _weighted_sum[grid](
            sum, x, of_x, shift, of_shift, unit, out, n_cells, n_genes, x.stride(0), x.stride(1), BLOCK=_BLOCK
        )
    return out


def centre_and_largest(cells: Tensor) -> tuple[Tensor, Tensor]:
    n_sets, n_cells, n_genes = cells.shape
    cells, parts = cells.contiguous(), triton.cdiv(n_genes, _GENES)
    centre = torch.empty(n_sets, 1, n_genes, device=cells.device)
    largest = torch.empty(n_sets, parts, device=cells.device)
    with torch.cuda.device_of(cells):
        _centre_and_largest[(n_sets, parts)](cells, centre, largest, n_cells, n_genes, ROWS=_ROWS, GENES=_GENES)
    return centre, largest.amax(1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out, n = torch.empty_like(gate), gate.numel()
    with torch.cuda.device_of(gate):
        _swiglu[(triton.cdiv(n, _BLOCK),)](gate, up, out, n, BLOCK=_BLOCK)
    return out


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gradient, gate, up = (tensor.contiguous() for tensor in (gradient, gate, up))
    of_gate, of_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    with torch.cuda.device_of(gate):
        _swiglu_backward[(triton.cdiv(n, _BLOCK),)](gradient, gate, up, of_gate, of_up, n, BLOCK=_BLOCK)
    return of_gate, of_up


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    out, n = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(n)  # a row a program
    warps = min(max(block // 512, 1), 16)
    with torch.cuda.device_of(x):
        _add_norm[(x.numel() // n,)](x, y, weight, bias, out, n, epsilon, BLOCK=block, num_warps=warps)
    return out
