"""What a prediction's file says of itself, for people and for `sest evaluate`: labels of its cells, uns["sest"].

G genes of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sest import __version__
from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.baselines.effects import Query
from sest.blend.weights import Weights
from sest.cache import Cache
from sest.cells.columns import Columns
from sest.errors import InputError
from sest.evaluation.record import BASELINES_VERSION, DRAW
from sest.files.cell_file import CellFile
from sest.prediction.controls import Pool
from sest.prediction.draws import control_rows
from sest.prediction.requests import Request
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import Known
from sest.runs.schema import MODEL

RECORD = "sest"  # what a prediction says of itself stands below this name in uns
COUNTS_RECORD = "sest_submission"  # of one of counts


def join_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One obs table: text as categories, used categories only, every name once."""
    from anndata.utils import make_index_unique  # slow to import

    table = pd.concat(tables)
    table.index = make_index_unique(table.index.astype(str))
    for name, column in table.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.cat.remove_unused_categories()
        elif pd.api.types.is_string_dtype(column.dtype) or column.dtype == object:
            table[name] = pd.Categorical(column.where(column.isna(), column.astype(str)))
    return table


def labels_of(chosen: Sequence[tuple[Request, Sequence[np.ndarray]]], columns: Columns) -> pd.DataFrame:
    """Of all that is written: the template's, or perturbation, cell type and batch of the control cells; and the draw.

    `chosen`: the control cells (n,) that each draw of a request starts from. The draw is -1 of real controls.
    """
    return join_tables([_labels(request, draws, columns) for request, draws in chosen])


def _labels(request: Request, draws: Sequence[np.ndarray], columns: Columns) -> pd.DataFrame:
    chosen = np.concatenate(draws)
    of_draw = np.full(len(chosen), -1)
    if not request.is_control:
        of_draw = np.repeat(np.arange(len(draws)), [len(rows) for rows in draws])
    if request.obs is not None:
        return request.obs.assign(**{DRAW: of_draw})
    pool = request.pool
    names = pool.names[chosen]
    if not request.is_control:
        names = np.array([f"{pool.cell_type}_{request.perturbation}_{i}" for i in range(request.n_cells)])
    table = {
        str(columns.perturbation): request.perturbation,
        str(columns.cell_type): pool.cell_type,
        str(columns.batch): pool.batches[chosen],
        DRAW: of_draw,
    }
    return pd.DataFrame(table, index=pd.Index(names, dtype=str))


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


def provenance(
    checkpoints: Sequence[Checkpoint],
    known: Known,
    columns: Columns,
    missing_genes: str,
    weights: Sequence[Weights | None],
) -> dict[str, Any]:
    """Columns, scale, and where the cells come from.

    Args:
        missing_genes: how those of new controls were filled.
        weights: what the parts of the prediction count, of every checkpoint; None: the head alone.
    """
    checkpoint = checkpoints[0]
    state, scale = checkpoint.state, known.scale
    is_log1p = scale == "log1p"
    if scale == "mixed" and known.is_one_scale:
        scale = "counts"  # the log1p files are of the same total
    return {
        "columns": {key: value for key, value in columns.as_kept().items() if key != "batch"},
        "scale": scale,
        **({} if is_log1p else {"target_sum": known.target_sum}),
        "provenance": {
            "sest_version": __version__,
            "checkpoint": checkpoint.folder.name,
            "run": checkpoint.folder.parent.name,
            "step": state["step"],
            "model_sha256": state["files"].get(MODEL, ""),
            "cache_sha256": known.cache_sha256,
            "encoder": state["encoder"]["name"],
            "licence": state["encoder"]["licence"] or "",
            **({} if missing_genes == "error" else {"missing_genes": missing_genes}),
            **_of_several(checkpoints),
        },
        **_blend(weights),
    }


def _of_several(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """The other members of an ensemble."""
    if len(checkpoints) == 1:
        return {}
    names = [f"{c.folder.parent.name}/{c.folder.name}" for c in checkpoints]
    return {"ensemble": np.array(names, dtype=object)}


def _blend(weights: Sequence[Weights | None]) -> dict[str, Any]:
    """Mean weights of the parts over the members."""
    means = [{"head": 1.0} if w is None else w.means for w in weights]
    names = sorted({name for one in means for name in one})
    mean = {name: float(np.mean([one.get(name, 0.0) for one in means])) for name in names}
    return {"blend": mean | {"controls": max(1.0 - sum(mean.values()), 0.0)}}


def baselines(
    fitted: Baselines, requests: Sequence[Request], seed: int, query: Query, places: np.ndarray | None
) -> dict[str, Any]:
    """Pseudobulks of the baselines, (pairs, genes of the file), around the mean of the controls in this file.

    `sest evaluate` subtracts that mean again: a baseline's effect is then what it learned, whichever controls a
    template asks for.

    Args:
        fitted: on the training split.
        requests: all that is written.
        seed: of the choice of control cells.
        query: the pairs, each once (see `pairs_of`).
        places: where the file's genes stand among the run's; None: all, in its order.
    """
    control, pairs = _control_means(requests, seed), pairs_of(requests)
    means = np.empty_like(query.controls.mean)
    for context, request in zip(query.context.tolist(), pairs, strict=True):
        means[context] = control[request.pool.cell_type][: means.shape[1]]
    found = baseline_pseudobulks(fitted, query, means)
    del found["controls"]  # `sest evaluate` has the real ones
    if places is not None:
        extra = np.stack([control[request.pool.cell_type][means.shape[1] :] for request in pairs])
        found = {name: np.hstack([values, extra])[:, places] for name, values in found.items()}
    labels = [(request.pool.cell_type, request.perturbation) for request in pairs]
    return {
        "baselines": found,
        "baselines_version": BASELINES_VERSION,
        "pairs": {
            key: np.array([label[i] for label in labels], dtype=object)
            for i, key in enumerate(("cell_type", "perturbation"))
        },
    }


def pairs_of(requests: Sequence[Request]) -> list[Request]:
    """The first request of every (cell type, perturbation) that is predicted."""
    first: dict[tuple[str, str], Request] = {}
    for request in requests:
        if not request.is_control:
            first.setdefault((request.pool.cell_type, request.perturbation), request)
    return list(first.values())


def _control_means(requests: Sequence[Request], seed: int) -> dict[str, np.ndarray]:
    """Mean (G, and extra genes) float64 of each cell type's controls that are written; of its pool where none are."""
    parts: dict[str, list[tuple[Pool, np.ndarray]]] = {}
    for request in requests:
        if request.is_control:
            parts.setdefault(request.pool.cell_type, []).append((request.pool, control_rows(request, seed)))
    for request in requests:
        pool = request.pool
        parts.setdefault(pool.cell_type, [(pool, np.arange(len(pool)))])
    means = {}
    for cell_type, chosen in parts.items():
        sums = np.stack(
            [
                np.asarray(pool.whole(rows, pool.expression[rows]).sum(0, dtype=np.float64)).ravel()
                for pool, rows in chosen
            ]
        )
        means[cell_type] = sums.sum(0) / sum(len(rows) for _, rows in chosen)
    return means
