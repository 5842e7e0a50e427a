"""What a prediction must know of the cells that a run was trained on: read with its cache, or kept in its checkpoint.

Shapes: R perturbations with the control, P feature width, W width of one source, G genes.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sest.cells.scale import Normalisation, differing_scales, normalised_to
from sest.cells.split_file import TRAIN
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.features import Features, make_features
from sest.data.targets import normalisations
from sest.data.vectors import DRUGS, GENES, ONE_HOT, WORDS, Source, Vectors, drugs_of, one_hot, read_sources, sources_of
from sest.errors import InputError
from sest.runs.checkpoint import Checkpoint
from sest.runs.provenance import check_features, saw_the_same_split
from sest.runs.run_folder import stored_features

logger = logging.getLogger(__name__)

CELLS = "cells"  # in state.json: what `cells_to_keep` gives


@dataclass(frozen=True, eq=False)
class Known:
    """A run's cells as its predictions need them; `data` are the cells themselves, where its cache was read."""

    config: TrainConfig
    genes: tuple[str, ...]  # (G,)
    target_sum: float
    scale: str  # of the targets: counts, log1p or mixed
    is_one_scale: bool  # whether log1p files, if there are any beside counts, are of the same total
    normalisation: Normalisation  # of the targets
    columns: dict[str, Any]  # as the first file was read
    dim: int  # of an embedding
    dtype: np.dtype  # of a stored embedding
    cache_sha256: str  # "": imported
    perturbations: tuple[str, ...]  # (R,) the control first
    trained: tuple[str, ...] | None  # the perturbations of the training split; None: not known here
    features: Features
    source: str  # what `--perturbations` named, with paths as they are now
    data: Dataset | None = None


def known_with_cells(checkpoint: Checkpoint, data: Dataset, config: TrainConfig, source: str) -> Known:
    """What is known where the run's cache was read; `config` and `source` as `find_data` gives them."""
    kept = cells_to_keep(data)
    return Known(
        config=config,
        genes=data.targets.genes,
        target_sum=data.targets.target_sum,
        scale=data.targets.scale,
        is_one_scale=kept["is_one_scale"],
        normalisation=_normalisation(kept, data.targets.target_sum),
        columns=next(iter(data.cache.groups.values())).attributes["columns"],
        dim=data.cache.dim,
        dtype=data.embeddings.dtype,
        cache_sha256=data.cache.sha256,
        perturbations=data.labels.perturbations,
        trained=tuple(kept["trained"]) if saw_the_same_split(checkpoint, data) else None,
        features=data.features,
        source=source,
        data=data,
    )


def known_without_cells(checkpoint: Checkpoint, perturbations: str | None) -> Known | None:
    """What the checkpoint alone says; None where it is of an earlier sest, or imported.

    Args:
        perturbations: sources of features that may have more perturbations than the run; None: what is kept.

    Raises:
        InputError: unreadable sources, or others than those it was trained with.
    """
    state = checkpoint.state
    kept = state.get(CELLS)
    if kept is None:
        return None
    names = tuple(kept["perturbations"])
    features = _features(checkpoint, names, perturbations)
    return Known(
        config=TrainConfig.from_values(state["config"], str(checkpoint.folder)),
        genes=tuple(state["genes"]),
        target_sum=state["target_sum"],
        scale=state["scale"] or "counts",  # of an imported one it is not known
        is_one_scale=kept["is_one_scale"],
        normalisation=_normalisation(kept, state["target_sum"]),
        columns=state["columns"],
        dim=checkpoint.sizes.dim,
        dtype=np.dtype(kept["dtype"]),
        cache_sha256=state["cache_sha256"] or "",
        perturbations=names,
        trained=tuple(kept["trained"]),
        features=dataclasses.replace(features, missing=tuple(kept["missing"])),
        source=perturbations or features.source,
    )


def cells_to_keep(data: Dataset) -> dict[str, Any]:
    """Plain values for state.json, without which predictions would need the cache."""
    logged = normalisations(data.cache)
    counted = [path for path in data.cache.groups if path not in logged]
    return {
        "perturbations": list(data.labels.perturbations),
        "trained": data.perturbations_in(TRAIN),
        "missing": list(data.features.missing),
        "sources": [source.name for source in data.features.vectors.sources],
        "dtype": str(data.embeddings.dtype),
        "is_one_scale": differing_scales(logged, data.targets.target_sum, counted) is None,
        "normalisation": None if counted else _plain(next(iter(logged.values()))),
    }


