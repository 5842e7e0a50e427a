"""What a run's cache and its checkpoint add: the held-out pairs, predicted, and maps of cells and embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sest.cache import Cache, open_cache
from sest.cache.schema import CacheError
from sest.cells.splits import SplitRow
from sest.data.dataset import Dataset, read_dataset
from sest.errors import Error, InputError
from sest.facts.cells import CellMap, map_pairs
from sest.facts.embeddings import EmbeddingMap, map_embeddings
from sest.facts.pairs import PairResults, predict_pairs
from sest.facts.run import RunFacts
from sest.runs.provenance import check_data, require_sources
from sest.runs.run_folder import own_cache, stored_features


@dataclass(frozen=True, eq=False)
class CacheFacts:
    """What a run's cache adds; each part is None where it could not be made, and `notes` say why."""

    attributes: dict[str, Any]  # of the cache; empty where it cannot be opened
    table: list[SplitRow] | None
    genes: tuple[str, ...]
    pairs: list[PairResults] | None
    cells: CellMap | None  # predicted, real and control cells of some pairs
    map: EmbeddingMap | None
    notes: dict[str, str]  # "table", "pairs", "map" -> one sentence


def read_cache(run: RunFacts, *, n_sets: int, device: torch.device, umap: bool = False) -> CacheFacts:
    """Read a run's cache, predict its held-out pairs and map its cells; what is not possible is noted.

    Args:
        n_sets: sets of each split to predict at most, but one of every pair; 0: all.
        device: to predict on.
        umap: also lay the embeddings out by UMAP.
    """
    notes: dict[str, str] = {}
    try:
        cache = _open(run)
        if run.checkpoint is not None:
            cache = cache.as_of(run.checkpoint.state["cache_sha256"])
    except InputError as error:
        return CacheFacts({}, None, (), None, None, None, dict.fromkeys(("table", "pairs", "map"), str(error)))
    data, pairs, cells, embedded = None, None, None, None
    try:
        data = _read_data(run, cache)
        if run.checkpoint is None:
            raise InputError(run.problem)
        check_data(run.checkpoint, data)
        pairs = predict_pairs(run.checkpoint, run.config, data, n_sets, device)
        cells = map_pairs(run.checkpoint, run.config, data, pairs, device)
    except Error as error:
        notes["table" if data is None else "pairs"] = notes["pairs"] = str(error)
    try:
        embedded = map_embeddings(cache, umap=umap)
    except Error as error:
        notes["map"] = str(error)
    table, genes = (data.table, data.targets.genes) if data is not None else (None, ())
    return CacheFacts(cache.attributes, table, genes, pairs, cells, embedded, notes)


def _open(run: RunFacts) -> Cache:
    try:
        return open_cache(run.given_cache or own_cache(run.folder, run.provenance))
    except CacheError as error:
        raise InputError(f"The run's cache cannot be opened: {error}") from error


def _read_data(run: RunFacts, cache: Cache) -> Dataset:
    config = run.config
    require_sources(config.perturbations)
    return read_dataset(cache, config, stored=stored_features(run.checkpoint), only_controls=True)
