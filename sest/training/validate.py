"""Validation during training: the loss on held-out cells and pseudobulk metrics, each beside its baselines.

val_loss is the training loss; energy_distance that of different cells alone, by which heads and baselines are compared.
Shapes: K (context, perturbation) pairs, G genes. Baselines: see sest.baselines. `real_half` is half of the real cells,
see sest.evaluation.ceiling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from sest.cells.split_file import VAL
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells
from sest.data.sampler import SetRows
from sest.evaluation.ceiling import independent_pearson_delta, means_of_halves
from sest.evaluation.means import split_ceilings
from sest.evaluation.pairs import held_out, mean_scores, pair_metrics, predicted_means, some_sets
from sest.head.loss import ObservedSets, is_energy_distance
from sest.machine.team import ALONE, Team
from sest.runs.curves import NOT_LEARNED, NOT_MEASURABLE, VAL_PAIRS, WITH_CELLS

logger = logging.getLogger(__name__)

BASELINES = "baselines"  # in a checkpoint's state.json: what `Validator.to_keep` gives
FOLLOWED_SETS = 64  # the first so many say how far predicted means follow their controls
PDS_PAIRS = 500  # of a context, that get a pds in training: ranking grows with their square


class Validator:
    """Holds the validation sets and everything about them that does not change during training."""

    def __init__(
        self,
        data: Dataset,
        cells: ResidentCells,
        config: TrainConfig,
        device: torch.device,
        criterion: Callable[[Tensor, Tensor], Tensor],
        team: Team = ALONE,
        known: Mapping[str, float | None] | None = None,
    ) -> None:
        """`known`: `to_keep` of an earlier process of the same run."""
        self._team = team
        self.data, self.cells, self._device, self._criterion = data, cells, device, criterion
        self._size = config.batch_size // team.size
        self.held = held_out(data, config, VAL, config.val_sets)
        self.sets = self.held.sets
        self._features = torch.from_numpy(data.features.matrix).to(device)
        self._seed = config.seed
        self._ceilings = split_ceilings(data, VAL, config.seed, of_split=False)
        self._within = torch.empty(len(self.held.pair), device=device)  # mean distances of the sets' real cells,
        self._known = np.zeros(len(self.held.pair), bool)  # those that were computed
        self._controls = {c.context: c.controls for c in self._ceilings}
        for verdict in filter(None, (c.verdict for c in self._ceilings)):
            logger.warning(f"Validation: {verdict}")
        for ceiling in self._ceilings:
            if ceiling.n_pairs > PDS_PAIRS:
                name = " / ".join(data.labels.contexts[ceiling.context])
                logger.info(f"Validation: pds ranks {PDS_PAIRS} of the {ceiling.n_pairs:,} pairs of {name}, drawn.")
        self.not_measurable = np.array([c.context for c in self._ceilings if c.verdict], int)  # codes of contexts
        if known is not None:
            self.baselines = {name: np.nan if value is None else value for name, value in known.items()}

    @property
    def can_rank(self) -> bool:
        """Whether a context has several validation pairs, and so a pds."""
        return any(ceiling.n_pairs > 1 for ceiling in self._ceilings)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Scores of the baselines, and what else stands beside each validation: computed at the first one."""
        found, ceilings = self._baselines(), split_ceilings(self.data, VAL, self._seed)
        found[VAL_PAIRS] = sum(c.n_pairs for c in ceilings)
        found[NOT_MEASURABLE] = sum(c.n_pairs for c in ceilings if c.verdict)
        halves = means_of_halves([c.of_split for c in ceilings if c.of_split is not None])
        halves["pearson_delta_independent"] = halves.pop("pearson_delta", np.nan)  # each half has its own controls
        found |= {f"{metric}_real_half": score for metric, score in halves.items() if np.isfinite(score)}
        names = self.data.perturbations_in(VAL)
        if set(names) <= set(self.data.never_learned()):  # kept beside the scores, for whoever reads them
            found[NOT_LEARNED] = len(names)
        return dict(sorted(found.items()))  # the order in which a checkpoint keeps them

    def to_keep(self) -> dict[str, float | None] | None:
        """The scores of the baselines as JSON holds them; None before they were computed."""
        found = self.__dict__.get("baselines")
        return None if found is None else {k: None if np.isnan(value) else value for k, value in found.items()}

    def _baselines(self) -> dict[str, float]:
        """Metrics of the baselines; their cells are the sets' own controls, moved by the mean effect."""
        held = self.held
        n_sets = len(held.pair)
        losses, distances = dict.fromkeys(WITH_CELLS, 0.0), dict.fromkeys(WITH_CELLS, 0.0)
        n_known = dict.fromkeys(WITH_CELLS, 0)
        shifts = {
            name: torch.from_numpy(held.baselines[name] - held.pairs.control).float().to(self._device)
            for name in WITH_CELLS
        }
        size = 1 if self._device.type == "cpu" else self._size  # a set stays in a processor's cache
        for start in range(0, n_sets, size):
            part = slice(start, start + size)
            sets = some_sets(self.sets, part)
            target, measured = self.cells.expression(sets["targets"]), self.cells.measured(sets["targets"])
            controls, observed = self.cells.expression(sets["controls"]), self._observed(sets, target)
            pair = torch.as_tensor(held.pair[part])
            for name, shift in shifts.items():
                moved = controls if name == "controls" else (controls + shift[pair].unsqueeze(1)).clamp_min_(0)
                moved = moved if measured is None else moved * measured
                loss, distance = self._losses(observed, moved, target, (sets["controls"],))
                losses[name] += float(loss.sum())
                distances[name] += float(distance.nansum())
                n_known[name] += int(distance.isfinite().sum())
        result = {f"val_loss_{name}": total / n_sets for name, total in losses.items()}
        result |= {f"energy_distance_{name}": _mean(total, n_known[name]) for name, total in distances.items()}
        for name, means in held.baselines.items():
            result |= {f"{metric}_{name}": value for metric, value in self._metrics(means, follows=1.0).items()}
        return result

    def _observed(self, sets: SetRows, target: Tensor) -> ObservedSets:
        """The real cells of some sets."""
        rows, numbers = np.searchsorted(self.sets["number"], sets["number"]), sets["targets"]
        at = torch.as_tensor(rows, device=self._device)
        if self._known[rows].all():
            return ObservedSets(target, numbers=numbers, within=self._within[at])
        found = ObservedSets(target, numbers=numbers)
        self._within[at], self._known[rows] = found.within, True
        return found

    def _losses(
        self,
        observed: ObservedSets,
        predicted: Tensor,
        target: Tensor,
        controls: tuple[np.ndarray] | tuple[np.ndarray, np.ndarray],
        other: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The training loss and the energy distance of different cells of every set, (B,); NaN where it has none."""
        loss, distance = observed.energy_distances(predicted, other=other, controls=controls)
        return (loss if is_energy_distance(self._criterion) else self._criterion(predicted, target)), distance

    def _metrics(self, predicted: np.ndarray, follows: float) -> dict[str, float]:
        """Means over the pairs of pearson_delta, also with independent controls, mae and pds.

        Args:
            predicted: (K, G).
            follows: how much of a change in the mean of the pairs' controls that follows; baselines follow it wholly.
        """
        pairs = self.held.pairs
        scores = pair_metrics(self.data, pairs, predicted, most_ranked=PDS_PAIRS)
        independent = np.full(len(predicted), np.nan)
        for context, controls in self._controls.items():
            mine, genes = pairs.context == context, self.data.measured_in(context)
            ours, observed, control = (
                side[mine] if genes is None else side[mine][:, genes]
                for side in (predicted, pairs.observed, pairs.control)
            )
            independent[mine] = independent_pearson_delta(controls, 0, ours, observed, control[0], follows)
        if np.isfinite(independent).any():  # else no context has enough controls
            scores["pearson_delta_independent"] = independent
        return mean_scores(scores)

    def run(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[None]]) -> dict[str, float]:
        """Validate: val_loss and energy_distance (means over sets), and the metrics of `_metrics` (means over pairs).

        Those of the baselines stand beside them.
        """
        total = torch.zeros(5, dtype=torch.float64, device=self._device)

        def add_losses(sets: SetRows, predicted: Tensor) -> None:
            target, measured = self.cells.expression(sets["targets"]), self.cells.measured(sets["targets"])
            rows = np.searchsorted(self.sets["number"], sets["number"])
            perturbation = torch.as_tensor(sets["perturbation"], device=self._device)
            with autocast():
                other = model(self.cells.basal(self.held.other_controls[rows]), self._features[perturbation])
            if measured is not None:
                predicted, other = predicted * measured, other * measured
            controls = sets["controls"], self.held.other_controls[rows]
            loss, distance = self._losses(self._observed(sets, target), predicted, target, controls, other)
            total[0] += loss.double().sum()
            total[1] += distance.double().nansum()
            total[4] += distance.isfinite().sum()
            if rows[0] < FOLLOWED_SETS:
                mine = torch.from_numpy(rows < FOLLOWED_SETS).to(self._device)
                before, after = (self.cells.expression(numbers).float().mean(1)[mine] for numbers in controls)
                by, of = (predicted.float().mean(1) - other.float().mean(1))[mine].double(), (before - after).double()
                total[2] += (by * of).sum()
                total[3] += of.square().sum()

        means = predicted_means(
            model, self.cells, self.held, self._features, self._size, autocast, team=self._team, each=add_losses
        )
        self._team.sum(total)
        loss, distance, product, square, n_known = total.tolist()
        loss, distance = loss / len(self.held.pair), _mean(distance, n_known)
        follows = product / square if square > 0 else 0.0  # as in sest.prediction.cells.Followed, of the head alone
        return {"val_loss": loss, "energy_distance": distance, **self._metrics(means, follows), **self.baselines}


def _mean(total: float, n: float) -> float:
    """NaN of nothing."""
    return total / n if n else float("nan")
