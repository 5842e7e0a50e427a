"""The Triton kernels, run by Triton's interpreter: each gives what PyTorch's own operations do.

And compiled for GPUs, which needs none: what the interpreter takes is not always what the compiler does.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from sest.head import kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # the interpreter of Triton 3.6


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 11, 37), (2, 4, 16)])
def test_tritons_means_and_largest_numbers_of_sets_are_pytorchs(
    interpreted: ModuleType, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, "_ROWS", 4)
    monkeypatch.setattr(interpreted, "_GENES", 16)  # the interpreter adds up number by number
    cells = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    cells[0, 0, -1], cells[1, -1, 0] = -7.5, 9.0
    centre, largest = interpreted.centre_and_largest(cells)
    assert largest.tolist()[:2] == [7.5, 9.0] and centre.dtype == largest.dtype == torch.float32
    torch.testing.assert_close(centre, cells.double().mean(1, keepdim=True).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(largest, kernels.plain_centre_and_largest(cells)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tritons_swiglu_is_rounded_once(interpreted: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [(4 * torch.randn(3, 700, generator=generator)).to(dtype) for _ in range(3)]
    given[1][0, :4] = torch.tensor([0.0, -200.0, 200.0, -80.0])
    gate, up = (tensor.double().requires_grad_() for tensor in given[1:])
    (torch.nn.functional.silu(gate) * up).backward(given[0].double())
    ours = interpreted.swiglu(*given[1:]), *interpreted.swiglu_backward(*given)
    for tensor, exact in zip(ours, (torch.nn.functional.silu(gate) * up, gate.grad, up.grad), strict=True):
        assert exact is not None and tensor.dtype == dtype
        rtol = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts off bfloat16
        torch.testing.assert_close(tensor.double(), exact.detach(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 512), (1, 1)])
def test_tritons_norms_of_sums_are_rounded_once(
    interpreted: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = ((3 * torch.randn(shape, generator=generator) + 20).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    exact = torch.nn.functional.layer_norm(x.double() + y.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    found = interpreted.add_norm(x, y, weight, bias, 1e-5)
    assert found.dtype == dtype and found.shape == shape
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter cuts off bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=2e-5)


def test_every_kernel_passes_the_comparison_that_a_gpu_begins_with(interpreted: ModuleType) -> None:
    kernels._check(interpreted, torch.device("cpu"))


KERNELS: dict[str, tuple[str, dict[str, int]]] = {  # types of the arguments, and constants
    "_set_keys": ("*i64 *i32 i32 i32", {"BLOCK": 1024}),
    "_kept_units": ("*i32 *i1 i32 i32 i32 i64", {"BLOCK": 1024}),
    "_dense_rows": ("*i64 *i64 *fp32 *i16 *i16 *fp32 i32", {"BLOCK": 1024}),
    "_weighted_sum": ("*fp32 *fp16 *fp32 *fp32 *fp32 *fp32 *bf16 i32 i32 i32 i32", {"BLOCK": 1024}),
    "_centre_and_largest": ("*bf16 *fp32 *fp32 i32 i32", {"ROWS": 8, "GENES": 256}),
    "_add_norm": ("*bf16 *bf16 *bf16 *bf16 *bf16 i32 fp32", {"BLOCK": 2048}),
    "_swiglu": ("*bf16 *bf16 *bf16 i32", {"BLOCK": 1024}),
    "_swiglu_backward": ("*fp16 *fp16 *fp16 *fp16 *fp16 i32", {"BLOCK": 1024}),
}


@pytest.mark.parametrize("architecture", [70, 90])  # V100, H100
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_kernels_compile_for_gpus(
    name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs; `make newest` installs it")
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from sest.head import triton_kernels

    kernel, (types, constants) = getattr(triton_kernels, name), KERNELS[name]
    signature = dict(zip(kernel.arg_names, [*types.split(), *["constexpr"] * len(constants)], strict=True))
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    assert f"sm_{architecture}" in compiled.asm["ptx"] and compiled.asm["cubin"]


def test_every_kernel_that_pytorch_starts_is_compiled_above() -> None:
    text = Path(kernels.__file__).with_name("triton_kernels.py").read_text()
    assert set(re.findall(r"^ +(_\w+)\[(?:grid|\()", text, re.MULTILINE)) == set(KERNELS)
