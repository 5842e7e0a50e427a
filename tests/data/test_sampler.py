"""Sampling sets: pure functions of (seed, number), every cell once an epoch, controls of the same context."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sest.data import sampler as sampler_module
from sest.data.labels import CONTROL, Labels
from sest.data.sampler import SetRows, SetSampler, fitting_set_size
from sest.errors import InputError
from sest.machine.seeds import streams

patient = settings(deadline=None)  # a loaded machine is slow now and then


def make_labels(context: np.ndarray, perturbation: np.ndarray, batch: np.ndarray | None = None) -> Labels:
    """Labels of cells whose contexts 0, 1 lie in one file and 2, 3 in another."""
    n_contexts = int(context.max()) + 1
    names = tuple((f"file{c // 2}", f"type{c % 2}") for c in range(n_contexts))
    return Labels(
        groups=tuple(sorted({group for group, _ in names})),
        first=np.array([0, len(context)]),
        perturbations=("ctrl", *(f"p{i}" for i in range(1, int(perturbation.max()) + 1))),
        perturbation=perturbation.astype(np.int32),
        contexts=names,
        context=context.astype(np.int32),
        batch=(np.zeros(len(context)) if batch is None else batch).astype(np.int32),
    )


@st.composite
def screens(draw: st.DrawFn) -> Labels:
    """Up to 4 contexts, each with 1 to 9 controls and up to 3 perturbations of 1 to 11 cells, shuffled."""
    context, perturbation = [], []
    for c in range(draw(st.integers(1, 4))):
        sizes = [draw(st.integers(1, 9)), *draw(st.lists(st.integers(0, 11), min_size=3, max_size=3))]
        sizes[1] = max(sizes[1], 1)  # no context without perturbed cells
        for p, n in enumerate(sizes):
            context += [c] * n
            perturbation += [p] * n
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(context))
    batch = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 3, len(context))
    return make_labels(np.array(context)[order], np.array(perturbation)[order], batch)


def everything(labels: Labels) -> np.ndarray:
    return np.ones(len(labels), bool)


def run_of(first: int, count: int) -> np.ndarray:
    """Numbers of `count` sets in a row."""
    return np.arange(first, first + count)


def sets_equal(a: SetRows, b: SetRows) -> bool:
    return (
        np.array_equal(a["targets"], b["targets"])
        and np.array_equal(a["controls"], b["controls"])
        and np.array_equal(a["perturbation"], b["perturbation"])
        and np.array_equal(a["number"], b["number"])
    )


def joined(*parts: SetRows) -> SetRows:
    return SetRows(
        targets=np.concatenate([p["targets"] for p in parts]),
        controls=np.concatenate([p["controls"] for p in parts]),
        perturbation=np.concatenate([p["perturbation"] for p in parts]),
        number=np.concatenate([p["number"] for p in parts]),
    )


def at(sets: SetRows, places: np.ndarray) -> SetRows:
    return SetRows(
        targets=sets["targets"][places],
        controls=sets["controls"][places],
        perturbation=sets["perturbation"][places],
        number=sets["number"][places],
    )


def first_of(sets: SetRows, n: int) -> SetRows:
    return at(sets, np.arange(n))


@patient
@given(screens(), st.integers(2, 6), st.integers(0, 5), st.booleans())
def test_every_perturbed_cell_is_used_once_an_epoch_and_short_sets_are_filled_from_their_own_cells(
    labels: Labels, set_size: int, seed: int, same_batch: bool
) -> None:
    sampler = SetSampler(labels, everything(labels), set_size, seed, same_batch=same_batch)
    n = sampler.sets_per_epoch
    for epoch in (0, 3):
        sets = sampler.sets(run_of(epoch * n, n))
        used = Counter(sets["targets"].ravel().tolist())
        assert set(used) == set(np.flatnonzero(~labels.is_control).tolist())
        for rows in sets["targets"]:
            assert len(set(labels.context[rows])) == 1 and len(set(labels.perturbation[rows])) == 1
        # cells beyond the first use are the filling: less than a set for each (context, perturbation)
        for key in {(c, p) for c, p in zip(labels.context, labels.perturbation, strict=True) if p != CONTROL}:
            mine = np.flatnonzero((labels.context == key[0]) & (labels.perturbation == key[1]))
            extra = sum(used[i] - 1 for i in mine.tolist())
            assert extra == -len(mine) % set_size
            if extra <= len(mine):  # filled without repeats where there are enough
                assert max(used[i] for i in mine.tolist()) <= 2
    assert (sets["perturbation"] == labels.perturbation[sets["targets"][:, 0]]).all()


@patient
@given(screens(), st.integers(2, 6), st.integers(0, 5), st.booleans(), st.booleans())
def test_controls_are_controls_of_the_same_file_and_cell_type_always(
    labels: Labels, set_size: int, seed: int, same_batch: bool, control_targets: bool
) -> None:
    sampler = SetSampler(
        labels, everything(labels), set_size, seed, same_batch=same_batch, control_targets=control_targets
    )
    for sets in (sampler.sets(run_of(0, 2 * sampler.sets_per_epoch)), sampler.fixed_sets()):
        assert labels.is_control[sets["controls"]].all()
        assert (labels.context[sets["controls"]] == labels.context[sets["targets"]][:, :1]).all()
        assert sets["controls"].shape == sets["targets"].shape
        if not same_batch:  # no control twice in a set where there are enough
            for rows in sets["controls"]:
                pool = np.count_nonzero(labels.is_control & (labels.context == labels.context[rows[0]]))
                assert len(set(rows.tolist())) == set_size or pool < set_size


@patient
@given(screens(), st.integers(2, 5), st.integers(0, 5))
def test_with_same_batch_a_cell_gets_a_control_of_its_batch_wherever_there_is_one(
    labels: Labels, set_size: int, seed: int
) -> None:
    sampler = SetSampler(labels, everything(labels), set_size, seed, same_batch=True)
    there = {(c, b) for c, b in zip(labels.context[labels.is_control], labels.batch[labels.is_control], strict=True)}
    for sets in (sampler.sets(run_of(0, 2 * sampler.sets_per_epoch)), sampler.fixed_sets()):
        for targets, controls in zip(sets["targets"], sets["controls"], strict=True):
            for target, control in zip(targets, controls, strict=True):
                if (labels.context[target], labels.batch[target]) in there:
                    assert labels.batch[control] == labels.batch[target]
    perturbed = np.flatnonzero(~labels.is_control)
    alone = sum((labels.context[i], labels.batch[i]) not in there for i in perturbed)
    assert sampler.without_same_batch() == alone
    assert SetSampler(labels, everything(labels), set_size, seed).without_same_batch() == 0


@patient
@given(screens(), st.integers(2, 5), st.integers(0, 5), st.data())
def test_sets_are_a_pure_function_of_seed_and_number(
    labels: Labels, set_size: int, seed: int, data: st.DataObject
) -> None:
    whole = SetSampler(labels, everything(labels), set_size, seed).sets(run_of(0, 12))
    assert whole["number"].tolist() == list(range(12))  # of the whole sequence, not of the epoch
    sampler = SetSampler(labels, everything(labels), set_size, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), max_size=4)))
    ranges = [(a, b) for a, b in zip([0, *cuts], [*cuts, 12], strict=True) if b > a]
    parts = {}
    for a, b in data.draw(st.permutations(ranges)):  # in any order, in any slicing
        parts[a] = sampler.sets(run_of(a, b - a))
    assert sets_equal(joined(*(parts[a] for a in sorted(parts))), whole)


def wide_labels() -> Labels:
    context = np.repeat([0, 1], 40)
    perturbation = np.tile(np.repeat([0, 1, 2, 3], [8, 15, 7, 10]), 2)
    return make_labels(context, perturbation, np.arange(80) % 3)


def test_a_batch_of_twice_the_size_is_two_batches_in_a_row() -> None:
    labels = wide_labels()
    sampler = SetSampler(labels, everything(labels), 4, 0)
    for number in range(5):
        large = sampler.sets(run_of(number * 6, 6))
        assert sets_equal(large, joined(sampler.sets(run_of(number * 6, 3)), sampler.sets(run_of(number * 6 + 3, 3))))


def test_threads_that_ask_in_any_order_get_the_same_sets() -> None:
    labels = wide_labels()
    alone = SetSampler(labels, everything(labels), 4, 0)
    shared = SetSampler(labels, everything(labels), 4, 0)
    numbers = list(range(60))
    random.Random(0).shuffle(numbers)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(numbers, pool.map(lambda i: shared.sets(run_of(3 * i, 3)), numbers), strict=True))
    assert all(sets_equal(found[i], alone.sets(run_of(3 * i, 3))) for i in range(60))


def test_epochs_and_seeds_differ() -> None:
    labels = wide_labels()
    sampler = SetSampler(labels, everything(labels), 4, 0)
    n = sampler.sets_per_epoch
    first = sampler.sets(run_of(0, n))
    for other in (sampler.sets(run_of(n, n)), SetSampler(labels, everything(labels), 4, 1).sets(run_of(0, n))):
        assert not np.array_equal(first["targets"], other["targets"])
        assert not np.array_equal(first["controls"], other["controls"])
        assert not np.array_equal(first["perturbation"], other["perturbation"])  # the order of sets too
        together = {frozenset(rows) for rows in first["targets"].tolist()}
        assert not together & {frozenset(rows) for rows in other["targets"].tolist()}  # and which cells share a set


def one_pair(n_perturbed: int) -> Labels:
    """One perturbation of one context with 60 controls, in three batches."""
    perturbation = np.array([0] * 60 + [1] * n_perturbed)
    return make_labels(np.zeros(len(perturbation), int), perturbation, np.arange(len(perturbation)) % 3)


def test_every_set_draws_controls_of_its_own_whatever_epoch_place_seed_or_split_it_is_of() -> None:
    def controls(sets: SetRows) -> list[frozenset[int]]:
        return [frozenset(row) for row in sets["controls"].tolist()]

    labels = one_pair(20)  # 4 sets an epoch
    drawn: list[frozenset[int]] = []
    for seed in (0, 1):
        sampler = SetSampler(labels, everything(labels), 5, seed)
        drawn += controls(sampler.sets(run_of(0, 100))) + controls(sampler.fixed_sets())
    assert len(set(drawn)) == len(drawn) == 208  # of 5.5 million choices: by chance, two agree once in 250 times
    assert frozenset().union(*drawn) == frozenset(np.flatnonzero(labels.is_control).tolist())


def test_the_cells_that_fill_a_short_set_depend_on_the_seed_in_validation_too() -> None:
    labels = one_pair(7)
    fills = {
        tuple(SetSampler(labels, everything(labels), 5, seed).fixed_sets()["targets"][1, 2:].tolist())
        for seed in range(6)
    }
    assert len(fills) > 1


def test_with_same_batch_no_control_stands_twice_in_a_set_where_its_batch_has_enough() -> None:
    labels = one_pair(12)
    sampler = SetSampler(labels, everything(labels), 12, 0, same_batch=True)  # 4 cells of each batch, 20 controls
    for sets in (sampler.sets(run_of(0, 20)), sampler.fixed_sets()):
        assert all(len(set(row)) == 12 for row in sets["controls"].tolist())


def test_cells_outside_the_mask_are_never_drawn() -> None:
    labels = wide_labels()
    mask = np.arange(len(labels)) % 2 == 0
    sets = SetSampler(labels, mask, 4, 0).sets(run_of(0, 50))
    assert mask[sets["targets"]].all() and mask[sets["controls"]].all()


def test_control_cells_are_targets_only_when_asked_for() -> None:
    labels = wide_labels()
    without = SetSampler(labels, everything(labels), 4, 0)
    assert not labels.is_control[without.sets(run_of(0, without.sets_per_epoch))["targets"]].any()
    with_them = SetSampler(labels, everything(labels), 4, 0, control_targets=True)
    sets = with_them.sets(run_of(0, with_them.sets_per_epoch))
    assert set(sets["targets"].ravel().tolist()) == set(range(len(labels)))
    is_control = labels.is_control[sets["targets"]]
    assert (is_control.all(1) | ~is_control.any(1)).all() and (sets["perturbation"][is_control.all(1)] == CONTROL).all()


def test_a_split_without_perturbed_cells_or_a_context_without_controls_is_refused() -> None:
    labels = wide_labels()
    with pytest.raises(InputError, match=r"No perturbed cells"):
        SetSampler(labels, labels.is_control, 4, 0)
    with pytest.raises(InputError, match=r"No control cells in file0 / type1"):
        SetSampler(labels, ~(labels.is_control & (labels.context == 1)), 4, 0)


@patient
@given(screens(), st.integers(2, 6), st.integers(0, 40))
def test_fixed_sets_hold_every_cell_and_a_limit_keeps_every_pair(labels: Labels, set_size: int, limit: int) -> None:
    sampler = SetSampler(labels, everything(labels), set_size, 0)
    whole = sampler.fixed_sets()
    used = Counter(whole["targets"].ravel().tolist())
    assert set(used) == set(np.flatnonzero(~labels.is_control).tolist())
    assert len(whole["targets"]) == sampler.sets_per_epoch
    assert sets_equal(whole, SetSampler(labels, everything(labels), set_size, 0).fixed_sets())

    def pairs(sets: SetRows) -> set[tuple[int, int]]:
        return {(int(labels.context[rows[0]]), int(labels.perturbation[rows[0]])) for rows in sets["targets"]}

    some = sampler.fixed_sets(limit)
    assert pairs(some) == pairs(whole)
    n = len(some["targets"])
    assert whole["number"].tolist() == list(range(len(whole["targets"])))
    assert n == (min(max(limit, len(pairs(whole))), len(whole["targets"])) if limit else len(whole["targets"]))
    assert sets_equal(some, first_of(whole, n))


class OneByOne:
    """The sets as they have been since the first run: a stream of its own for each pair and set, and no sorting.

    A checkpoint keeps no version of this: a run that is resumed must get the sets it was begun with, bit for bit.
    """

    def __init__(self, labels: Labels, mask: np.ndarray, set_size: int, seed: int, same_batch: bool) -> None:
        self.labels, self.mask, self.set_size, self.seed, self.same_batch = labels, mask, set_size, seed, same_batch
        there = mask & ~labels.is_control
        self.pairs = sorted(set(zip(labels.context[there].tolist(), labels.perturbation[there].tolist(), strict=True)))
        self.cells = [
            np.array([i for i in np.flatnonzero(there) if (labels.context[i], labels.perturbation[i]) == pair])
            for pair in self.pairs
        ]

    def filled(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        short = -len(cells) % self.set_size
        extra = rng.choice(cells, short, replace=short > len(cells))
        return np.concatenate([cells, extra]).reshape(-1, self.set_size)

    def pool(self, context: int, batch: int | None = None) -> np.ndarray:
        mine = self.mask & self.labels.is_control & (self.labels.context == context)
        return np.flatnonzero(mine if batch is None else mine & (self.labels.batch == batch))

    def controls(self, key: int, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        context = self.pairs[key][0]
        pool = self.pool(context)
        chosen = rng.choice(pool, self.set_size, replace=len(pool) < self.set_size)
        for batch in sorted(set(self.labels.batch[targets].tolist())) if self.same_batch else []:
            where = np.flatnonzero(self.labels.batch[targets] == batch)
            if len(mine := self.pool(context, batch)):
                chosen[where] = rng.choice(mine, len(where), replace=len(mine) < len(where))
        return chosen

    def of(self, targets: list[np.ndarray], keys: list[int], streams: list[list[int]], first: int = 0) -> SetRows:
        rngs = [np.random.default_rng(stream) for stream in streams]
        return SetRows(
            targets=np.stack(targets),
            controls=np.stack([self.controls(*each) for each in zip(keys, targets, rngs, strict=True)]),
            perturbation=np.array([self.pairs[k][1] for k in keys]),
            number=np.arange(first, first + len(keys)),
        )

    def epoch(self, epoch: int) -> SetRows:
        targets, keys = [], []
        for k, cells in enumerate(self.cells):
            rng = np.random.default_rng([self.seed, 1, epoch, k])
            rows = self.filled(rng.permutation(cells), rng)
            targets += list(rows)
            keys += [k] * len(rows)
        n = len(keys)
        order = np.random.default_rng([self.seed, 2, epoch]).permutation(n)
        streams = [[self.seed, 3, epoch, place] for place in range(n)]
        return self.of([targets[i] for i in order], [keys[i] for i in order], streams, epoch * n)

    def fixed(self) -> SetRows:
        sets = [
            (turn, k, rows)
            for k, cells in enumerate(self.cells)
            for turn, rows in enumerate(self.filled(cells, np.random.default_rng([self.seed, 4, k])))
        ]
        sets.sort(key=lambda each: each[0])  # stable
        keys = [k for _, k, _ in sets]
        return self.of([rows for *_, rows in sets], keys, [[self.seed, 4, k, i] for i, k in enumerate(keys)])


@patient
@given(screens(), st.integers(2, 6), st.sampled_from([0, 1, 42, 2**32, 2**63 - 1]), st.booleans(), st.data())
def test_every_set_is_the_one_of_streams_that_are_seeded_one_by_one(
    labels: Labels, set_size: int, seed: int, same_batch: bool, data: st.DataObject
) -> None:
    mask = labels.is_control | (np.arange(len(labels)) % 5 != data.draw(st.integers(0, 4)))
    if not (mask & ~labels.is_control).any():
        return
    expected = OneByOne(labels, mask, set_size, seed, same_batch)
    sampler = SetSampler(labels, mask, set_size, seed, same_batch=same_batch)
    assert sets_equal(sampler.fixed_sets(), expected.fixed())
    n = sampler.sets_per_epoch
    for epoch in data.draw(st.permutations([0, 1, 7])):
        sets = expected.epoch(epoch)
        numbers = np.array(data.draw(st.permutations(range(n)))) + epoch * n
        for some in np.array_split(numbers, 3):
            if len(some):
                assert sets_equal(sampler.sets(some), at(sets, some - epoch * n))
    over = sampler.sets(run_of(n - 1, 2))  # the last of an epoch and the first of the next
    assert sets_equal(over, joined(at(expected.epoch(0), np.array([n - 1])), at(expected.epoch(1), np.array([0]))))


def test_cells_without_a_batch_are_a_batch_of_their_own_in_each_context() -> None:
    labels = make_labels(np.repeat([0, 1], 6), np.tile([0, 0, 0, 1, 1, 1], 2), np.array([-1, 0, 5] * 4))
    sampler = SetSampler(labels, everything(labels), 3, 0, same_batch=True)
    for sets in (sampler.sets(run_of(0, 8)), sampler.fixed_sets()):
        assert (sets["controls"] == sets["targets"] - 3).all()  # one control of each context and batch
    assert sampler.without_same_batch() == 0


def test_of_an_epoch_only_the_pairs_are_drawn_whose_sets_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(*entropy: int | np.ndarray) -> Iterator[np.random.Generator]:
        if entropy[1] == 1:  # the cells of an epoch: seed, 1, epoch, keys
            drawn.extend(np.asarray(entropy[3]).tolist())
        return streams(*entropy)

    monkeypatch.setattr(sampler_module, "streams", counted)
    labels = make_labels(np.zeros(110, int), np.repeat(np.arange(11), 10))  # ten perturbations of one set each
    sampler = SetSampler(labels, everything(labels), 10, 0)
    sampler.sets(run_of(0, 3))
    assert len(drawn) == 3
    sampler.sets(run_of(2, 3))
    assert len(drawn) == 5
    sampler.sets(run_of(0, 10))
    assert sorted(drawn) == list(range(10))


@pytest.mark.parametrize(("sizes", "expected"), [((3, 4), 8), ((9, 10, 60), 16), ((16, 16), 16), ((200, 300), 128)])
def test_a_fitting_set_holds_what_half_of_the_pairs_fill(sizes: tuple[int, ...], expected: int) -> None:
    perturbation = np.repeat(np.arange(len(sizes) + 1), (50, *sizes)).astype(np.int32)
    n = len(perturbation)
    names = ("ctrl", *(f"p{i}" for i in range(len(sizes))))
    zeros = np.zeros(n, np.int32)
    labels = Labels(("a",), np.array([0, n]), names, perturbation, (("a", "x"),), zeros, zeros)
    size = fitting_set_size(labels, np.ones(n, bool))
    assert size == expected
    sampler = SetSampler(labels, np.ones(n, bool), size, 0)
    assert sampler.filled == sum(-(-cells // size) for cells in sizes) * size / sum(sizes)


@given(screens(), st.integers(1, 5))
@patient
def test_other_controls_are_of_the_same_context_and_always_the_same(labels: Labels, size: int) -> None:
    drawn, again = (SetSampler(labels, everything(labels), size, 3) for _ in range(2))
    sets = drawn.fixed_sets()
    others = drawn.other_controls(sets)
    assert others.shape == sets["controls"].shape and labels.is_control[others].all()
    np.testing.assert_array_equal(labels.context[others], labels.context[sets["controls"]])
    np.testing.assert_array_equal(others, again.other_controls(sets))
