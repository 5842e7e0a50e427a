"""What a head predicts for the (context, perturbation) pairs of a split, and how close that comes.

Shapes: K pairs, S cells a set, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from sest import progress
from sest.baselines.all import AT_ONCE, Baselines, joined, pseudobulk_parts
from sest.baselines.effects import Query
from sest.blend.blend import ANCHORED, HEAD
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells
from sest.data.sampler import SetRows, SetSampler
from sest.evaluation.means import Pairs, query_of, split_pairs, training_effects
from sest.evaluation.metrics import Deviations, Ranking, mean_absolute_error, mean_score
from sest.head.model import StateTransition
from sest.machine.team import ALONE, Team

METRICS = ("pearson_delta", "mae", "pds")  # of means


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The cells of a split in fixed sets, and the pairs these belong to."""

    pairs: Pairs
    fit: Callable[[], Baselines]  # on the training split
    query: Query  # of the pairs
    sets: SetRows
    draw: Callable[[], np.ndarray]  # other controls of the sets
    pair: np.ndarray  # (sets,) the pair of every set
    n_sets: int  # of all its cells; a limit takes fewer of them
    measured: np.ndarray | None  # (K, G) bool: the genes of each pair's file; None: all have all

    @cached_property
    def other_controls(self) -> np.ndarray:
        """(sets, S) other control cells than those in `sets`, drawn by the same rules."""
        return self.draw()

    @cached_property
    def fitted(self) -> Baselines:
        """The baselines, made when they are first asked for: effects of all pairs take the most memory of all this."""
        return self.fit()

    def baseline_parts(self) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        """Stretches of pairs, and name -> (n, G) float32 pseudobulks of each baseline; fitted before the first."""
        for rows, part in pseudobulk_parts(self.fitted, self.query):
            if self.measured is not None:
                control = self.pairs.controls.mean[self.pairs.own[rows]].astype(np.float32)
                part = {name: np.where(self.measured[rows], means, control) for name, means in part.items()}
            yield rows, part

    @cached_property
    def baselines(self) -> dict[str, np.ndarray]:
        """Their names -> (K, G) float32 pseudobulks."""
        return joined(self.baseline_parts(), *self.pairs.observed.shape)

    @cached_property
    def stack(self) -> np.ndarray:
        """(K, G) effects of the stack, cut where a cell would be below zero.

        Predicted apart from the others: the same bits whether these were asked for or not.
        """
        control, effects = self.pairs.control, np.empty(self.pairs.observed.shape)
        for rows, part in self.query.parts(AT_ONCE):
            means = np.maximum(part.control_means + self.fitted.stack.predict(part), 0.0)
            effects[rows] = means.astype(np.float32) - control[rows]
        return effects if self.measured is None else np.where(self.measured, effects, 0.0)


def held_out(data: Dataset, config: TrainConfig, bit: int, at_most: int, fitted: Baselines | None = None) -> HeldOut:
    """The pairs of a split and its sets, at most `at_most` of them but one of every pair (0: every cell once).

    `fitted`: baselines of the training split, where there are some already.

    Raises:
        InputError: no perturbed cells in the split, or a context without controls.
    """
    sampler = SetSampler(
        data.labels, data.in_split(bit), config.set_size, config.seed, same_batch=config.match_controls == "batch"
    )
    sets, pairs = sampler.fixed_sets(at_most), split_pairs(data, bit)
    n_perturbations = len(data.labels.perturbations)
    pair = np.searchsorted(
        pairs.context.astype(np.int64) * n_perturbations + pairs.perturbation,
        data.labels.context[sets["targets"][:, 0]].astype(np.int64) * n_perturbations + sets["perturbation"],
    )
    return HeldOut(
        pairs=pairs,
        fit=lambda: fitted or Baselines().fit(training_effects(data)),
        query=query_of(data, pairs),
        sets=sets,
        draw=lambda: sampler.other_controls(sets),
        pair=pair,
        n_sets=sampler.sets_per_epoch,
        measured=_measured(data, pairs),
    )


def some_sets(sets: SetRows, part: slice | np.ndarray) -> SetRows:
    """A batch of sets."""
    return SetRows(
        targets=sets["targets"][part],
        controls=sets["controls"][part],
        perturbation=sets["perturbation"][part],
        number=sets["number"][part],
    )


