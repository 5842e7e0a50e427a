"""Random streams by the thousand: numpy's own, whose seeds are hashed for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from sest.machine import jit
from sest.machine.jit import compiled

# Of SeedSequence. An i-th hash takes numbers i and i + 1 of the sequence first * factor**i.
_HASH_IN, _HASH_OUT = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)  # first, factor
_MERGE_LEFT, _MERGE_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_POOL, _STATE = 4, 8  # words of 32 bits: what a seed is mixed into, and what PCG64 begins from
_WORD = 0xFFFF_FFFF  # the largest
_SPARE = 64  # words for draws that are drawn again, each of which is rarer than one in 10,000
# Of Generator.choice without repeats: in pools larger than this it shuffles all, if it takes more than this part
_LARGE_POOL, _LARGE_PART = 10_000, 50


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


def choose_from(rngs: Sequence[np.random.Generator], pools: np.ndarray, first: np.ndarray, out: np.ndarray) -> None:
    """Set each row of `out` to choices from pools, as `rng.choice(pool, n, replace=len(pool) < n)` of each pool gives.

    The same numbers bit for bit, where a row's pools are asked one after the other, each for its n places in order. The
    generators themselves are further on by more than they took.

    Args:
        rngs: of PCG64, one a row.
        pools: (rows, n) pool of every place; -1: none, `out` stays as it is.
        first: (pools + 1,) where the numbers of each pool begin in what `out` gets: pool p is first[p] .. first[p + 1].
        out: (rows, n) int64.
    """
    if jit.REASON:
        return _choose_one_by_one(rngs, pools, first, out)
    words = np.empty((len(rngs), 2 * (pools.shape[1] + _SPARE) + 1), np.uint32)
    begin = np.empty(len(rngs), np.int64)
    for i, rng in enumerate(rngs):
        bits: Any = rng.bit_generator
        state = bits.state
        words[i, 0], begin[i] = state["uinteger"], not state["has_uint32"]  # half of the number before
        words[i, 1:] = bits.random_raw(pools.shape[1] + _SPARE).astype("<u8", copy=False).view("<u4")
    order = np.argsort(pools, axis=1, kind="stable")
    for i in range(len(rngs)):
        _choose(order[i], pools[i], first, words[i], begin[i], out[i])


def _choose_one_by_one(
    rngs: Sequence[np.random.Generator], pools: np.ndarray, first: np.ndarray, out: np.ndarray
) -> None:
    """`choose_from` by numpy itself: a call costs more than the few numbers that it draws."""
    order = np.argsort(pools, axis=1, kind="stable")
    for rng, row, places, chosen in zip(rngs, pools, order, out, strict=True):
        begins = np.flatnonzero(np.diff(row[places], prepend=-1))  # of those after the places that have no pool
        for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
            here, pool = places[begin:end], row[places[begin]]
            n = first[pool + 1] - first[pool]
            chosen[here] = first[pool] + rng.choice(n, end - begin, replace=n < end - begin)


@compiled(None, nogil=True)
def _choose(order: Any, pools: Any, first: Any, words: Any, at: Any, out: Any) -> None:
    """A row of `choose_from`; the algorithms are those of numpy.random.Generator.choice."""
    begin = 0
    while begin < len(order):
        pool, end = pools[order[begin]], begin + 1
        while end < len(order) and pools[order[end]] == pool:
            end += 1
        places, begin = order[begin:end], end
        if pool < 0:
            continue
        n_chosen, n_pool = len(places), first[pool + 1] - first[pool]
        chosen = np.empty(n_chosen, np.int64)
        if n_pool < n_chosen:
            for i in range(n_chosen):
                chosen[i], at = _below(n_pool, words, at)
        elif n_pool > _LARGE_POOL and n_chosen > n_pool // _LARGE_PART:  # the end of a shuffle of the pool
            every = np.arange(n_pool)
            at = _shuffle(every, max(n_pool - n_chosen, 1), words, at)
            chosen[:] = every[n_pool - n_chosen :]
        else:  # Floyd's
            for i in range(n_chosen):
                top = n_pool - n_chosen + i
                chosen[i], at = _below(top + 1, words, at)
                for earlier in range(i):
                    if chosen[earlier] == chosen[i]:
                        chosen[i] = top
                        break
            at = _shuffle(chosen, 1, words, at)
        for i in range(n_chosen):
            out[places[i]] = first[pool] + chosen[i]


@compiled(None, nogil=True)
def _shuffle(numbers: Any, start: Any, words: Any, at: Any) -> Any:
    """Shuffle from the end down to `start`; returns the next word."""
    for i in range(len(numbers) - 1, start - 1, -1):
        j, at = _below(i + 1, words, at)
        numbers[i], numbers[j] = numbers[j], numbers[i]
    return at


@compiled(None, nogil=True)
def _below(n: Any, words: Any, at: Any) -> Any:
    """A number below n < 2**32, and the next word (Lemire 2019, "Fast random integer generation in an interval")."""
    if n == 1:
        return 0, at
    n = np.uint64(n)
    product = np.uint64(words[at]) * n
    again = (np.uint64(_WORD + 1) - n) % n
    while product & np.uint64(_WORD) < again:
        at += 1
        product = np.uint64(words[at]) * n
    return np.int64(product >> np.uint64(32)), at + 1


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
