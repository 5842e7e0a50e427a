"""Operations that are one kernel on a GPU: what they are to PyTorch, and what is done where Triton does not work."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import sest.head
from sest.head import kernels

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {
    "set_keys": kernels.plain_set_keys,
    "kept_units": kernels.plain_kept_units,
    "weighted_sum": kernels.plain_weighted_sum,
    "dense_rows": kernels.plain_dense_rows,
    "centre_and_largest": kernels.plain_centre_and_largest,
    "add_norm": kernels.plain_add_norm,
    "swiglu": kernels.plain_swiglu,
    "swiglu_backward": kernels.plain_swiglu_backward,
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.14's opcheck
def test_every_operation_is_one_of_pytorch_with_shapes_that_are_known_beforehand() -> None:
    ones = torch.ones(2, 3, 10)
    of_cell, of_gene, of_set = ones[..., :1], ones[:, :1], ones[:, :1, :1]
    cells = torch.tensor([1, 0]), torch.tensor([2, 1]), torch.tensor([0.5, 0.0]), torch.arange(3).short(), torch.ones(3)
    tried: Any = (
        (kernels.set_keys, kernels.plain_set_keys, (torch.arange(5), -7)),
        (kernels.kept_units, kernels.plain_kept_units, (torch.arange(5, dtype=torch.int32), 2, 3, 12, 2**30)),
        (kernels.dense_rows, kernels.plain_dense_rows, (*cells, 10, 3)),
        (
            kernels.weighted_sum,
            kernels.plain_weighted_sum,
            (ones, ones, of_cell, of_gene, of_cell, of_set, torch.half),
        ),
        (kernels.centre_and_largest, kernels.plain_centre_and_largest, (cells[4].view(1, 1, 3),)),
        (kernels.add_norm, kernels.plain_add_norm, (ones.sin(), ones.cumsum(2), ones[0, 0], ones[0, 1], 1e-5)),
        (kernels.swiglu, kernels.plain_swiglu, (ones, 2 * ones)),
        (kernels.swiglu, kernels.plain_swiglu, (ones.clone().requires_grad_(), ones.clone().requires_grad_())),
        (kernels.swiglu_backward, kernels.plain_swiglu_backward, (ones, ones, 2 * ones)),
    )
    for operation, plain, given in tried:
        torch.library.opcheck(operation, given)
        fresh = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]  # `add_norm` writes
        torch.testing.assert_close(operation(*given), plain(*fresh), rtol=0, atol=0)


def test_the_gradient_of_swiglu_is_that_of_pytorchs_operations() -> None:
    gate, up = (torch.linspace(-6, 6, 50).roll(n).double().requires_grad_() for n in (0, 9))
    assert torch.autograd.gradcheck(kernels.swiglu, (gate, up))


def off_by_one(out: Any) -> Any:
    return tuple(map(off_by_one, out)) if isinstance(out, tuple) else 1 - out.float()


@pytest.mark.parametrize("wrong", PLAIN)
def test_kernels_are_taken_only_if_they_compute_the_same_numbers(wrong: str) -> None:
    kernels._check(SimpleNamespace(**PLAIN), CPU)  # type: ignore[arg-type]
    off = SimpleNamespace(**PLAIN | {wrong: lambda *given, **more: off_by_one(PLAIN[wrong](*given, **more))})
    with pytest.raises(ArithmeticError, match="other numbers than PyTorch"):
        kernels._check(off, CPU)  # type: ignore[arg-type]


def test_where_triton_does_not_work_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.delattr(sest.head, "triton_kernels", raising=False)  # of tests before
    with mock.patch.dict(sys.modules, {"triton": None}), caplog.at_level(logging.INFO):
        sys.modules.pop("sest.head.triton_kernels", None)
        kernels._working_kernels.cache_clear()
        assert kernels.triton_kernels(gpu) is None is kernels.triton_kernels(gpu)
    kernels._working_kernels.cache_clear()
    assert [record.message for record in caplog.records] == [
        "Triton does not work here, so more kernels are started than it would take "
        "(import of triton halted; None in sys.modules)."
    ]
    assert kernels.triton_kernels(CPU) is None