def features_to_keep(data: Dataset) -> dict[str, Tensor] | None:
    """Vectors that cannot be had again without the cache or a file: (G, W) of the genes, (R, W) of each file."""
    features, tensors, at = data.features, {}, 0
    for number, source in enumerate(features.vectors.sources):
        if source.name == GENES:
            tensors["genes"] = torch.from_numpy(source.matrix)
        elif source.name not in WORDS:
            tensors[_tensor(number)] = torch.from_numpy(features.matrix[:, at : at + source.width].copy())
        at += source.width
    return tensors or None


def _tensor(number: int) -> str:
    """The name of the tensor with the run's vectors in the source of this number."""
    return f"source-{number}"


def _features(checkpoint: Checkpoint, names: tuple[str, ...], given: str | None) -> Features:
    """Features of the run's perturbations, from what is kept or from the sources that are given."""
    stored = stored_features(checkpoint)
    assert stored is not None
    columns = stored.columns or names[1:]
    if given is not None and given != checkpoint.state["features"]["source"]:
        if GENES in sources_of(given) and stored.loadings is None:
            raise InputError(f"{checkpoint.folder} keeps no vectors of genes. Pass --perturbations with a file.")
        vectors = read_sources(given, names[1:], columns=columns, loadings=stored.loadings)
    else:
        tensors, made = checkpoint.features(), []
        for number, name in enumerate(checkpoint.state[CELLS]["sources"]):
            if name == ONE_HOT:
                made.append(one_hot(names[1:], columns))
            elif name == DRUGS:
                made.append(drugs_of(names[1:]))
            elif name == GENES:
                assert stored.loadings is not None
                made.append(stored.loadings)
            else:
                matrix = tensors[_tensor(number)].numpy()
                made.append(Source(name, {n: row for row, n in enumerate(names) if matrix[row].any()}, matrix))
        vectors = Vectors(checkpoint.state["features"]["source"], tuple(made))
    features = make_features(vectors, names, "zero", needed=frozenset())
    check_features(checkpoint, features)
    return features


def _plain(made: Normalisation) -> dict[str, Any]:
    """As JSON holds it: no numbers of numpy."""
    numbers = {"total": made.total, "sums": made.sums}
    return {"log": made.log, "is_whole": bool(made.is_whole)} | {
        key: None if value is None else np.asarray(value, float).tolist() for key, value in numbers.items()
    }


def _normalisation(kept: dict[str, Any], target_sum: float) -> Normalisation:
    """How targets are normalised: as the log1p files were, where there are no others, else to the target sum."""
    values = kept["normalisation"]
    if values is None:
        return normalised_to(target_sum)
    return Normalisation(**{**values, "sums": tuple(values["sums"]) if values["sums"] else None})


def mean_of_controls(checkpoint: Checkpoint, known: Known) -> np.ndarray:
    """(G,) float32: mean log1p values of the run's control cells; those of training, where its blend keeps them.

    Raises:
        InputError: neither a blend nor the cache says it.
    """
    if checkpoint.has_blend:
        effects = checkpoint.blend().effects
        weight = effects.controls.n_cells[:, None] * (1.0 if effects.measured is None else effects.measured)
        total = np.maximum(np.broadcast_to(weight, effects.controls.mean.shape).sum(0), 1.0)
        return ((weight * effects.controls.mean).sum(0) / total).astype(np.float32)
    if known.data is None:
        raise InputError(
            f"{checkpoint.folder} does not keep the mean of its controls, for genes that are missing: only best/ does, "
            "once training has ended. Pass --cache, or --missing-genes zero."
        )
    data = known.data
    rows = np.flatnonzero(data.labels.is_control)
    total, counts = np.zeros(len(known.genes)), np.zeros(len(known.genes))
    for start in range(0, len(rows), 8192):
        part = rows[start : start + 8192]
        total += np.asarray(data.targets.log1p(part).sum(0), np.float64).ravel()
        measured = data.targets.measured_by(part)
        counts += len(part) if measured is None else measured.sum(0)
    return (total / np.maximum(counts, 1.0)).astype(np.float32)
