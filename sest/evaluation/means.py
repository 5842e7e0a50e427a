"""Pseudobulks of the cells of a run: of the (context, perturbation) pairs of a split, and the effects in training.

Shapes: N cells, K pairs, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from weakref import WeakKeyDictionary

import numpy as np

from sest import progress
from sest.baselines.effects import Contexts, Effects, Query
from sest.cache.derived import Blocks, copied, keep_derived, read_derived
from sest.cache.disk import sha256
from sest.cells.split_file import TEST, TRAIN
from sest.data.dataset import Dataset
from sest.data.gather import group_sums, ordered_sums
from sest.data.labels import CONTROL, NOTHING, Labels, pair_counts
from sest.data.targets import Targets
from sest.evaluation.ceiling import Ceiling, Folds, ceiling, deal, n_folds, score_halves

OTHER_PAIRS = 50  # of a context, that help to say whether there is an effect there
ROWS_AT_ONCE = 256
BLOCK_BYTES = 2**24  # of means, made at one time
NAME = "means"  # of what is kept beside the cache
_MADE: WeakKeyDictionary[Dataset, Means] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Means:
    """Mean log1p cells of all (context, perturbation) pairs of a cache, whatever their split: splits divide no pair."""

    key: np.ndarray  # (K,) int64, ascending: context * perturbations + perturbation; controls are perturbation 0
    n_cells: np.ndarray  # (K,)
    mean: np.ndarray  # (K, G) float32, added up in float64
    context: np.ndarray  # (C,) codes of the contexts with controls, ascending
    n_controls: np.ndarray  # (C,)
    control: np.ndarray  # (C, G) float64 mean of the controls
    variance: np.ndarray  # (C, G) float64 between them

    def at(self, key: np.ndarray) -> np.ndarray:
        """Where the pairs (n,) stand."""
        place = np.searchsorted(self.key, key)
        assert np.array_equal(self.key[np.minimum(place, len(self.key) - 1)], key), "a pair without cells"
        return place


def keys_of(labels: Labels) -> np.ndarray:
    """(N,) int key of the pair that a cell is of, as in `Means`; -1 for cells that are left out."""
    n = len(labels.perturbations)
    key: np.ndarray = labels.context.astype(np.int32 if n * len(labels.contexts) < 2**31 else np.int64)
    key *= n  # in place: there may be many cells
    key += labels.perturbation
    key[labels.perturbation == NOTHING] = -1
    return key


def means_of(data: Dataset) -> Means:
    """Means of all pairs: those kept beside the cache; else computed from all cells, and kept there."""
    if data not in _MADE:
        labels, targets = data.labels, data.targets
        of = json.dumps([data.cache.sha256, targets.genes, labels.perturbations, labels.contexts])
        key = {"of": sha256(of.encode()), "target_sum": targets.target_sum}
        names = [field.name for field in fields(Means)]
        found = read_derived(data.cache.storage, NAME, key, names)
        if found is None:
            made = _made(data)
            keep_derived(data.cache.storage, NAME, key, made)
            found = read_derived(data.cache.storage, NAME, key, names)  # mapped, the system may drop them
            found = found or {name: part.whole() if isinstance(part, Blocks) else part for name, part in made.items()}
        _MADE[data] = Means(**found)
    return _MADE[data]


def _made(data: Dataset) -> dict[str, np.ndarray | Blocks]:
    """The arrays of `Means`; the means of all pairs, some GB of many, a block at a time."""
    targets, cell_key = data.all_targets(), keys_of(data.labels)
    rows = np.argsort(cell_key, kind="stable")[np.count_nonzero(cell_key < 0) :]  # the cells, pair by pair
    key, n_cells = np.unique(cell_key[rows], return_counts=True)
    key, first = key.astype(np.int64), np.cumsum(n_cells) - n_cells
    n_perturbations, n_genes = len(data.labels.perturbations), len(targets.genes)
    values = n_genes, targets.indptr, targets.indices, targets.data, targets.factor
    at_once = max(BLOCK_BYTES // (4 * n_genes), 1)

    def blocks() -> Iterator[np.ndarray]:
        progress.begin("Means of all pairs", len(key), "pairs")
        for start in range(0, len(key), at_once):
            n = n_cells[start : start + at_once]
            mine = rows[first[start] : first[start] + n.sum()]
            yield ordered_sums(mine, n, *values, mean=True, dtype=np.float32)[0]
            progress.advance(len(n))

    pairs = np.flatnonzero(key % n_perturbations == CONTROL)
    context = key[pairs] // n_perturbations
    controls, n_controls = np.concatenate([rows[first[i] : first[i] + n_cells[i]] for i in pairs]), n_cells[pairs]
    control, squares = ordered_sums(controls, n_controls, *values, squared=len(context), mean=True)
    return {
        "key": key,
        "n_cells": n_cells,
        "mean": Blocks((len(key), n_genes), np.dtype(np.float32), blocks),
        "context": context,
        "n_controls": n_controls,
        "control": control,
        "variance": np.maximum(squares / n_controls[:, None] - control**2, 0.0),
    }


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pseudobulks of the (context, perturbation) pairs of a split, beside those of their controls. K pairs, G genes."""

    context: np.ndarray  # (K,) codes of Labels.contexts
    perturbation: np.ndarray  # (K,) codes of Labels.perturbations
    n_cells: np.ndarray  # (K,)
    observed: np.ndarray  # (K, G) float32
    controls: Contexts
    own: np.ndarray  # (K,) index into `controls`

    @property
    def control(self) -> np.ndarray:
        """(K, G) float64."""
        means: np.ndarray = self.controls.mean[self.own]
        return means


