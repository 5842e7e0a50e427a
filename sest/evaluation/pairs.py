"""What a head predicts for the (context, perturbation) pairs of a split, and how close that comes.

Shapes: K pairs, S cells a set, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sest import progress
from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.blend.blend import ANCHORED, HEAD
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells
from sest.data.sampler import SetRows, SetSampler
from sest.evaluation.means import Pairs, query_of, split_pairs, training_effects
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, mean_score, pearson_delta
from sest.machine.team import ALONE, Team


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The cells of a split in fixed sets, and the pairs these belong to."""

    pairs: Pairs
    fitted: Baselines  # on the training split
    baselines: dict[str, np.ndarray]  # their names -> (K, G) float32 pseudobulks
    sets: SetRows
    pair: np.ndarray  # (sets,) the pair of every set
    n_sets: int  # of all its cells; a limit takes fewer of them


def held_out(data: Dataset, config: TrainConfig, bit: int, at_most: int) -> HeldOut:
    """The pairs of a split and its sets, at most `at_most` of them but one of every pair (0: every cell once).

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
    fitted = Baselines().fit(training_effects(data))
    baselines = baseline_pseudobulks(fitted, query_of(data, pairs))
    if data.targets.measured is not None:
        shift = {name: measured_effects(data, pairs, means - pairs.control) for name, means in baselines.items()}
        baselines = {name: (pairs.control + effects).astype(np.float32) for name, effects in shift.items()}
    return HeldOut(pairs, fitted, baselines, sets, pair, sampler.sets_per_epoch)


def some_sets(sets: SetRows, part: slice) -> SetRows:
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
) -> np.ndarray:
    """Mean predicted cell of every pair, over its sets.

    Args:
        features: (perturbations, P) on the cells' device.
        size: sets a forward pass.
        each: is given every batch of sets and the cells predicted for them, (B, S, G).

    Returns:
        (K, G) float64.
    """
    sums = torch.zeros(len(held.pairs.context), cells.n_genes, dtype=torch.float64, device=cells.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for number, start in enumerate(range(0, len(held.pair), size)):
            if not team.ranks.owns(number):
                continue
            part = slice(start, start + size)
            sets = some_sets(held.sets, part)
            basal, perturbation = cells.basal(sets["controls"]), torch.as_tensor(sets["perturbation"])
            with autocast():
                predicted = model(basal, features[perturbation.to(cells.device)])
            if each is not None:
                each(sets, predicted)
            sums.index_add_(0, torch.as_tensor(held.pair[part], device=cells.device), predicted.double().mean(1))
    model.train(was_training)
    counts = np.bincount(held.pair, minlength=len(sums))
    means: np.ndarray = team.sum(sums).cpu().numpy() / counts[:, None]
    return means


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
        return predicted_means(
            model,
            cells,
            held,
            features,
            size,
            cast,
            each=lambda sets, _: progress.advance(len(sets["perturbation"])),
        )

    predicted, of_controls = means(features), means(features[:1].expand_as(features))
    effects = {HEAD: predicted - held.pairs.control, ANCHORED: predicted - of_controls}
    return {name: measured_effects(data, held.pairs, effect) for name, effect in effects.items()}


def measured_effects(data: Dataset, pairs: Pairs, effects: np.ndarray) -> np.ndarray:
    """Effects (K, G) of the pairs, 0 where the file of a pair lacks the gene."""
    if data.targets.measured is None:
        return effects
    masks = [data.measured_in(context) for context in pairs.context.tolist()]
    return np.where(np.array(masks), effects, 0.0)


def pair_metrics(data: Dataset, pairs: Pairs, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """pearson_delta, mae and pds (within its context) of every pair, each (K,). predicted: (K, G) log1p.

    pds is NaN where a context has one perturbation.
    """
    found = {name: np.empty(len(predicted)) for name in ("pearson_delta", "mae", "pds")}
    for context in np.unique(pairs.context).tolist():
        mine, measured = pairs.context == context, data.measured_in(context)
        names = [data.labels.perturbations[p] for p in pairs.perturbation[mine]]
        sides, genes = [predicted[mine], pairs.observed[mine], pairs.control[mine]], list(data.targets.genes)
        if measured is not None:
            sides, genes = [side[:, measured] for side in sides], np.array(genes)[measured].tolist()
        ours, observed, control = sides
        found["pearson_delta"][mine] = pearson_delta(ours, observed, control)
        found["mae"][mine] = mean_absolute_error(ours, observed)
        found["pds"][mine] = discrimination_score(ours, observed, control[0], names, genes)
    return found


def mean_scores(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of every score over its pairs; of pds over those that have one, NaN where none has."""
    return {name: mean_score(name, values) for name, values in scores.items()}
