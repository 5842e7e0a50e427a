"""What a prediction's file says of itself in uns["sest"], for people and for `sest evaluate`. G genes of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sest import __version__
from sest.cache import Cache
from sest.cells.columns import Columns
from sest.data.dataset import Dataset
from sest.data.targets import compare_scales
from sest.data.vectors import ONE_HOT
from sest.errors import InputError
from sest.evaluation.baselines import predict_baselines
from sest.evaluation.means import training_means
from sest.files.cell_file import CellFile
from sest.prediction.controls import Pool
from sest.prediction.draws import control_rows
from sest.prediction.requests import Request
from sest.runs.checkpoint import Checkpoint

RECORD = "sest"  # what a prediction says of itself stands below this name in uns


def is_source(path: Path, cache: Cache) -> bool:
    """Whether an .h5ad holds the cells of one of a cache's files, whatever its name; a prediction does not.

    A cache knows its files by what they hold, not by where they are.
    """
    try:
        with CellFile(path) as file:
            if "uns" in file.root and RECORD in file.root["uns"]:
                return False
            alike = [g for g in cache.groups.values() if (g.n_cells, g.n_genes) == (file.n_cells, file.n_genes)]
            return any(group.obs.index.equals(file.obs.index) for group in alike)
    except (InputError, OSError):  # not the cells of anything
        return False


def provenance(checkpoint: Checkpoint, data: Dataset, columns: Columns, missing_genes: str) -> dict[str, Any]:
    """Columns, scale, and where the cells come from; `missing_genes`: how those of new controls were filled."""
    state, scale = checkpoint.state, data.targets.scale
    is_log1p = scale == "log1p"
    if scale == "mixed" and compare_scales(data.cache, data.targets.target_sum) is None:
        scale = "counts"  # the log1p files are of the same total
    return {
        "columns": {key: value for key, value in columns.as_kept().items() if key != "batch"},
        "scale": scale,
        **({} if is_log1p else {"target_sum": data.targets.target_sum}),
        "provenance": {
            "sest_version": __version__,
            "checkpoint": checkpoint.folder.name,
            "run": checkpoint.folder.parent.name,
            "step": state["step"],
            "model_sha256": state["files"]["model.safetensors"],
            "cache_sha256": data.cache.sha256,
            "encoder": state["encoder"]["name"],
            "licence": state["encoder"]["licence"] or "",
            **({} if missing_genes == "error" else {"missing_genes": missing_genes}),
        },
    }


def baselines(
    requests: Sequence[Request], seed: int, data: Dataset, vectors: Mapping[str, np.ndarray], places: np.ndarray | None
) -> dict[str, Any]:
    """Pseudobulks of the baselines, (pairs, genes of the file), around the mean of the controls in this file.

    `sest evaluate` subtracts that mean again: a baseline's effect is then what it learned, whichever controls a
    template asks for.

    Args:
        seed: of the choice of control cells.
        vectors: features (P,) of the perturbations that are predicted.
        places: where the file's genes stand among the run's; None: all, in its order.
    """
    pairs = list(dict.fromkeys((r.pool.cell_type, r.perturbation) for r in requests if not r.is_control))
    control = _control_means(requests, seed)
    features = None if data.features.source == ONE_HOT else {**data.features.as_mapping(), **vectors}
    means = np.stack([control[cell_type] for cell_type, _ in pairs])
    predicted = predict_baselines(training_means(data), [name for _, name in pairs], means, features)
    return {
        "baselines": {
            name: (values if places is None else values[:, places]).astype(np.float32)
            for name, values in predicted.items()
        },
        "pairs": {
            key: np.array([pair[i] for pair in pairs], dtype=object)
            for i, key in enumerate(("cell_type", "perturbation"))
        },
    }


def _control_means(requests: Sequence[Request], seed: int) -> dict[str, np.ndarray]:
    """Mean (G,) float64 of each cell type's controls that are written; of its whole pool where none are."""
    parts: dict[str, list[tuple[Pool, np.ndarray]]] = {}
    for request in requests:
        if request.is_control:
            parts.setdefault(request.pool.cell_type, []).append((request.pool, control_rows(request, seed)))
    for request in requests:
        pool = request.pool
        parts.setdefault(pool.cell_type, [(pool, np.arange(len(pool)))])
    means = {}
    for cell_type, chosen in parts.items():
        sums = np.stack([np.asarray(pool.expression[rows].sum(0, dtype=np.float64)).ravel() for pool, rows in chosen])
        means[cell_type] = sums.sum(0) / sum(len(rows) for _, rows in chosen)
    return means