def split_pairs(data: Dataset, bit: int) -> Pairs:
    """Pseudobulks of all perturbed cells and of the controls of a split."""
    labels, mask, means = data.labels, data.in_split(bit), means_of(data)
    counts = pair_counts(labels, mask & (labels.perturbation > CONTROL))
    context, perturbation = np.nonzero(counts)
    n_cells = counts[context, perturbation]
    at = means.at(context * len(labels.perturbations) + perturbation)
    assert np.array_equal(means.n_cells[at], n_cells), "a split divides a pair"
    contexts = np.unique(context)
    own = np.searchsorted(means.context, contexts)
    n_controls = pair_counts(labels, mask & labels.is_control)[contexts, CONTROL]
    assert np.array_equal(means.n_controls[own], n_controls), "a split divides the controls of a context"
    names = tuple(context_name(data, int(c)) for c in contexts)
    controls = Contexts(names, means.control[own], means.variance[own], n_controls)
    return Pairs(context, perturbation, n_cells, copied(means.mean, at), controls, np.searchsorted(contexts, context))


def context_name(data: Dataset, context: int) -> str:
    """What baselines call a context: its file in the cache and its cell type."""
    return "/".join(data.labels.contexts[context])


@dataclass(frozen=True)
class SplitCeiling:
    """What the real cells of a context show of each other."""

    of_split: Ceiling | None  # over the perturbations of the split; None where they have too few cells, or unasked for
    verdict: str  # "", or why no score in this context means anything: over other perturbations than the test's too
    n_pairs: int  # of the split in this context
    context: int  # code of Labels.contexts
    controls: Folds  # one group, of the genes that were measured


def split_ceilings(data: Dataset, bit: int, seed: int, *, of_split: bool = True) -> list[SplitCeiling]:
    """Ceilings of the contexts of a split; up to OTHER_PAIRS more perturbations help to say whether there is an effect.

    Controls are those of the split; perturbed cells of the test split take no part unless it is that one.

    Args:
        of_split: whether the ceilings of the split are wanted; without, the verdicts take a quarter of the time.
    """
    labels, mask, targets = data.labels, data.in_split(bit), data.all_targets()
    usable = mask if bit == TEST else mask | ~(data.in_split(TEST) | labels.is_control)  # controls: the split's
    contexts = np.flatnonzero(pair_counts(labels, mask & ~labels.is_control).any(1)).tolist()
    return [
        _ceiling_in(data, targets, context, mask & here, usable & here, seed, of_split)
        for context in contexts
        for here in [labels.context == context]
    ]


