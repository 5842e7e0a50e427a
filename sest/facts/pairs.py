"""The held-out pairs of a run, as its checkpoint predicts them, scored beside every baseline.

Shapes: K (context, perturbation) pairs, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from sest.evaluation.means import query_of
from sest.evaluation.pairs import HeldOut, held_out, measured_effects, pair_metrics, predicted_means
from sest.facts.scores import MODEL
from sest.head.model import StateTransition
from sest.machine.devices import autocast, choose_precision
from sest.runs.checkpoint import Checkpoint

MOST_RANKED = 150  # pairs of a context that get a pds: ranking grows with their square
VALUES_AT_ONCE = 2**22  # predicted by a CPU: larger arrays are new memory at every pass


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
    cells = resident_cells(data.targets, data.embeddings, data.embedding_row, device)
    blend = checkpoint.blend() if checkpoint.has_blend else None
    needs_head = checkpoint.has_head and (blend is None or blend.of_head > 0)
    model = checkpoint.model().to(device) if needs_head else None
    results, fitted = [], None if blend is None else blend.baselines
    perturbed = data.mask[~data.labels.is_control]
    for bit in (VAL, TEST):
        if (perturbed & bit).any():
            held = held_out(data, config, bit, n_sets, fitted)
            fitted = held.fitted  # for the other split
            results.append(_results(data, bit, held, _effects(data, config, bit, held, model, cells, blend), blend))
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
    control, parts = held.pairs.control, dict[str, np.ndarray]()
    if blend is None or blend.weights.means.get(STACK, 0.0) > 0:
        parts[STACK] = held.baselines[STACK] - control
    if model is not None:
        weights = {HEAD: 1.0} if blend is None else blend.weights.means
        asked = [name for name in (HEAD, ANCHORED) if weights.get(name, 0.0) > 0]
        size = config.batch_size
        if cells.device.type == "cpu":
            size = max(1, min(size, VALUES_AT_ONCE // (config.set_size * cells.n_genes)))
        cast = partial(autocast, cells.device, choose_precision("auto", cells.device, training=False))
        features = torch.from_numpy(data.features.matrix).to(cells.device)
        progress.begin(f"Predicting the {SPLIT_NAMES[bit]} split", (1 + (ANCHORED in asked)) * len(held.pair), "sets")

        def means(features: torch.Tensor) -> np.ndarray:
            return predicted_means(
                model, cells, held, features, size, cast, each=lambda sets, _: progress.advance(len(sets["number"]))
            )

        predicted = means(features)
        parts[HEAD] = measured_effects(data, held.pairs, predicted - control)
        if ANCHORED in asked:
            of_controls = means(features[:1].expand_as(features))
            parts[ANCHORED] = measured_effects(data, held.pairs, predicted - of_controls)
    if blend is None:
        return parts[HEAD] if model is not None else parts[STACK]
    return blend.effect(parts) if parts else np.zeros_like(control)


def _results(data: Dataset, bit: int, held: HeldOut, effects: np.ndarray, blend: Blend | None) -> PairResults:
    """The scores of a split's pairs; effects: (K, G) predicted."""
    labels, pairs, control = data.labels, held.pairs, held.pairs.control
    contexts = [labels.contexts[c] for c in pairs.context]
    cell_types = ["/".join(c) if len(labels.groups) > 1 else c[1] for c in contexts]
    perturbations = [labels.perturbations[p] for p in pairs.perturbation]
    means, never = np.maximum(control + effects, 0.0), set(data.never_learned())
    keys = pd.DataFrame({"cell_type": cell_types, "perturbation": perturbations, "n_real": pairs.n_cells})
    predictors = {MODEL: means, **held.baselines}
    progress.begin(f"Scoring the {SPLIT_NAMES[bit]} split", len(predictors), "predictors")
    tables = []
    for name, predicted in predictors.items():
        scores = pair_metrics(data, pairs, predicted, most_ranked=MOST_RANKED)
        tables.append(keys.assign(predictor=name, **scores))
        progress.advance(1)
    of_own = pairs.own
    per_cell = 1 / pairs.n_cells + 1 / pairs.controls.n_cells[of_own]
    noise = np.sqrt(pairs.controls.variance[of_own] * per_cell[:, None])
    return PairResults(
        split=SPLIT_NAMES[bit],
        cell_types=cell_types,
        perturbations=perturbations,
        n_cells=pairs.n_cells,
        scores=pd.concat(tables, ignore_index=True),
        observed=(pairs.observed - control).astype(np.float32),
        predicted=(means - control).astype(np.float32),
        of_stack=(held.baselines[STACK] - control).astype(np.float32),
        noise=noise.astype(np.float32),
        context=pairs.context,
        perturbation=pairs.perturbation,
        n_sets=len(held.pair),
        of_sets=held.n_sets,
        n_not_learned=sum(name in never for name in perturbations),
        weights=() if blend is None else tuple(blend.said(query_of(data, pairs))),
    )
