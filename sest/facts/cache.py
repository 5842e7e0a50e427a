"""What a run's cache and its checkpoint add: the held-out pairs, predicted, and a map of the embeddings.

Shapes: K (context, perturbation) pairs, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from sest.blend.blend import HEAD, STACK
from sest.cache import Cache, open_cache
from sest.cache.schema import CacheError
from sest.cells.split_file import SPLIT_NAMES, TEST, VAL
from sest.cells.splits import SplitRow
from sest.data.dataset import Dataset, read_dataset
from sest.data.resident import resident_cells
from sest.errors import Error, InputError
from sest.evaluation.means import query_of
from sest.evaluation.metrics import pearson_delta
from sest.evaluation.pairs import HeldOut, head_effects, held_out, pair_metrics
from sest.machine.devices import autocast, choose_precision
from sest.report.embedding_map import EmbeddingMap, map_cells
from sest.report.run_facts import RunFacts
from sest.runs.provenance import check_data, require_sources
from sest.runs.run_folder import own_cache, stored_features


@dataclass(frozen=True, eq=False)
class PairResults:
    """The pairs of one split, predicted by the checkpoint."""

    split: str  # "val" or "test"
    cell_types: list[str]  # (K,)
    perturbations: list[str]  # (K,)
    n_cells: np.ndarray  # (K,)
    effect: np.ndarray  # (K,) L2 norm over genes of the observed change
    scores: dict[str, np.ndarray]  # pearson_delta, mae, pds, stack (its pearson_delta): each (K,)
    observed: np.ndarray  # (K, G) change of the mean log1p expression against the controls
    predicted: np.ndarray  # (K, G)
    n_sets: int  # predicted
    of_sets: int  # there are
    n_not_learned: int = 0  # pairs of perturbations that training says nothing about
    weights: tuple[str, ...] = ()  # what head and baselines count in the prediction, a sentence each kind of pair


@dataclass(frozen=True, eq=False)
class CacheFacts:
    """What a run's cache adds; each part is None where it could not be made, and `notes` say why."""

    attributes: dict[str, Any]  # of the cache; empty where it cannot be opened
    table: list[SplitRow] | None
    genes: tuple[str, ...]
    pairs: list[PairResults] | None
    map: EmbeddingMap | None
    notes: dict[str, str]  # "table", "pairs", "map" -> one sentence


def read_cache(run: RunFacts, *, n_sets: int, device: torch.device) -> CacheFacts:
    """Read a run's cache, predict its held-out pairs and map its cells; what is not possible is noted.

    Args:
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
        device: to predict on.
    """
    notes: dict[str, str] = {}
    try:
        cache = _open(run)
        if run.checkpoint is not None:
            cache = cache.as_of(run.checkpoint.state["cache_sha256"])
    except InputError as error:
        return CacheFacts({}, None, (), None, None, dict.fromkeys(("table", "pairs", "map"), str(error)))
    data, pairs, cells = None, None, None
    try:
        data = _read_data(run, cache)
        pairs = _predict(run, data, n_sets, device)
    except Error as error:
        notes["table" if data is None else "pairs"] = notes["pairs"] = str(error)
    try:
        cells = map_cells(cache)
    except Error as error:
        notes["map"] = str(error)
    table, genes = (data.table, data.targets.genes) if data is not None else (None, ())
    return CacheFacts(cache.attributes, table, genes, pairs, cells, notes)


def _open(run: RunFacts) -> Cache:
    try:
        return open_cache(run.given_cache or own_cache(run.folder, run.provenance))
    except CacheError as error:
        raise InputError(f"The run's cache cannot be opened: {error}") from error


def _read_data(run: RunFacts, cache: Cache) -> Dataset:
    config = run.config
    require_sources(config.perturbations)
    return read_dataset(cache, config, stored=stored_features(run.checkpoint), only_controls=True)


def _predict(run: RunFacts, data: Dataset, n_sets: int, device: torch.device) -> list[PairResults]:
    """The pairs of the val and of the test split, as far as there are such splits."""
    if run.checkpoint is None:
        raise InputError(run.problem)
    check_data(run.checkpoint, data)
    cast = partial(autocast, device, choose_precision("auto", device, training=False))
    cells = resident_cells(data.targets, data.embeddings, data.embedding_row, device)
    blend = run.checkpoint.blend() if run.checkpoint.has_blend else None
    model = run.checkpoint.model().to(device) if run.checkpoint.has_head else None
    results, fitted = [], None if blend is None else blend.baselines
    perturbed = data.mask[~data.labels.is_control]
    for bit in (VAL, TEST):
        if (perturbed & bit).any():
            held = held_out(data, run.config, bit, n_sets, fitted)
            control = held.pairs.control
            parts = {STACK: held.stack}
            fitted = held.fitted  # for the other split
            if model is not None:
                what = f"Predicting the {SPLIT_NAMES[bit]} split"
                parts |= head_effects(model, data, cells, held, run.config.batch_size, cast, what)
            effect = parts[HEAD] if blend is None else blend.effect(parts)
            found = _results(SPLIT_NAMES[bit], data, held, np.maximum(control + effect, 0.0))
            said = () if blend is None else tuple(blend.said(query_of(data, held.pairs)))
            results.append(replace(found, weights=said))
    return results


def _results(split: str, data: Dataset, held: HeldOut, means: np.ndarray) -> PairResults:
    """The scores of a split's pairs; means: (K, G) predicted log1p."""
    labels, pairs, control = data.labels, held.pairs, held.pairs.control
    contexts = [labels.contexts[c] for c in pairs.context]
    change = pairs.observed - control
    never = set(data.never_learned())
    baseline = pearson_delta(control + held.stack, pairs.observed, control)
    return PairResults(
        split=split,
        cell_types=["/".join(c) if len(labels.groups) > 1 else c[1] for c in contexts],
        perturbations=[labels.perturbations[p] for p in pairs.perturbation],
        n_cells=pairs.n_cells,
        effect=np.linalg.norm(change, axis=1),
        scores={**pair_metrics(data, pairs, means), STACK: baseline},
        observed=change,
        predicted=means - control,
        n_sets=len(held.pair),
        of_sets=held.n_sets,
        n_not_learned=sum(labels.perturbations[p] in never for p in pairs.perturbation),
    )