def _ceiling_in(
    data: Dataset, targets: Targets, context: int, mask: np.ndarray, usable: np.ndarray, seed: int, asked: bool
) -> SplitCeiling:
    """That of one context: its cells of the split, and those that may take part, both (N,) bool."""
    labels, measured = data.labels, data.measured_in(context)
    perturbed = labels.perturbation * (usable & ~labels.is_control)  # CONTROL for all other cells
    mine = np.setdiff1d(perturbed[mask], [CONTROL])
    pairs = np.concatenate([mine, np.setdiff1d(perturbed, [*mine, CONTROL, NOTHING])[:OTHER_PAIRS]])
    folds = n_folds(1 + len(pairs), len(targets.genes))
    genes = np.array(targets.genes)[slice(None) if measured is None else measured].tolist()

    def folded(cells: np.ndarray, chosen: np.ndarray) -> Folds:
        """Sums of those of the cells (n,) that are of these codes of perturbations (m,)."""
        group = np.full(len(labels.perturbations) + 1, -1)  # NOTHING is the last
        group[chosen] = np.arange(len(chosen))
        of_cell = group[labels.perturbation[cells]]
        cells, of_cell = cells[of_cell >= 0], of_cell[of_cell >= 0]
        code, n = of_cell * folds + deal(of_cell, folds, seed), len(chosen) * folds
        values = len(targets.genes), targets.indptr, targets.indices, targets.data, targets.factor
        sums, n_cells, _ = group_sums(code, n, *values, rows=cells, dtype=np.float32)
        sums = sums if measured is None else sums[:, measured]
        return Folds(sums.reshape(len(chosen), folds, -1), n_cells.reshape(len(chosen), folds), seed)

    controls = folded(np.flatnonzero(usable & labels.is_control), np.array([CONTROL]))
    cells, names = np.flatnonzero(np.isin(perturbed, pairs)), [labels.perturbations[p] for p in mine]
    n_cells = np.bincount(perturbed[cells], minlength=len(labels.perturbations))[pairs]
    halves = score_halves(controls, n_cells, lambda rows: folded(cells, pairs[rows]), names, genes, all_scores=asked)
    name = " / ".join(labels.contexts[context])
    whole, of_split = ceiling(controls, halves, name), None
    if asked:
        of_split = ceiling(controls, halves.first(len(mine)), name)
    return SplitCeiling(of_split, whole.verdict() if whole else "", len(mine), context, controls)


def training_effects(data: Dataset) -> Effects:
    """Effects of the training perturbations, from which the baselines learn."""
    pairs = split_pairs(data, TRAIN)
    delta = pairs.observed
    for start in range(0, len(delta), ROWS_AT_ONCE):  # in place: all of it in float64 would be twice as much
        rows = slice(start, start + ROWS_AT_ONCE)
        delta[rows] -= pairs.controls.mean[pairs.own[rows]]
    perturbations, pair = np.unique(pairs.perturbation, return_inverse=True)
    return Effects(
        controls=pairs.controls,
        perturbations=tuple(data.labels.perturbations[p] for p in perturbations),
        features=data.features.matrix[perturbations],
        delta=delta,
        context=pairs.own,
        perturbation=pair,
        n_cells=pairs.n_cells,
        measured=_measured(data, pairs),
    )


def _measured(data: Dataset, pairs: Pairs) -> np.ndarray | None:
    """(contexts, G) bool of the contexts of `Pairs.controls`; None: all have all genes."""
    masks = [data.measured_in(int(context)) for context in np.unique(pairs.context)]
    return None if any(mask is None for mask in masks) else np.array(masks)


def query_of(data: Dataset, pairs: Pairs) -> Query:
    """What asks the baselines for the effects of these pairs."""
    names = tuple(data.labels.perturbations[p] for p in pairs.perturbation)
    return Query(pairs.controls, pairs.own, names, data.features.matrix[pairs.perturbation])
