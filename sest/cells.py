"""The cells of a store as training reads them: labels of all cells, embeddings of the controls, targets as one CSR.

Shapes: N cells of all groups in the store's order, E embedding width, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse

from sest.cache import Cache, Group
from sest.errors import InputError, shown
from sest.inputs import group_cells
from sest.progress import Progress
from sest.splits import GroupCells

CONTROL = 0  # code of the control among the perturbations
ROWS_PER_READ = 16_384


@dataclass(frozen=True, eq=False)
class Labels:
    """What every cell is. A context is a cell type within a file: sets and their controls never leave it."""

    groups: tuple[str, ...]  # group paths, in the store's order
    first: np.ndarray  # (groups + 1,) int64: where each group's cells begin
    perturbations: tuple[str, ...]  # code -> name; code 0 is the control, whatever each file calls it
    perturbation: np.ndarray  # (N,) int32
    contexts: tuple[tuple[str, str], ...]  # code -> (group path, cell type)
    context: np.ndarray  # (N,) int32
    batch: np.ndarray  # (N,) int32, unique over all files

    @property
    def is_control(self) -> np.ndarray:
        """(N,) bool."""
        return self.perturbation == CONTROL

    def __len__(self) -> int:
        return len(self.perturbation)


def read_labels(cache: Cache) -> tuple[Labels, list[GroupCells]]:
    """Read the labels of all cells of a store; also as `sest.splits` takes them.

    Raises:
        InputError: a file has no perturbation column or no control cells.
    """
    groups = list(cache.groups.values())
    for group in groups:
        if "perturbation" not in group.obs or not group.attributes["controls"]:
            raise InputError(
                f"{cache.path}: group {group.path} has no perturbation labels or no controls, so nothing can be "
                "trained on it. Embed it with --pert-col and --control."
            )
    tables = [group_cells(g.path, g.dataset, g.obs, str(g.attributes["columns"]["control"])) for g in groups]
    control = tables[0].control
    names = sorted({name for t in tables for name in t.perturbations if name != t.control})
    if both := sorted({t.control for t in tables}.intersection(names)):
        raise InputError(
            f"{cache.path}: '{both[0]}' is the control of one file and a perturbation of another. "
            "Embed again with --control, or rename it in one of them."
        )
    code = {name: i + 1 for i, name in enumerate(names)}
    contexts = [(t.path, name) for t in tables for name in t.cell_types]
    context_code = {pair: i for i, pair in enumerate(contexts)}
    perturbation, context, batch, n_batches = [], [], [], 0
    for t, g in zip(tables, groups, strict=True):
        to_code = np.array([CONTROL if name == t.control else code[name] for name in t.perturbations], np.int32)
        perturbation.append(to_code[t.perturbation])
        to_context = np.array([context_code[t.path, name] for name in t.cell_types], np.int32)
        context.append(to_context[t.cell_type])
        batches = g.obs["batch"].cat
        batch.append(batches.codes.to_numpy(np.int32) + n_batches)
        n_batches += len(batches.categories)
    first = np.cumsum([0, *(g.n_cells for g in groups)])
    labels = Labels(
        tuple(g.path for g in groups),
        first,
        (control, *names),
        np.concatenate(perturbation),
        tuple(contexts),
        np.concatenate(context),
        np.concatenate(batch),
    )
    return labels, tables


@dataclass(frozen=True, eq=False)
class Targets:
    """Expression of all cells, as one CSR over the run's genes, with what turns it into log1p targets."""

    genes: tuple[str, ...]  # (G,)
    indptr: np.ndarray  # (N + 1,) int64
    indices: np.ndarray  # (nnz,) int32
    data: np.ndarray  # (nnz,) int16, int32 or float32
    factor: np.ndarray  # (N,) float32: target_sum / total counts; 0 marks a log1p source, used as it is
    target_sum: float  # counts a cell is normalised to
    scale: str  # "counts", "log1p", or "mixed" over files

    @cached_property
    def matrix(self) -> scipy.sparse.csr_matrix:
        """The values as stored, (N, G)."""
        shape = (len(self.indptr) - 1, len(self.genes))
        return scipy.sparse.csr_matrix((self.data, self.indices, self.indptr), shape=shape, copy=False)

    def log1p(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """Cells (n,) as log1p values, (n, G) CSR float32."""
        return log1p_rows(self.matrix[rows], self.factor[rows])


def log1p_rows(values: scipy.sparse.csr_matrix, factor: np.ndarray) -> scipy.sparse.csr_matrix:
    """log1p(count * factor) of CSR rows; rows with factor 0 hold log1p values already and stay."""
    per_value = np.repeat(factor, np.diff(values.indptr))
    data = values.data.astype(np.float32)
    data = np.where(per_value > 0, np.log1p(data * per_value), data)
    return scipy.sparse.csr_matrix((data, values.indices, values.indptr), shape=values.shape)


def read_targets(cache: Cache, target_sum: str, progress: Progress) -> Targets:
    """Read the targets of all groups into memory, over the genes that all groups have.

    Args:
        target_sum: a number, or "median" of the cells' total counts.

    Raises:
        InputError: no expression values in the store, no gene in common, or an unusable target sum.
    """
    if not cache.attributes.get("targets", True):
        raise InputError(
            f"{cache.path} holds no expression values (an unfinished --to-h5ad made it). Embed with --cache."
        )
    groups = list(cache.groups.values())
    genes = _common_genes(groups, progress)
    progress.begin("Loading targets", sum(g.n_cells for g in groups), "cells")
    parts, totals = [], []
    for group in groups:
        columns = None
        if group.genes != genes:
            place = {name: i for i, name in enumerate(group.genes)}
            columns = np.array([place[name] for name in genes])
        for start in range(0, group.n_cells, ROWS_PER_READ):
            rows = group.targets(start, min(start + ROWS_PER_READ, group.n_cells))
            totals.append(np.asarray(rows.sum(1, dtype=np.float64)).ravel())
            parts.append(rows if columns is None else rows[:, columns])
            progress.advance(rows.shape[0])
    total = np.concatenate(totals)
    dtype = np.result_type(*(part.dtype for part in parts))
    is_counts = np.concatenate([np.full(g.n_cells, g.attributes["scale"] == "counts") for g in groups])
    wanted = _target_sum(target_sum, total[is_counts])
    factor = np.zeros(len(total), np.float32)
    np.divide(wanted, total, out=factor, where=is_counts & (total > 0), casting="unsafe")
    counts = [0, *np.cumsum(np.concatenate([np.diff(part.indptr) for part in parts]))]
    scales = {str(g.attributes["scale"]) for g in groups}
    return Targets(
        tuple(genes),
        np.asarray(counts, np.int64),
        np.concatenate([part.indices.astype(np.int32, copy=False) for part in parts]),
        np.concatenate([part.data.astype(dtype, copy=False) for part in parts]),
        factor,
        wanted,
        scales.pop() if len(scales) == 1 else "mixed",
    )


def _target_sum(asked: str, totals: np.ndarray) -> float:
    if asked == "median":
        return float(np.median(totals[totals > 0])) if (totals > 0).any() else 10_000.0
    try:
        value = float(asked)
    except ValueError:
        raise InputError(f"target-sum is '{asked}'; it takes a number or 'median'.") from None
    if not 0 < value < float("inf"):
        raise InputError(f"target-sum is {asked}; it must be above 0.")
    return value


def _common_genes(groups: list[Group], progress: Progress) -> list[str]:
    first = groups[0].genes
    shared = set(first).intersection(*(g.genes for g in groups[1:]))
    genes = [name for name in first if name in shared]
    if not genes:
        raise InputError(f"The groups have no gene in common ({shown(g.path for g in groups)}).")
    most = max(g.n_genes for g in groups)
    if len(genes) < most:
        progress.note(f"Training on the {len(genes):,} genes that all groups have (of up to {most:,}).")
    return genes


def read_embeddings(cache: Cache, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Read the embeddings of the control cells, all that gene-space training needs.

    Returns:
        (controls, E) as stored, and (N,) int64: a cell's row in it, -1 for cells that are no controls.

    Raises:
        InputError: a control cell was not embedded.
    """
    row_of = np.full(len(labels), -1, np.int64)
    row_of[labels.is_control] = np.arange(int(labels.is_control.sum()))
    parts = []
    for number, group in enumerate(cache.groups.values()):
        mine = labels.is_control[labels.first[number] : labels.first[number + 1]]
        for start in range(0, group.n_cells, ROWS_PER_READ):
            stop = min(start + ROWS_PER_READ, group.n_cells)
            if mine[start:stop].any():
                parts.append(group.embeddings(start, stop)[mine[start:stop]])
    embeddings = np.concatenate(parts)
    if not np.isfinite(embeddings).all():
        raise InputError(f"{cache.path}: some control cells have no finite embedding. Embed again with --cells all.")
    return embeddings, row_of
