"""Random streams seeded together: those of numpy, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sest.machine.seeds import choose_from, streams

LARGEST_WORD = 2**32 - 1
numbers = st.integers(0, 2**70)  # of one, two or three words of 32 bits
columns = st.lists(
    st.sampled_from([0, 1, 2, 1000, 2**31, LARGEST_WORD]) | st.integers(0, LARGEST_WORD), min_size=3, max_size=3
)


@given(st.lists(numbers, max_size=5), columns, st.lists(numbers, max_size=2), columns)
def test_streams_are_those_that_numpy_seeds_one_by_one(
    before: list[int], first: list[int], between: list[int], second: list[int]
) -> None:
    together = list(streams(*before, np.array(first), *between, np.array(second, np.uint32)))
    assert len(together) == 3
    for a, b, ours in zip(first, second, together, strict=True):
        numpys = np.random.default_rng([*before, a, *between, b])
        assert ours.bit_generator.state == numpys.bit_generator.state
        assert np.array_equal(ours.permutation(50), numpys.permutation(50))
        assert np.array_equal(ours.choice(50, 20, replace=False), numpys.choice(50, 20, replace=False))


def test_ten_thousand_streams_begin_as_numpys_do_and_none_as_another() -> None:
    states = [rng.bit_generator.state for rng in streams(7, 1, 3, np.arange(10_000))]
    assert states == [np.random.default_rng([7, 1, 3, i]).bit_generator.state for i in range(10_000)]
    assert len({state["state"]["state"] for state in states}) == 10_000


def test_a_stream_begins_where_the_hash_computed_by_hand_says() -> None:
    """Plain integers, one word after the other, as the paper has it: no numpy on this side."""

    def hashed(word: int, constant: list[int], factor: int) -> int:
        word ^= constant[0]
        constant[0] = constant[0] * factor % 2**32
        word = word * constant[0] % 2**32
        return word ^ word >> 16

    def merged(left: int, right: int) -> int:
        both = (0xCA01F9DD * left - 0x4973F715 * right) % 2**32
        return both ^ both >> 16

    entropy, constant = [7, 2**31 + 5, 3, 0, 9], [0x43B0D7E5]
    pool = [hashed(word, constant, 0x931E8875) for word in entropy[:4]]
    for source in range(4):
        for target in range(4):
            if target != source:
                pool[target] = merged(pool[target], hashed(pool[source], constant, 0x931E8875))
    pool = [merged(word, hashed(entropy[4], constant, 0x931E8875)) for word in pool]
    constant = [0x8B51F9DD]
    words = [hashed(word, constant, 0x58F38DED) for word in pool * 2]
    seed, stream = ((words[i + 1] << 96 | words[i] << 64 | words[i + 3] << 32 | words[i + 2]) for i in (0, 4))
    step = (stream << 1 | 1) % 2**128
    state = ((step + seed) * 0x2360ED051FC65DA44385DF649FCCF645 + step) % 2**128
    (ours,) = streams(7, 2**31 + 5, 3, 0, np.array([9]))
    assert ours.bit_generator.state["state"] == {"state": state, "inc": step}


def test_no_rows_have_no_streams() -> None:
    assert list(streams(1, np.array([], np.int64))) == []


@pytest.mark.parametrize("entropy", [(-1, np.array([0])), (0, np.array([-1])), (0, np.array([2**32]))])
def test_numbers_that_are_no_seed_are_refused(entropy: tuple[int | np.ndarray, ...]) -> None:
    with pytest.raises(ValueError, match=r"below 0|0 or more"):
        list(streams(*entropy))


@pytest.mark.usefixtures("loops")
def test_choices_from_many_pools_are_numpys_bit_for_bit() -> None:
    """Pools of one number, with repeats, by Floyd's algorithm and by the shuffle that large ones get."""
    draw = np.random.default_rng(0)
    for trial in range(300):
        n, n_pools = int(draw.integers(1, 300)), int(draw.integers(1, 12))
        large = [1, 2, 500, 9_999, 10_000, 10_001, 12_000, 40_000]
        sizes = draw.choice(large, n_pools) if trial % 10 == 0 else draw.integers(1, 60, n_pools)
        first = np.concatenate([[0], np.cumsum(sizes)])
        pools = draw.integers(-1, n_pools, (2, n))
        ours, theirs = ([np.random.default_rng([trial, row]) for row in range(2)] for _ in range(2))
        for rng in (ours[0], theirs[0]):
            rng.integers(0, 5)  # half a word of the bit generator is left
        out = np.full((2, n), -7)
        expected = out.copy()
        for row, rng in enumerate(theirs):
            for pool in range(n_pools):
                places = np.flatnonzero(pools[row] == pool)
                if len(places):
                    numbers = np.arange(first[pool], first[pool + 1])
                    expected[row, places] = rng.choice(numbers, len(places), replace=len(numbers) < len(places))
        choose_from(ours, pools, first, out)
        np.testing.assert_array_equal(out, expected)
