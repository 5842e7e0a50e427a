"""The held-out pairs of a run, as its checkpoint predicts them, scored beside every baseline.

Shapes: K (context, perturbation) pairs, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pandas as pd
import torch

from sest import progress
from sest.blend.blend import ANCHORED, HEAD, STACK, Blend
from sest.cells.split_file import SPLIT_NAMES, TEST, VAL
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import ResidentCells, resident_cells
from sest.data.sampler import SetRows
from sest.evaluation.means import Pairs, query_of
from sest.evaluation.pairs import HeldOut, held_out, measured_effects, pair_metrics, predicted_means
from sest.facts.scores import MODEL
from sest.head.model import StateTransition
from sest.machine.devices import autocast, choose_precision
from sest.runs.checkpoint import Checkpoint

MOST_RANKED = 150  # pairs of a context that get a pds: ranking grows with their square
CONTROL_SETS = 16  # of a context, where not all sets of a split are predicted
ROWS_AT_ONCE = 64  # pairs whose effects are blended at one time


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
    noise: np.ndarray  # (K, G) standard error of the observed change, if these cells spread as the controls do
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
        noise = np.linalg.norm(self.noise, axis=1)
        observed = np.sqrt(np.maximum(self.effect.astype(np.float64) ** 2 - noise.astype(np.float64) ** 2, 0.0))
        return np.stack([observed, *(np.linalg.norm(side, axis=1) for side in (self.predicted, self.of_stack))])


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
            effects = _effects(data, config, bit, held, model, cells, blend)
            results.append(replace(_results(data, bit, held, effects, blend), shares_controls=is_shared))
    return results


def _effects(
    data: Dataset,
    config: TrainConfig,
    bit: int,
    held: HeldOut,
    model: StateTransition | None,
    cells: ResidentCells,
    blend: Blend | None,
) -> np.ndarray:
    """(K, G) effects of a split's pairs: of the head, or blended as `sest predict` does, without parts of no weight."""
    weights = {HEAD: 1.0} if blend is None else blend.weights.means
    predicted = of_controls = None
    if model is not None:
        alike = _first_with_same_controls(held)
        n_alike = len(np.unique(alike)) if weights.get(ANCHORED, 0.0) > 0 else 0
        cast = partial(autocast, cells.device, choose_precision("auto", cells.device, training=False))
        features = torch.from_numpy(data.features.matrix).to(cells.device)
        progress.begin(f"Predicting the {SPLIT_NAMES[bit]} split", len(held.pair) + n_alike, "sets")
        means = partial(predicted_means, model, cells, held, size=config.batch_size, autocast=cast)
        predicted = means(features=features, advance=progress.advance)
        if n_alike:
            of_control = features[:1].expand_as(features)
            of_controls = means(features=of_control, advance=progress.advance, alike=alike)
    effects = np.zeros(held.pairs.observed.shape)
    for rows in _blocks(effects):  # all at once, each part would be as large as the result
        parts = dict[str, np.ndarray]()
        control = held.pairs.controls.mean[held.pairs.own[rows]]
        if model is None if blend is None else weights.get(STACK, 0.0) > 0:
            parts[STACK] = held.baselines[STACK][rows] - control
        if predicted is not None and weights.get(HEAD, 0.0) > 0:
            parts[HEAD] = predicted[rows] - control
        if predicted is not None and of_controls is not None:
            parts[ANCHORED] = predicted[rows] - of_controls[rows]
        if blend is None:
            effects[rows] = parts[HEAD if model is not None else STACK]
        elif parts:
            effects[rows] = blend.effect(parts)
    return measured_effects(data, held.pairs, effects)


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


def _blocks(pairs: np.ndarray) -> Iterator[slice]:
    """Rows of (K, G), some at a time."""
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        yield slice(start, start + ROWS_AT_ONCE)


def _changes(pairs: Pairs, means: np.ndarray) -> np.ndarray:
    """(K, G) float32 means of cells minus those of the controls."""
    found = np.empty(means.shape, np.float32)
    for rows in _blocks(found):
        np.subtract(means[rows], pairs.controls.mean[pairs.own[rows]], out=found[rows], casting="same_kind")
    return found


def _results(data: Dataset, bit: int, held: HeldOut, effects: np.ndarray, blend: Blend | None) -> PairResults:
    """The scores of a split's pairs; effects: (K, G) float64 predicted, which become the predicted means."""
    labels, pairs = data.labels, held.pairs
    contexts = [labels.contexts[c] for c in pairs.context]
    cell_types = ["/".join(c) if len(labels.groups) > 1 else c[1] for c in contexts]
    perturbations = [labels.perturbations[p] for p in pairs.perturbation]
    never, means = set(data.never_learned()), effects
    for rows in _blocks(means):  # in place
        np.maximum(pairs.controls.mean[pairs.own[rows]] + means[rows], 0.0, out=means[rows])
    keys = pd.DataFrame({"cell_type": cell_types, "perturbation": perturbations, "n_real": pairs.n_cells})
    predictors = {MODEL: means, **held.baselines}
    progress.begin(f"Scoring the {SPLIT_NAMES[bit]} split", len(predictors), "predictors")
    tables = []
    for name, predicted in predictors.items():
        scores = pair_metrics(data, pairs, predicted, most_ranked=MOST_RANKED)
        tables.append(keys.assign(predictor=name, **scores))
        progress.advance(1)
    noise, per_cell = np.empty(means.shape, np.float32), 1 / pairs.n_cells + 1 / pairs.controls.n_cells[pairs.own]
    for rows in _blocks(noise):
        noise[rows] = np.sqrt(pairs.controls.variance[pairs.own[rows]] * per_cell[rows, None])
    return PairResults(
        split=SPLIT_NAMES[bit],
        cell_types=cell_types,
        perturbations=perturbations,
        n_cells=pairs.n_cells,
        scores=pd.concat(tables, ignore_index=True),
        observed=_changes(pairs, pairs.observed),
        predicted=_changes(pairs, means),
        of_stack=_changes(pairs, held.baselines[STACK]),
        noise=noise,
        context=pairs.context,
        perturbation=pairs.perturbation,
        n_sets=len(held.pair),
        of_sets=held.n_sets,
        n_not_learned=sum(name in never for name in perturbations),
        weights=() if blend is None else tuple(blend.said(query_of(data, pairs))),
    )
