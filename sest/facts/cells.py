"""Predicted, real and control cells of some held-out pairs in one map: principal components of their expression.

Shapes: n cells, G genes. Space: log1p, as the run's targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch

from sest import progress
from sest.cells.scale import log1p_rows
from sest.cells.split_file import TEST, VAL
from sest.config import TrainConfig
from sest.data.control_values import columns_of, spread
from sest.data.dataset import Dataset
from sest.data.gather import gene_moments
from sest.facts.embeddings import principal_axes
from sest.facts.pairs import PairResults
from sest.machine.devices import choose_precision
from sest.prediction.cells import Member, predicted_cells
from sest.prediction.controls import cached_pool
from sest.prediction.requests import Request
from sest.runs.checkpoint import Checkpoint

MOST_PAIRS = 6  # of the context with most pairs: those of the largest effects
MOST_CELLS = 60  # of a pair, of either side
MOST_CONTROLS = 200
MOST_STARTS = 4_096  # controls that predicted cells are made from
MOST_GENES = 2_000  # of the components: those that vary most between the real cells


@dataclass(frozen=True, eq=False)
class CellMap:
    """Places (n, 2) along the two principal components of the real cells."""

    split: str
    cell_type: str
    perturbations: list[str]
    real: list[np.ndarray]  # by perturbation
    predicted: list[np.ndarray]
    controls: np.ndarray
    explained: tuple[float, float]  # share of the variance of the real cells along each


def map_pairs(
    checkpoint: Checkpoint,
    config: TrainConfig,
    data: Dataset,
    results: Sequence[PairResults],
    device: torch.device,
    *,
    seed: int = 0,
) -> CellMap | None:
    """Cells of the last split's context with most pairs; None where the run has no held-out pairs.

    Predicted cells are those of `sest predict`, which starts from other draws of controls.
    """
    if not results:
        return None
    result = results[-1]
    context = np.bincount(result.context).argmax()
    mine = np.flatnonzero(result.context == context)
    mine = mine[np.argsort(-result.effect[mine], kind="stable")][:MOST_PAIRS]
    labels, of_split = data.labels, data.in_split(TEST if result.split == "test" else VAL)
    here, rng = of_split & (labels.context == context), np.random.default_rng(seed)
    controls = np.flatnonzero(here & labels.is_control)
    shown = _drawn(controls, MOST_CONTROLS, rng)
    rows = [
        _drawn(np.flatnonzero(here & (labels.perturbation == result.perturbation[k])), MOST_CELLS, rng) for k in mine
    ]
    progress.begin("Reading cells for a map", sum(map(len, rows)), "cells")
    real = [_read(data, of_pair) for of_pair in rows]
    pool = cached_pool(data, _drawn(controls, MOST_STARTS, rng), result.cell_types[mine[0]])
    member = _member(checkpoint, config, data, [result.perturbations[k] for k in mine], device)
    predicted = []
    for k, of_pair in zip(mine, rows, strict=True):
        request = Request(pool, result.perturbations[k], False, len(of_pair))
        of_stack = result.of_stack[k].astype(np.float64)
        predicted.append(scipy.sparse.vstack([c for _, c in predicted_cells(request, [member], [of_stack], seed)]))
    return _laid_out(result, mine, data.targets.log1p(shown), real, predicted)


def _drawn(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _read(data: Dataset, rows: np.ndarray) -> scipy.sparse.csr_matrix:
    """Cells (n,) of the cache as log1p values over the run's genes, one after another: they are few."""
    first, groups, genes = data.labels.first, list(data.cache.groups.values()), list(data.targets.genes)
    found = []
    for row in rows.tolist():
        of = int(np.searchsorted(first, row, side="right")) - 1
        values, columns = groups[of].targets(row - first[of], row - first[of] + 1), columns_of(groups[of], genes)
        found.append(values if columns is None else spread(values, columns))
        progress.advance(1)
    return log1p_rows(scipy.sparse.vstack(found, format="csr"), data.targets.factor[rows])


def _member(
    checkpoint: Checkpoint, config: TrainConfig, data: Dataset, names: Sequence[str], device: torch.device
) -> Member:
    """The run, ready to predict."""
    blend = checkpoint.blend() if checkpoint.has_blend else None
    needs_head = checkpoint.has_head and (blend is None or blend.of_head > 0)
    vectors = dict(zip(data.labels.perturbations, data.features.matrix, strict=True))
    return Member(
        checkpoint=checkpoint,
        model=checkpoint.model().to(device) if needs_head else None,
        blend=blend,
        vectors={name: vectors[name] for name in names},
        control=data.features.matrix[0],
        batch_size=config.batch_size,
        set_size=config.set_size,
        precision=choose_precision("auto", device, training=False),
    )


def _laid_out(
    result: PairResults,
    mine: np.ndarray,
    controls: scipy.sparse.csr_matrix,
    real: list[scipy.sparse.csr_matrix],
    predicted: list[scipy.sparse.csr_matrix],
) -> CellMap:
    """Components of the genes that vary most, from the controls and the real cells."""
    fitted = scipy.sparse.vstack([controls, *real], format="csr")
    mean, variance = gene_moments(fitted)
    genes = np.sort(np.argsort(-variance, kind="stable")[:MOST_GENES])
    basis, explained = principal_axes(fitted[:, genes].astype(np.float64).toarray())

    def places(cells: scipy.sparse.csr_matrix) -> np.ndarray:
        found: np.ndarray = (scipy.sparse.csr_matrix(cells)[:, genes].toarray() - mean[genes]) @ basis.T
        return found

    return CellMap(
        split=result.split,
        cell_type=result.cell_types[mine[0]],
        perturbations=[result.perturbations[k] for k in mine],
        real=[places(cells) for cells in real],
        predicted=[places(cells) for cells in predicted],
        controls=places(controls),
        explained=explained,
    )
