"""Random streams by the thousand: numpy's own, whose seeds are hashed for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

# Of SeedSequence. An i-th hash takes numbers i and i + 1 of the sequence first * factor**i.
_HASH_IN, _HASH_OUT = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)  # first, factor
_MERGE_LEFT, _MERGE_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_POOL, _STATE = 4, 8  # words of 32 bits: what a seed is mixed into, and what PCG64 begins from
_WORD = 0xFFFF_FFFF  # the largest


def streams(*entropy: int | np.ndarray) -> Iterator[np.random.Generator]:
    """What `np.random.default_rng([a, b, ...])` gives, bit for bit, for each of n rows of a, b, ...; of many, faster.

    The hash is that of numpy.random.SeedSequence: `seed_seq_fe` of M. E. O'Neill, "Developing a seed_seq Alternative"
    (https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html), with a pool of four words.

    Args:
        entropy: a, b, ...: an integer that is the same in all rows, or one for each, (n,) below 2**32. One of them at
            least is an array.

    Raises:
        ValueError: an integer below zero, or in an array one of 2**32 or more.
    """
    words = [word for part in entropy for word in _words(part)]
    n = next(len(word) for word in words if isinstance(word, np.ndarray))
    table = np.zeros((max(len(words), _POOL), n), np.uint32)  # numpy takes the words that are missing for 0
    for row, word in zip(table, words, strict=False):
        row[:] = word
    for state in _states(table):
        seed: Any = _Seed(state)  # numpy's annotations lack the seeds of others, its documentation has them
        yield np.random.Generator(np.random.PCG64(seed))


class _Seed(ISeedSequence):
    """A seed that is hashed already."""

    def __init__(self, state: np.ndarray) -> None:
        self._state = state  # (4,) uint64

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        if n_words != len(self._state) or dtype != np.uint64:
            raise ValueError(f"Here is a seed of four words of 64 bits, for PCG64, not {n_words} of {dtype}.")
        return self._state


def _words(value: int | np.ndarray) -> list[int] | list[np.ndarray]:
    """A number as words of 32 bits, the least first; an array as one word each."""
    if isinstance(value, np.ndarray):
        if len(value) and (value.min() < 0 or value.max() > _WORD):
            raise ValueError("A column of seeds holds a number below 0 or of 2**32 or more.")
        return [value]
    if value < 0:
        raise ValueError(f"A seed is 0 or more, not {value}.")
    return [value >> shift & _WORD for shift in range(0, max(value.bit_length(), 1), 32)]


def _states(words: np.ndarray) -> np.ndarray:
    """Seeds (words, n) of four words or more as what PCG64 begins from, (n, 4) uint64."""
    factors = _factors(*_HASH_IN, _POOL * len(words))
    pool, used = _hashed(words[:_POOL], factors[: _POOL + 1]), _POOL
    for source in range(_POOL):
        others = [i for i in range(_POOL) if i != source]
        pool[others] = _merged(pool[others], _hashed(pool[source], factors[used : used + _POOL]))
        used += _POOL - 1
    for word in words[_POOL:]:
        pool = _merged(pool, _hashed(word, factors[used : used + _POOL + 1]))
        used += _POOL
    state = _hashed(np.concatenate([pool, pool]), _factors(*_HASH_OUT, _STATE)).astype(np.uint64)
    return np.ascontiguousarray((state[::2] | state[1::2] << np.uint64(32)).T)


@lru_cache(maxsize=8)
def _factors(first: int, factor: int, n: int) -> np.ndarray:
    """first * factor**i of i = 0 .. n, (n + 1, 1)."""
    return np.array([[first * pow(factor, i, 1 << 32) & _WORD] for i in range(n + 1)], np.uint32)


def _hashed(words: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Hashes (m, n) of as many words or, (n,), of the same: one after the other, with (m + 1, 1) factors."""
    hashed = (words ^ factors[:-1]) * factors[1:]
    return np.asarray(hashed ^ hashed >> 16)


def _merged(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    merged: np.ndarray = _MERGE_LEFT * left - _MERGE_RIGHT * right
    return np.asarray(merged ^ merged >> 16)
