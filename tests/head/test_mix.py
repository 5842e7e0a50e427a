"""head/mix.py: the hash is lowbias32, and one to one."""

from __future__ import annotations

import torch

from sest.head.mix import mix32


def plain_mix(x: int) -> int:
    """Lowbias32 of C. Wellons' hash-prospector on unbounded integers: no overflow to hide."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


NUMBERS = [0, 1, 2, 5, 2**31 - 1, 2**31, 2**32 - 1, 123_456_789, 3_000_000_000, *range(1000, 60_000, 7)]


def test_mixing_signed_numbers_is_the_unsigned_one_and_one_to_one() -> None:
    signed = torch.tensor(NUMBERS).to(torch.int32)  # keeps the lower 32 bits
    mixed = [n % 2**32 for n in mix32(signed).tolist()]
    assert mixed == [plain_mix(n) for n in NUMBERS]
    assert len(set(mixed)) == len(NUMBERS)


def test_what_is_mixed_stays_as_it_was() -> None:
    x = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert mix32(x).shape == (3, 4) and torch.equal(x, torch.arange(12, dtype=torch.int32).view(3, 4))
    assert torch.equal(mix32(x.t()), mix32(x).t())  # wherever the numbers lie in memory
