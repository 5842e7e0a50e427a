"""Pseudobulks of the cells of a run: of the (context, perturbation) pairs of a split, and the effects in training.

Shapes: N cells, K pairs, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from sest.baselines.effects import Contexts, Effects, Query
from sest.cells.split_file import TEST, TRAIN
from sest.data.dataset import Dataset
from sest.data.labels import NOTHING
from sest.data.targets import Targets
from sest.evaluation.ceiling import Ceiling, Folds, ceiling, deal, n_folds

ROWS_PER_BLOCK = 8192
OTHER_PAIRS = 50  # of a context, that help to say whether there is an effect there


def sums_of(targets: Targets, code: np.ndarray, n_groups: int, squared: int = 0) -> tuple[np.ndarray, ...]:
    """Sums of log1p cells by group, streamed in blocks.

    Args:
        code: (N,) int group of every cell, -1 for cells in none.
        squared: how many of the last groups also get sums of squares.

    Returns:
        (n_groups, G) sums, (n_groups,) cells, (squared, G) sums of squares; float64.
    """
    rows = np.flatnonzero(code >= 0)
    sums, squares = np.zeros((n_groups, len(targets.genes))), np.zeros((squared, len(targets.genes)))
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        values = targets.log1p(block).astype(np.float64)
        member = scipy.sparse.csr_matrix(
            (np.ones(len(block)), (code[block], np.arange(len(block)))), shape=(n_groups, len(block))
        )
        sums += (member @ values).toarray()
        if squared and (code[block] >= n_groups - squared).any():
            squares += (member[n_groups - squared :] @ values.power(2)).toarray()
    return sums, np.bincount(code[rows], minlength=n_groups), squares


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pseudobulks of the (context, perturbation) pairs of a split, beside those of their controls. K pairs, G genes."""

    context: np.ndarray  # (K,) codes of Labels.contexts
    perturbation: np.ndarray  # (K,) codes of Labels.perturbations
    n_cells: np.ndarray  # (K,)
    observed: np.ndarray  # (K, G) float64
    controls: Contexts
    own: np.ndarray  # (K,) index into `controls`

    @property
    def control(self) -> np.ndarray:
        """(K, G) float64."""
        means: np.ndarray = self.controls.mean[self.own]
        return means


def split_pairs(data: Dataset, bit: int) -> Pairs:
    """Pseudobulks of all perturbed cells and of the controls of a split."""
    labels, mask = data.labels, data.in_split(bit)
    n_perturbations = len(labels.perturbations)
    key = np.where(
        mask & ~labels.is_control, labels.context.astype(np.int64) * n_perturbations + labels.perturbation, -1
    )
    keys = np.unique(key[key >= 0])
    context, perturbation = keys // n_perturbations, keys % n_perturbations
    contexts = np.unique(context)
    code = np.full(len(labels), -1)
    code[key >= 0] = np.searchsorted(keys, key[key >= 0])
    controls = mask & labels.is_control & np.isin(labels.context, contexts)
    code[controls] = len(keys) + np.searchsorted(contexts, labels.context[controls])
    n_pairs, n_contexts = len(keys), len(contexts)
    sums, counts, squares = sums_of(data.targets, code, n_pairs + n_contexts, n_contexts)
    assert (counts > 0).all(), "a group without cells"
    means = sums / counts[:, None]
    variance = np.maximum(squares / counts[n_pairs:, None] - means[n_pairs:] ** 2, 0.0)
    names = tuple(context_name(data, int(c)) for c in contexts)
    found = Contexts(names, means[n_pairs:], variance, counts[n_pairs:])
    return Pairs(context, perturbation, counts[:n_pairs], means[:n_pairs], found, np.searchsorted(contexts, context))


def context_name(data: Dataset, context: int) -> str:
    """What baselines call a context: its file in the cache and its cell type."""
    return "/".join(data.labels.contexts[context])


@dataclass(frozen=True)
class SplitCeiling:
    """What the real cells of a context show of each other."""

    of_split: Ceiling | None  # over the perturbations of the split; None where they have too few cells
    verdict: str  # "", or why no score in this context means anything: over other perturbations than the test's too
    n_pairs: int  # of the split in this context
    context: int  # code of Labels.contexts
    controls: Folds  # one group, of the genes that were measured


def split_ceilings(data: Dataset, bit: int, seed: int) -> list[SplitCeiling]:
    """Ceilings of the contexts of a split; up to OTHER_PAIRS more perturbations help to say whether there is an effect.

    Controls are those of the split; perturbed cells of the test split take no part unless it is that one.
    """
    labels, mask = data.labels, data.in_split(bit)
    usable = mask if bit == TEST else mask | ~(data.in_split(TEST) | labels.is_control)  # controls: the split's
    result = []
    for context in np.unique(labels.context[mask & ~labels.is_control]):
        here = usable & (labels.context == context)
        mine = np.unique(labels.perturbation[here & mask & ~labels.is_control])
        others = np.setdiff1d(np.unique(labels.perturbation[here & ~labels.is_control]), [*mine, NOTHING])[:OTHER_PAIRS]
        pairs = np.concatenate([mine, others])
        code = np.full(len(labels), -1)
        code[here & labels.is_control] = 0
        perturbed = here & ~labels.is_control & np.isin(labels.perturbation, pairs)
        place = np.full(len(labels.perturbations), -1)
        place[pairs] = 1 + np.arange(len(pairs))
        code[perturbed] = place[labels.perturbation[perturbed]]
        n_groups, cells = 1 + len(pairs), code >= 0
        folds = n_folds(n_groups, len(data.targets.genes))
        code[cells] = code[cells] * folds + deal(code[cells], folds, seed)
        sums, counts, _ = sums_of(data.targets, code, n_groups * folds)
        measured, genes = data.measured_in(int(context)), list(data.targets.genes)
        if measured is not None:
            sums, genes = sums[:, measured], np.array(genes)[measured].tolist()
        found = Folds(sums.reshape(n_groups, folds, -1), counts.reshape(n_groups, folds), seed)
        name, names = " / ".join(labels.contexts[context]), [labels.perturbations[p] for p in pairs]
        of_split = ceiling(found, 0, 1 + np.arange(len(mine)), name, names[: len(mine)], genes)
        whole = ceiling(found, 0, 1 + np.arange(len(pairs)), name, names, genes) if len(others) else of_split
        controls = Folds(found.sums[:1].copy(), found.n_cells[:1], seed)
        result.append(SplitCeiling(of_split, whole.verdict() if whole else "", len(mine), int(context), controls))
    return result


def training_effects(data: Dataset) -> Effects:
    """Effects of the training perturbations, from which the baselines learn."""
    pairs = split_pairs(data, TRAIN)
    perturbations, pair = np.unique(pairs.perturbation, return_inverse=True)
    return Effects(
        controls=pairs.controls,
        perturbations=tuple(data.labels.perturbations[p] for p in perturbations),
        features=data.features.matrix[perturbations],
        delta=pairs.observed - pairs.control,
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