def predicted_means(
    model: nn.Module,
    cells: ResidentCells,
    held: HeldOut,
    features: Tensor,
    size: int,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    team: Team = ALONE,
    each: Callable[[SetRows, Tensor], None] | None = None,
    advance: Callable[[int], None] | None = None,
    alike: np.ndarray | None = None,
) -> np.ndarray:
    """Mean predicted cell of every pair, over its sets.

    Args:
        features: (perturbations, P) on the cells' device.
        size: sets a forward pass.
        each: is given every batch of sets and the cells predicted for them, (B, S, G); without it a
            `StateTransition` makes the means alone.
        advance: is told how many sets each batch had.
        alike: (sets,) for each set the one that is predicted in its place; None: each itself.

    Returns:
        (K, G) float64; float32 where every pair has one set, whose mean is then all there is.
    """
    counts = np.bincount(held.pair, minlength=len(held.pairs.context))
    dtype = torch.float32 if counts.max(initial=0) == 1 else torch.float64
    sums = torch.zeros(len(counts), cells.n_genes, dtype=dtype, device=cells.device)
    predicted_for, of_set = np.unique(np.arange(len(held.pair)) if alike is None else alike, return_inverse=True)
    means_alone = model.cell_means if each is None and isinstance(model, StateTransition) else None
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for number, start in enumerate(range(0, len(predicted_for), size)):
            if not team.ranks.owns(number):
                continue
            sets = some_sets(held.sets, predicted_for[start : start + size])
            basal, perturbation = cells.basal(sets["controls"]), torch.as_tensor(sets["perturbation"])
            with autocast():
                predicted = (means_alone or model)(basal, features[perturbation.to(cells.device)])
            if each is not None:
                each(sets, predicted)
            means = (predicted if means_alone else predicted.float().mean(1)).to(dtype)
            mine = np.flatnonzero((of_set >= start) & (of_set < start + size))
            pair, place = (torch.as_tensor(n[mine], device=cells.device) for n in (held.pair, of_set - start))
            sums.index_add_(0, pair, means[place])
            if advance is not None:
                advance(len(means))
    model.train(was_training)
    result: np.ndarray = team.sum(sums).cpu().numpy()
    result /= counts[:, None]
    return result


def head_effects(
    model: nn.Module,
    data: Dataset,
    cells: ResidentCells,
    held: HeldOut,
    size: int,
    cast: Callable[[], AbstractContextManager[None]],
    what: str = "Predicting the validation pairs",
) -> dict[str, np.ndarray]:
    """Effects (K, G) of the pairs as the head predicts them, raw and anchored (see sest.blend.blend).

    `what` names the step for people.
    """
    features = torch.from_numpy(data.features.matrix).to(cells.device)
    progress.begin(what, 2 * len(held.pair), "sets")

    def means(features: Tensor) -> np.ndarray:
        return predicted_means(model, cells, held, features, size, cast, advance=progress.advance)

    predicted, of_controls = means(features), means(features[:1].expand_as(features))
    effects = {HEAD: predicted - held.pairs.control, ANCHORED: predicted - of_controls}
    return {name: measured_effects(data, held.pairs, effect) for name, effect in effects.items()}


def measured_effects(data: Dataset, pairs: Pairs, effects: np.ndarray) -> np.ndarray:
    """Effects (K, G) of the pairs, 0 where the file of a pair lacks the gene."""
    measured = _measured(data, pairs)
    return effects if measured is None else np.where(measured, effects, 0.0)


def _measured(data: Dataset, pairs: Pairs) -> np.ndarray | None:
    """(K, G) bool: the genes that the file of each pair has; None: all have all."""
    if data.targets.measured is None:
        return None
    return np.array([data.measured_in(context) for context in pairs.context.tolist()])


def pair_metrics(
    data: Dataset, pairs: Pairs, predicted: np.ndarray, *, most_ranked: int | None = None
) -> dict[str, np.ndarray]:
    """pearson_delta, mae and pds (within its context) of every pair, each (K,). predicted: (K, G) log1p.

    pds is NaN where a context has one perturbation. Of more than `most_ranked` so many are drawn, always the same, and
    ranked among each other; it is NaN for the rest.
    """
    return metrics_of_some(data, pairs, slice(None), {"": predicted}, most_ranked=most_ranked)[""]


def metrics_of_some(
    data: Dataset,
    pairs: Pairs,
    rows: slice,
    predictors: Mapping[str, np.ndarray],
    *,
    most_ranked: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """The same by several predictors, name -> (n, G), of the pairs in `rows`, which are ranked among all."""
    of = np.arange(len(pairs.context))[rows]
    found = {name: {metric: np.full(len(of), np.nan) for metric in METRICS} for name in predictors}
    for context in np.unique(pairs.context[of]).tolist():
        measured = data.measured_in(context)
        columns = slice(None) if measured is None else measured
        control = pairs.controls.mean[pairs.own[of[pairs.context[of] == context][0]]][columns].astype(np.float64)
        ranked = _ranked(pairs, context, most_ranked)
        genes, names = np.array(data.targets.genes)[columns].tolist(), pairs.perturbation[ranked]
        ranking = Ranking(pairs.observed[ranked][:, columns], [data.labels.perturbations[p] for p in names], genes)
        mine = np.flatnonzero(pairs.context[of] == context)
        for start in range(0, len(mine), AT_ONCE):
            at = mine[start : start + AT_ONCE]
            observed, has_rank = pairs.observed[of[at]][:, columns], np.isin(of[at], ranked)
            change, own = Deviations.of(observed - control), np.searchsorted(ranked, of[at][has_rank])
            for name, predicted in predictors.items():
                ours, scores = predicted[at][:, columns], found[name]
                scores["pearson_delta"][at] = Deviations.of(ours - control).correlation(change)
                scores["mae"][at] = mean_absolute_error(ours, observed)
                scores["pds"][at[has_rank]] = ranking.scores(ours[has_rank], own)
    return found


def _ranked(pairs: Pairs, context: int, most: int | None) -> np.ndarray:
    """The pairs of a context that get a pds, in order."""
    mine = np.flatnonzero(pairs.context == context)
    if most is None or len(mine) <= most:
        return mine
    return mine[np.sort(np.random.default_rng(len(mine)).choice(len(mine), most, replace=False))]


def mean_scores(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of every score over its pairs; of pds over those that have one, NaN where none has."""
    return {name: mean_score(name, values) for name, values in scores.items()}
