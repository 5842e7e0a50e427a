"""A second implementation of sest/se/tokenize.py, one cell at a time, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plain_mix(x: int) -> int:
    """Lowbias32 of C. Wellons' hash-prospector, on unbounded integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def plain_key(seed: int, cell: int) -> int:
    """The key of one cell."""
    key = plain_mix(seed % 2**32 ^ 0x5E57)
    for word in (cell % 2**32, cell // 2**32):
        key = plain_mix(key ^ word)
    return key


def plain_sentence(
    values: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray, seed: int, cell: int, pad_length: int
) -> list[int]:
    """The sentence of one cell: positions among its kept genes."""
    key = plain_key(seed, cell)
    ranked = sorted(range(len(tokens)), key=lambda i: (values[i], plain_mix(key ^ int(tokens[i]))), reverse=True)
    if len(ranked) >= pad_length - 1:
        return ranked[: pad_length - 1]
    expressed = [i for i in ranked if values[i] > 0]
    pool = ranked[len(expressed) :] or ranked
    stream = plain_mix(key ^ 0xD2A3)
    drawn = [pool[plain_mix(stream ^ slot) % len(pool)] for slot in range(len(expressed), pad_length - 1)]
    return expressed + drawn


def plain_counts(values: np.ndarray, sentence: Sequence[int]) -> np.ndarray:
    """The count features of one cell: kept gene number 3 in slot 0, then its sentence."""
    total = float(np.sum(values, dtype=np.float64))
    shares = [float(v) / total if total > 0 else 1 / len(values) for v in values]
    return np.array([100 * shares[i] for i in (3, *sentence)])
