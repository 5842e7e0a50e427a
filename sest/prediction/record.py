"""What a prediction's file says of itself, for people and for `sest evaluate`: labels of its cells, uns["sest"].

G genes of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from sest import __version__
from sest.baselines.all import Baselines, baseline_pseudobulks
from sest.baselines.effects import Query
from sest.blend.weights import Weights
from sest.cache import Cache
from sest.cells.columns import Columns
from sest.errors import InputError
from sest.evaluation.record import BASELINES_VERSION, DRAW, SOURCE
from sest.files.cell_file import CellFile
from sest.prediction.controls import Pool
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
    """Of all that is written: the template's, or perturbation, cell type and batch of the control cells; draw, control.

    `chosen`: the control cells (n,) that each draw of a request starts from. Draw and control are -1 of real cells.
    """
    tables, n_draws = [], Counter[tuple[str, str]]()
    n_controls, first_control = Counter[str](), dict[int, int]()
    for request, draws in chosen:  # of a cell type in several files draws and controls are counted on
        pool, pair = request.pool, (request.pool.cell_type, request.perturbation)
        if id(pool) not in first_control:
            first_control[id(pool)] = n_controls[pool.cell_type]
            n_controls[pool.cell_type] += len(pool)
        tables.append(_labels(request, draws, columns, n_draws[pair], first_control[id(pool)]))
        n_draws[pair] += len(draws)
    return join_tables(tables)


def _labels(
    request: Request, draws: Sequence[np.ndarray], columns: Columns, first_draw: int, first_control: int
) -> pd.DataFrame:
    """Of one request; the numbers of its first draw, and of the first control of its pool."""
    chosen = np.concatenate(draws)
    numbers = dict.fromkeys((DRAW, SOURCE), np.full(len(chosen), -1))
    if not request.is_control:
        of_draw = first_draw + np.repeat(np.arange(len(draws)), [len(rows) for rows in draws])
        numbers = {DRAW: of_draw, SOURCE: first_control + chosen}
    if request.obs is not None:
        return request.obs.assign(**numbers)
    pool = request.pool
    names = pool.names[chosen]
    if not request.is_control:
        names = np.array([f"{pool.cell_type}_{request.perturbation}_{i}" for i in range(request.n_cells)])
    table = {
        str(columns.perturbation): request.perturbation,
        str(columns.cell_type): pool.cell_type,
        str(columns.batch): pool.batches[chosen],
        **numbers,
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


def baselines(fitted: Baselines, asked: Sequence[Request], query: Query, places: np.ndarray | None) -> dict[str, Any]:
    """Pseudobulks of the baselines, (pairs, genes of the file), and the control means that effects are added to.

    Those are of all controls of a pool, as for the model, whichever of them are written: `sest evaluate` subtracts them
    again. A pair that is predicted from the controls of several files has the mean over its cells.

    Args:
        fitted: on the training split.
        asked: all that is predicted.
        query: the same.
        places: where the file's genes stand among the run's; None: all, in its order.
    """
    found = baseline_pseudobulks(fitted, query)
    del found["controls"]  # `sest evaluate` has the real ones
    pools = list({id(request.pool): request.pool for request in asked}.values())
    if places is not None:
        beside = {id(pool): _extra_mean(pool) for pool in pools}
        extra = np.stack([beside[id(request.pool)] for request in asked])
        found = {name: np.hstack([values, extra])[:, places] for name, values in found.items()}
    labels = pd.MultiIndex.from_tuples([(request.pool.cell_type, request.perturbation) for request in asked])
    codes, pairs = labels.factorize()
    if len(pairs) < len(asked):
        n_cells = np.array([request.n_cells for request in asked], np.float64)
        share = scipy.sparse.csr_matrix((n_cells, (codes, np.arange(len(asked)))))
        share = scipy.sparse.diags(1 / np.asarray(share.sum(1)).ravel()) @ share
        found = {name: (share @ values).astype(np.float32) for name, values in found.items()}
    cell_types = sorted({pool.cell_type for pool in pools})
    means = np.stack([_mean_of([pool for pool in pools if pool.cell_type == name]) for name in cell_types])
    return {
        "baselines": found,
        "baselines_version": BASELINES_VERSION,
        "pairs": {
            key: pairs.get_level_values(i).to_numpy(object) for i, key in enumerate(("cell_type", "perturbation"))
        },
        "controls": {
            "cell_type": np.array(cell_types, dtype=object),
            "mean": means if places is None else means[:, places],
        },
    }


def _extra_mean(pool: Pool) -> np.ndarray:
    """(genes,) float64 of those that the run does not have."""
    return np.zeros(0) if pool.extra is None else np.asarray(pool.extra.mean(0, dtype=np.float64)).ravel()


def _mean_of(pools: Sequence[Pool]) -> np.ndarray:
    """(G and extra genes,) float64 of all cells of some pools."""
    means = [np.concatenate([pool.moments[0], _extra_mean(pool)]) for pool in pools]
    return np.average(means, axis=0, weights=[len(pool) for pool in pools])


def pairs_of(requests: Sequence[Request]) -> list[Request]:
    """The first request of every (cell type, perturbation) that is predicted."""
    first: dict[tuple[str, str], Request] = {}
    for request in requests:
        if not request.is_control:
            first.setdefault((request.pool.cell_type, request.perturbation), request)
    return list(first.values())
