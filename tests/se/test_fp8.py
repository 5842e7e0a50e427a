"""Against products of the rounded numbers in float64. torch computes these products on a CPU too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sest.se.fp8 import Fp8Matrix, linear


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read(matrix: Fp8Matrix) -> torch.Tensor:
    """The numbers a matrix stands for, float64."""
    return matrix.values.double() * matrix.scales.double()


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_every_number_is_rounded_by_a_sixteenth_of_itself_at_most(spread: float) -> None:
    x = spread * normal(50, 64)
    x[3] = 0
    x[4] *= 1e4  # a row of its own size
    error = (read(Fp8Matrix.of(x)) - x.double()).abs()
    smallest = x.double().abs().amax(1, keepdim=True) / 448 * 2**-10  # half the step of the smallest fp8 numbers
    assert (error <= torch.maximum(x.double().abs() / 16, smallest) * (1 + 1e-6)).all()
    assert (read(Fp8Matrix.of(x))[3] == 0).all()


def test_products_equal_those_of_the_rounded_numbers() -> None:
    x, weight, bias = normal(2, 9, 64).bfloat16(), normal(48, 64, seed=1) / 8, normal(48, seed=2).bfloat16()
    matrix = Fp8Matrix.of(weight)
    found = linear(x, matrix, bias)
    expected = read(Fp8Matrix.of(x.flatten(0, 1))) @ read(matrix).T + bias.double()
    assert found.shape == (2, 9, 48) and found.dtype == torch.bfloat16
    # the sum and the sum with the bias are each rounded to bfloat16, 2**-9 of numbers up to 5
    torch.testing.assert_close(found.double(), expected.view(2, 9, 48), rtol=2**-8, atol=0.02)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert F.cosine_similarity(found.double().flatten(), exact.flatten(), dim=0) > 0.999


def test_a_part_of_a_matrix_gives_those_columns_and_a_row_depends_on_no_other() -> None:
    x, bias = normal(32, 64).bfloat16(), normal(48, seed=2).bfloat16()
    matrix = Fp8Matrix.of(normal(48, 64, seed=1))
    whole = linear(x, matrix, bias)
    torch.testing.assert_close(linear(x, matrix.part(slice(16, None)), bias[16:]), whole[:, 16:], rtol=0, atol=0)
    x[1:] *= 100
    torch.testing.assert_close(linear(x, matrix, bias)[0], whole[0], rtol=0, atol=0)
