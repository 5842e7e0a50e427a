"""se/attention.py: the numbers of attention, and a kernel that gives others is left out."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from sest.errors import InputError
from sest.se.attention import _off, attention, working_kernel

CPU = torch.device("cpu")
KNOWN = F.scaled_dot_product_attention


def test_attention_is_softmax_of_the_scaled_products_of_each_head() -> None:
    queries, keys, values = (torch.randn(3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 7, 7))
    found = attention(queries, keys, values, 2).numpy()
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (t[..., head].double().numpy() for t in (queries, keys, values))
        expected = scipy.special.softmax(q @ k.swapaxes(1, 2) / 2, axis=-1) @ v
        np.testing.assert_allclose(found[..., head], expected, atol=1e-6)  # float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_rows", "width", "n_heads"), [(9, 8, 2), (257, 256, 2)])
def test_rounding_to_halves_is_nothing_that_a_kernel_is_left_out_for(
    dtype: torch.dtype, n_rows: int, width: int, n_heads: int
) -> None:
    packed = torch.randn(2, n_rows, 3 * width, generator=torch.Generator().manual_seed(0)).mul_(2).to(dtype)
    q, k, v = packed.split(width, dim=-1)
    assert _off(q, k, v, n_heads) < 0.02
    name, way = working_kernel(n_rows, width, n_heads, dtype, CPU)
    assert name in ("flash attention", "plain products")  # which of them is PyTorch's choice
    with way():
        pass


def wrong_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = KNOWN(q, k, v)
    out[-1, -1, -1] = out[0, 0, 0]
    return out


def not_a_number(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = KNOWN(q, k, v)
    out[0, 0, 0, 0] = torch.nan
    return out


def no_plan(*_: Any) -> torch.Tensor:
    raise RuntimeError("cuDNN Frontend error: No execution plans\nmore of it")


@pytest.mark.parametrize("broken", [wrong_row, not_a_number, no_plan])
def test_a_kernel_that_fails_or_gives_other_numbers_is_left_out_and_that_is_said(
    broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def only_without_cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (broken if torch.backends.cuda.cudnn_sdp_enabled() else KNOWN)(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", only_without_cudnn)
    with caplog.at_level(logging.INFO):
        _, way = working_kernel(9, 8, 2, torch.float32, CPU)
    with way():
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    (said,) = caplog.messages
    assert re.fullmatch(
        r"Attention by .* is wrong here: another kernel is taken\.|"
        r"A kernel for attention does not work here \(cuDNN Frontend error: No execution plans\)\.",
        said,
    )


def test_where_no_kernel_gives_the_numbers_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong_row)
    with pytest.raises(InputError, match="computes attention wrongly on cpu"):
        working_kernel(9, 8, 2, torch.float32, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_has_a_kernel_for_sentences_of_the_public_model(dtype: torch.dtype) -> None:
    assert working_kernel(2049, 2048, 16, dtype, torch.device("cuda"))[0]
