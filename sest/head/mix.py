"""The hash behind dropout masks and, in `sest.se`, behind the order of genes with equal counts."""

from __future__ import annotations

from torch import Tensor


def mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int32, one to one (lowbias32 of C. Wellons' hash-prospector)."""
    y = _shifted(x, 16).bitwise_xor_(x).mul_(0x7FEB352D)  # wraps
    y.bitwise_xor_(_shifted(y, 15)).mul_(0x846CA68B - 2**32)
    return y.bitwise_xor_(_shifted(y, 16))


def _shifted(x: Tensor, n: int) -> Tensor:
    """Shift right by n bits without the sign."""
    return (x >> n).bitwise_and_((1 << 32 - n) - 1)
