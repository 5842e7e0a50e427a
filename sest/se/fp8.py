"""Matrix products of 8-bit floats (float8_e4m3fn): weights rounded once, activations row by row as they come.

Every row has a scale of its own, so that a cell's result depends on no other cell of its batch. Accuracy: 3 bits of
mantissa, so 2**-4 of each number at most; products are summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8_e4m3fn, which has no infinity


@dataclass(frozen=True)
class Fp8Matrix:
    """Rows of 8-bit floats."""

    values: Tensor  # (N, K) float8_e4m3fn
    scales: Tensor  # (N, 1) float32; a row is values x scale

    @classmethod
    def of(cls, x: Tensor) -> Fp8Matrix:
        """Round (N, K) floats to the nearest; a row's largest becomes 448."""
        largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        scales = largest.clamp_min_(1e-12).div_(LARGEST)
        return cls((x / scales).to(FP8), scales)

    def part(self, rows: slice) -> Fp8Matrix:
        """Some of the rows."""
        return Fp8Matrix(self.values[rows], self.scales[rows])


def linear(x: Tensor, weight: Fp8Matrix, bias: Tensor) -> Tensor:
    """`F.linear` in 8 bits: (..., K) bfloat16 -> (..., N) bfloat16.

    Raises:
        RuntimeError: what torch raises where a device or a size is not supported.
    """
    rows = Fp8Matrix.of(x.flatten(0, -2))
    product = torch._scaled_mm(
        rows.values, weight.values.t(), rows.scales, weight.scales.t(), bias=bias, out_dtype=torch.bfloat16
    )
    return product.view(*x.shape[:-1], -1)
