"""The held-out pairs of a run, as its checkpoint predicts them, scored beside every baseline.

Shapes: K (context, perturbation) pairs, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch

from sest import progress
from sest.baselines.effects import BASELINES
from sest.blend.blend import ANCHORED, HEAD, STACK, Blend
from sest.cells.split_file import SPLIT_NAMES, TEST, VAL
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells, resident_cells
from sest.data.sampler import SetRows
from sest.evaluation.means import query_of
from sest.evaluation.pairs import METRICS, HeldOut, held_out, metrics_of_some, predicted_means
from sest.facts.scores import MODEL
from sest.head.model import StateTransition
from sest.machine.devices import autocast, choose_precision
from sest.runs.checkpoint import Checkpoint

MOST_RANKED = 150  # pairs of a context that get a pds: ranking grows with their square
CONTROL_SETS = 16  # of a context, where not all sets of a split are predicted


@dataclass(frozen=True, eq=False)
class PairResults:
    """The pairs of one split, predicted by the checkpoint."""

    split: str  # "val" or "test"
    cell_types: list[str]  # (K,)
    perturbations: list[str]  # (K,)
    n_cells: np.ndarray  # (K,)
    scores: pd.DataFrame  # a row a (cell_type, perturbation, predictor), as `Evaluation.table`: predictor by predictor
    observed: np.ndarray  # (K, G) change of the mean log1p expression against the controls
    predicted: np.ndarray  # (K, G)
    of_stack: np.ndarray  # (K, G) the same by the baselines together
    variance: np.ndarray  # (C, G) of the controls of each context
    own: np.ndarray  # (K,) index into `variance`
    per_cell: np.ndarray  # (K,) variances of one cell that the observed change has: its pair's cells and its controls
    context: np.ndarray  # (K,) codes of Labels.contexts
    perturbation: np.ndarray  # (K,) codes of Labels.perturbations
    n_sets: int  # predicted
    of_sets: int  # there are
    n_not_learned: int = 0  # pairs of perturbations that training says nothing about
    shares_controls: bool = False  # whether the sets of a context start from CONTROL_SETS draws of its controls
    weights: tuple[str, ...] = ()  # what head and baselines count in the prediction, a sentence each kind of pair

    def of_model(self, metric: str) -> np.ndarray:
        """(K,) scores of the checkpoint."""
        found: np.ndarray = self.scores.loc[self.scores["predictor"] == MODEL, metric].to_numpy(np.float64)
        return found

    @cached_property
    def effect(self) -> np.ndarray:
        """(K,) L2 norm over genes of the observed change."""
        norm: np.ndarray = np.linalg.norm(self.observed, axis=1)
        return norm

    @cached_property
    def sizes(self) -> np.ndarray:
        """(3, K) L2 norms of the effects: observed, less what finite cells add to it, of the model and of the stack."""
        noise = self.variance.sum(1, dtype=np.float64)[self.own] * self.per_cell  # the squared norm of `noise`
        observed = np.sqrt(np.maximum(self.effect.astype(np.float64) ** 2 - noise, 0.0))
        return np.stack([observed, *(np.linalg.norm(side, axis=1) for side in (self.predicted, self.of_stack))])

    def noise(self, pairs: np.ndarray) -> np.ndarray:
        """(n, G) standard errors of the observed changes of some pairs, if their cells spread as the controls do."""
        error: np.ndarray = np.sqrt(self.variance[self.own[pairs]] * self.per_cell[pairs, None])
        return error


def predict_pairs(
    checkpoint: Checkpoint, config: TrainConfig, data: Dataset, n_sets: int, device: torch.device
) -> list[PairResults]:
    """The pairs of the val and of the test split, as far as there are such splits.

    Args:
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
    """
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, device)
    blend = checkpoint.blend() if checkpoint.has_blend else None
    needs_head = checkpoint.has_head and (blend is None or blend.of_head > 0)
    model = checkpoint.model().to(device) if needs_head else None
    results, fitted = [], None if blend is None else blend.baselines
    perturbed = data.mask[~data.labels.is_control]
    for bit in (VAL, TEST):
        if (perturbed & bit).any():
            held = held_out(data, config, bit, n_sets, fitted)
            is_shared = 0 < n_sets < held.n_sets and config.match_controls == "context"
            held = _with_few_controls(data, held) if is_shared else held
            fitted = held.fitted  # for the other split
            means = _head_means(data, config, bit, held, model, cells, blend)
            results.append(replace(_results(data, bit, held, *means, blend), shares_controls=is_shared))
    return results


def _head_means(
    data: Dataset,
    config: TrainConfig,
    bit: int,
    held: HeldOut,
    model: StateTransition | None,
    cells: ResidentCells,
    blend: Blend | None,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(K, G) mean cells as the head predicts them, and as it does their controls; None for what counts nothing."""
    if model is None:
        return None, None
    alike = _first_with_same_controls(held)
    is_anchored = blend is not None and blend.weights.means.get(ANCHORED, 0.0) > 0
    n_alike = len(np.unique(alike)) if is_anchored else 0
    cast = partial(autocast, cells.device, choose_precision("auto", cells.device, training=False))
    features = torch.from_numpy(data.features.matrix).to(cells.device)
    progress.begin(f"Predicting the {SPLIT_NAMES[bit]} split", len(held.pair) + n_alike, "sets")
    means = partial(predicted_means, model, cells, held, size=config.batch_size, autocast=cast)
    predicted = means(features=features, advance=progress.advance)
    if not is_anchored:
        return predicted, None
    of_control = features[:1].expand_as(features)
    return predicted, means(features=of_control, advance=progress.advance, alike=alike)


