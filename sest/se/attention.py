"""Attention on a GPU: which of PyTorch's kernels computes it, and whether its numbers are right.

PyTorch takes the fastest that it trusts: cuDNN's on Hopper and Blackwell from cuDNN 9.15.1 on (before, rows that are no
multiple of 128 were read beyond their end: pytorch#169849, and a sentence has 2,049), else flash attention for halves,
else memory-efficient attention. So none is asked for by name; before the first batch the one taken is held against
float64, and one that fails is left out.

Shapes: B cells, T rows, Q of them queries, D model width, H heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sest.errors import InputError

logger = logging.getLogger(__name__)

_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash attention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "plain products",
}
_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WAYS: tuple[Callable[[], AbstractContextManager[None]], ...] = (
    nullcontext,
    lambda: sdpa_kernel(_WITHOUT_CUDNN),
    lambda: sdpa_kernel(SDPBackend.MATH),
)
_TOLERANCE = 0.05  # of a row's norm: rounding to bfloat16 gives 0.01, a row that was read wrongly about 1


def attention(queries: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> Tensor:
    """Attention of every head, without a mask: (B, Q, D), (B, T, D), (B, T, D) -> (B, Q, D)."""
    q, k, v = _heads(n_heads, queries, keys, values)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _heads(n_heads: int, *tensors: Tensor) -> list[Tensor]:  # (B, T, D) -> (B, H, T, D / H)
    return [tensor.unflatten(-1, (n_heads, -1)).transpose(1, 2) for tensor in tensors]


@torch.inference_mode()
def working_kernel(
    n_rows: int, width: int, n_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, Callable[[], AbstractContextManager[None]]]:
    """The kernel for attention of T = `n_rows` rows, in words, and the context in which PyTorch takes it.

    Raises:
        InputError: none gives the numbers.
    """
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(2, n_rows, 3 * width, generator=generator, device=device).mul_(2).to(dtype)
    q, k, v = packed.split(width, dim=-1)  # strides as in a layer
    for way in _WAYS:
        try:
            with way():
                of_q, of_k, of_v = _heads(n_heads, q, k, v)
                name = _NAMES.get(SDPBackend(torch._fused_sdp_choice(of_q, of_k, of_v)), "another kernel")
                off = max(_off(queries, k, v, n_heads) for queries in (q, q[:, :2]))  # of the last layer, too
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.info(f"A kernel for attention does not work here ({str(error).splitlines()[0]}).")
            continue
        if off < _TOLERANCE:
            return name, way
        logger.info(f"Attention by {name} is wrong here: another kernel is taken.")
    raise InputError(f"This PyTorch computes attention wrongly on {device}. Pass --device cpu, or install another one.")


def _off(queries: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> float:
    """How far a row of a head is from float64 at most, of the mean norm of such rows; infinite where one is NaN."""
    (found,) = _heads(n_heads, attention(queries, keys, values, n_heads))
    most = 0.0
    for head in range(n_heads):  # one at a time, as there are T x T numbers of each
        q, k, v = (tensor[:, head].double() for tensor in _heads(n_heads, queries, keys, values))
        exact = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v
        off = (found[:, head] - exact).norm(dim=-1).nan_to_num(torch.inf) / exact.norm(dim=-1).mean()
        most = max(most, float(off.amax()))
    return most
