"""The Triton kernels, run by Triton's interpreter: each gives what PyTorch's own operations do."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from sest.head import kernels


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The Triton kernels, imported once more for the interpreter, which needs no GPU."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs; `make newest` installs it")
    path = Path(kernels.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
        spec.loader.exec_module(module)
        yield module


def csr(n_genes: int, dtype: torch.dtype) -> Any:
    """Cells in another order than their values, one empty, one longer than what a program takes at a time."""
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([1500, 0, 37, 5, 1024])
    begin = torch.tensor([100, 7, 1700, 3, 1800])
    genes = torch.cat([torch.randperm(n_genes, generator=generator)[:1600] for _ in range(2)])
    for first, n in zip(begin.tolist(), length.tolist(), strict=True):
        genes[first : first + n] = torch.randperm(n_genes, generator=generator)[:n]
    indices = genes.to(torch.int32) if n_genes > 2**16 else (genes - (genes > 2**15 - 1) * 2**16).to(torch.int16)
    values = torch.randint(1, 3000, (len(genes),), generator=generator).to(dtype)
    return begin, length, torch.tensor([0.1, 1.0, 0.0, 1e-4, 1e4]), indices, values, n_genes, int(length.sum())


@pytest.mark.parametrize("n_genes", [2_000, 40_000, 70_000])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_tritons_dense_rows_are_pytorchs(interpreted: ModuleType, n_genes: int, dtype: torch.dtype) -> None:
    rows = csr(n_genes, dtype)
    plain = kernels.plain_dense_rows(*rows)
    assert int((plain > 0).sum()) == int(rows[1].sum())
    # float32 rounding of a logarithm that is computed in another way
    torch.testing.assert_close(interpreted.dense_rows(*rows), plain, rtol=5e-7, atol=0)


def test_tritons_dense_rows_keep_the_digits_of_small_values(interpreted: ModuleType) -> None:
    values = torch.logspace(-9, 4, 50)
    one, genes = torch.tensor([0]), torch.arange(50, dtype=torch.int16)
    rows = one, torch.tensor([50]), torch.tensor([1.0]), genes, values
    exact = values.double().log1p().float()[None]
    torch.testing.assert_close(interpreted.dense_rows(*rows, 50, 50), exact, rtol=3e-7, atol=0)


def test_tritons_dense_rows_write_nothing_outside_of_their_row(interpreted: ModuleType) -> None:
    genes = torch.tensor([-1, 3, 1, -70_000, 2], dtype=torch.int32)
    cells = torch.tensor([0, 2]), torch.tensor([2, 3]), torch.tensor([0.0, 0.0]), genes, torch.ones(5)
    assert interpreted.dense_rows(*cells, 3, 5).tolist() == [[0, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("n_places", [1, 1024, 5000])
def test_triton_keeps_the_units_that_pytorch_keeps(interpreted: ModuleType, share: float, n_places: int) -> None:
    keys = kernels.plain_set_keys(torch.tensor([0, 1, 77, 2**31 + 5, 2**40]), -12345)
    given = keys, 3, 4, n_places, round(share * kernels.HASHES)
    kept = interpreted.kept_units(*given)
    assert torch.equal(kept, kernels.plain_kept_units(*given))
    assert torch.equal(kept[1:2], interpreted.kept_units(keys, 4, 1, n_places, round(share * kernels.HASHES)))


@pytest.mark.parametrize("of_seed", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_tritons_keys_of_sets_are_pytorchs(interpreted: ModuleType, of_seed: int) -> None:
    number = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**33 + 1, *range(2000)])
    assert torch.equal(interpreted.set_keys(number, of_seed), kernels.plain_set_keys(number, of_seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tritons_weighted_sum_is_pytorchs(interpreted: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 1500), (2, 7, 1500), (2, 3, 1), (2, 1, 1500), (2, 3, 1), (2, 1, 1))
    total, cells, *others = (torch.randn(shape, generator=generator) for shape in shapes)
    given: Any = (total, cells.half()[:, 2:5], *others, dtype)
    out = interpreted.weighted_sum(*given)
    assert out.dtype == dtype
    # float32: sums in another order; a half: rounded once from these
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(out, kernels.plain_weighted_sum(*given), rtol=rtol, atol=1e-6)


def test_every_kernel_passes_the_comparison_that_a_gpu_begins_with(interpreted: ModuleType) -> None:
    kernels._check(interpreted, torch.device("cpu"))