def _effects(
    control: np.ndarray,
    of_stack: np.ndarray,
    predicted: np.ndarray | None,
    of_controls: np.ndarray | None,
    blend: Blend | None,
) -> np.ndarray:
    """(n, G) effects of some pairs, by the head or blended as `sest predict` does, without parts of no weight."""
    if blend is None:
        return (of_stack if predicted is None else predicted) - control
    parts, weights = dict[str, np.ndarray](), blend.weights.means
    if weights.get(STACK, 0.0) > 0:
        parts[STACK] = of_stack - control
    if predicted is not None and weights.get(HEAD, 0.0) > 0:
        parts[HEAD] = predicted - control
    if predicted is not None and of_controls is not None:
        parts[ANCHORED] = predicted - of_controls
    return blend.effect(parts) if parts else np.zeros_like(control)


def _with_few_controls(data: Dataset, held: HeldOut) -> HeldOut:
    """The same with so few sets of controls in a context that what they are without a perturbation costs little."""
    context, controls = data.labels.context[held.sets["targets"][:, 0]], held.sets["controls"].copy()
    for code in np.unique(context):
        mine = np.flatnonzero(context == code)
        controls[mine] = controls[mine[np.arange(len(mine)) % CONTROL_SETS]]
    return replace(held, sets=SetRows(**{**held.sets, "controls": controls}))


def _first_with_same_controls(held: HeldOut) -> np.ndarray:
    """(sets,) the first set that has the controls of each."""
    _, first, of_set = np.unique(held.sets["controls"], axis=0, return_index=True, return_inverse=True)
    found: np.ndarray = first[of_set.ravel()]
    return found


def _results(
    data: Dataset,
    bit: int,
    held: HeldOut,
    predicted: np.ndarray | None,
    of_controls: np.ndarray | None,
    blend: Blend | None,
) -> PairResults:
    """What a split's pairs are predicted to do, and the scores; predicted, of_controls: of `_head_means`."""
    labels, pairs = data.labels, held.pairs
    contexts = [labels.contexts[c] for c in pairs.context]
    cell_types = ["/".join(c) if len(labels.groups) > 1 else c[1] for c in contexts]
    perturbations = [labels.perturbations[p] for p in pairs.perturbation]
    scores = {name: {metric: np.empty(len(pairs.own)) for metric in METRICS} for name in (MODEL, *BASELINES)}
    observed, changed, of_stack = (np.empty(pairs.observed.shape, np.float32) for _ in range(3))
    progress.begin(f"Scoring the {SPLIT_NAMES[bit]} split", len(pairs.own), "pairs")
    for rows, baselines in held.baseline_parts():
        control = pairs.controls.mean[pairs.own[rows]]
        of_head, of_no_effect = (None if means is None else means[rows] for means in (predicted, of_controls))
        effects = _effects(control, baselines[STACK], of_head, of_no_effect, blend)
        if held.measured is not None:
            effects = np.where(held.measured[rows], effects, 0.0)
        means = np.maximum(control + effects, 0.0)
        sides = ((observed, pairs.observed[rows]), (changed, means), (of_stack, baselines[STACK]))
        for change, side in sides:
            np.subtract(side, control, out=change[rows], casting="same_kind")
        by_predictor = {MODEL: means, **baselines}
        for name, some in metrics_of_some(data, pairs, rows, by_predictor, most_ranked=MOST_RANKED).items():
            for metric, values in some.items():
                scores[name][metric][rows] = values
        progress.advance(len(means))
    keys = pd.DataFrame({"cell_type": cell_types, "perturbation": perturbations, "n_real": pairs.n_cells})
    never = set(data.never_learned())
    return PairResults(
        split=SPLIT_NAMES[bit],
        cell_types=cell_types,
        perturbations=perturbations,
        n_cells=pairs.n_cells,
        scores=pd.concat([keys.assign(predictor=name, **of) for name, of in scores.items()], ignore_index=True),
        observed=observed,
        predicted=changed,
        of_stack=of_stack,
        variance=pairs.controls.variance,
        own=pairs.own,
        per_cell=1 / pairs.n_cells + 1 / pairs.controls.n_cells[pairs.own],
        context=pairs.context,
        perturbation=pairs.perturbation,
        n_sets=len(held.pair),
        of_sets=held.n_sets,
        n_not_learned=sum(name in never for name in perturbations),
        weights=() if blend is None else tuple(blend.said(query_of(data, pairs))),
    )
