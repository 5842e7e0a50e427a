"""The two sides of an evaluation, predicted and real cells: their labels, genes and scales brought together.

Shapes: N cells of a file, G genes of the prediction, pairs = (cell type, perturbation) of the prediction. Space: log1p
of counts normalised to target_sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sest import progress
from sest.cells.columns import Columns, detect_columns, labels, perturbations, usual_columns
from sest.cells.genes import INDEX, all_names, gene_names, names_as_known, unnamed_genes
from sest.cells.labels import AS_IS, AUTO, NoControlError, same_targets
from sest.cells.scale import (
    SAMPLED_CELLS,
    Normalisation,
    cell_sums,
    decide_scale,
    factors_to,
    log1p_rows,
    normalisation_of,
    normalised_to,
    scan_file,
    total_counts,
)
from sest.config import EvaluateConfig
from sest.errors import InputError, shown
from sest.evaluation.ceiling import Folds, deal
from sest.evaluation.cell_eval_scores import LabelledCells
from sest.evaluation.record import Record
from sest.files.cell_file import CellFile

TARGET_SUM = 10_000.0  # counts a cell, where a foreign prediction does not say
BLOCK = 2048  # cells read at once
NOTHING = "\0"  # no label: those of cells that are left out
ONE_CELL_TYPE = "unknown"  # the cell type of files that have no such column


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two files, and what its cells are."""

    file: CellFile
    group: np.ndarray  # (N,) index into the groups: controls of each cell type first, then pairs; -1 not used
    genes: np.ndarray  # (G,) columns of the file, in the prediction's order
    target_sum: float | None  # normalise counts to this; None: values are log1p already
    is_predicted: bool

    def log1p_rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Cells [start, stop) as log1p, (stop-start, G) float32. Counts are normalised over all genes of the file."""
        return self._log1p(self.file.rows(start, stop))

    def _log1p(self, rows: sp.csr_matrix) -> sp.csr_matrix:
        """Rows of the file (n, all genes) as log1p over G genes."""
        if self.target_sum is not None:
            rows = log1p_rows(rows, factors_to(self.target_sum, total_counts(rows)))
        return rows[:, self.genes]

    def pseudobulks(
        self, n_groups: int, n_types: int, what: str, folds: int = 1, seed: int = 0, keep: np.ndarray | None = None
    ) -> tuple[Folds, Normalisation, sp.csr_matrix]:
        """Sums of log1p cells of each group (n_groups, folds, G) float64, their normalisation, and some cells.

        The normalisation is as was asked, or what the sums of some controls say, which are the groups below n_types.
        The cells are those of `keep`, (N,) bool: (n, G) log1p, in the order of the file.

        Raises:
            InputError: a prediction has values below zero.
        """
        progress.begin(f"Reading {what}", self.file.n_cells, "cells")
        sums, sampled, n_sampled = np.zeros((n_groups * folds, len(self.genes))), [np.zeros((0, 7))], 0
        keep = np.zeros(self.file.n_cells, bool) if keep is None else keep
        kept = [sp.csr_matrix((0, len(self.genes)), dtype=np.float32)]
        cell = np.where(self.group < 0, -1, self.group * folds + deal(self.group, folds, seed))
        for start in range(0, self.file.n_cells, BLOCK):
            stop = min(start + BLOCK, self.file.n_cells)
            used = np.flatnonzero(self.group[start:stop] >= 0)
            if len(used):
                group = self.group[start:stop][used]
                into = cell[start:stop][used]
                member = sp.csr_matrix((np.ones(len(used)), (into, used)), shape=(len(sums), stop - start))
                stored = self.file.rows(start, stop)
                if self.target_sum is None and n_sampled < SAMPLED_CELLS:
                    sampled.append(cell_sums(stored[used[group < n_types][: SAMPLED_CELLS - n_sampled]]))
                    n_sampled += len(sampled[-1])
                rows = self._log1p(stored)
                if self.is_predicted and rows.nnz and rows.data.min() < 0:
                    raise InputError(_effects(self.file.path, int((rows.data < 0).sum())))
                kept.append(rows[keep[start:stop]])
                block = (member @ rows.astype(np.float64)).tocoo()
                sums[block.row, block.col] += block.data  # a product has each place once
            progress.advance(stop - start)
        n_cells = np.bincount(cell[cell >= 0], minlength=len(sums)).reshape(n_groups, folds)
        found = Folds(sums.reshape(n_groups, folds, len(self.genes)), n_cells, seed)
        asked = self.target_sum
        made = normalisation_of(np.concatenate(sampled)) if asked is None else normalised_to(asked)
        return found, made, sp.vstack(kept, format="csr")

    def cells_of(self, names: dict[int, str]) -> LabelledCells:
        """All cells of the groups `names` (n, G), and the name of each one's group."""
        blocks, groups = [], []
        wanted = np.isin(self.group, list(names))
        for start in range(0, self.file.n_cells, BLOCK):
            stop = min(start + BLOCK, self.file.n_cells)
            used = np.flatnonzero(wanted[start:stop])
            if len(used):
                blocks.append(self.log1p_rows(start, stop)[used])
                groups.append(self.group[start:stop][used])
        return sp.vstack(blocks, format="csr"), np.array([names[group] for group in np.concatenate(groups)])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both sides over the same genes and groups."""

    predicted: Side
    real: Side
    cell_types: list[str]
    pairs: list[tuple[str, str]]  # (cell type, perturbation), sorted
    genes: list[str]

    @property
    def own_type(self) -> np.ndarray:
        """(n_pairs,) index into cell_types; it is also the group of the pair's controls."""
        return np.array([self.cell_types.index(cell_type) for cell_type, _ in self.pairs])

    @property
    def n_groups(self) -> int:
        """Controls of every cell type, and pairs."""
        return len(self.cell_types) + len(self.pairs)


def align(
    p: CellFile,
    p_columns: Columns,
    r: CellFile,
    r_columns: Columns,
    target_sums: tuple[float | None, float | None],
    gene_col: str | None = None,
    notes: list[str] | None = None,
) -> Comparison:
    """Find the pairs and genes of the prediction `p` and the cells of both in the real file `r`.

    Args:
        gene_col: the var column of `r` with the names of its genes; None: the one with most of the prediction's.
        notes: what is decided for the user is added to them.

    Raises:
        InputError: `r` lacks genes, pairs or controls of cell types of the prediction, or `p` has no perturbed cells.
    """
    p_keys = _keys(p, p_columns, ONE_CELL_TYPE)
    pairs = sorted({key for key in p_keys.unique() if key[1] not in ("", NOTHING)})
    if not pairs:
        raise InputError(f"{p.path} has no perturbed cells: all are {p_columns.control!r}.")
    cell_types = sorted({cell_type for cell_type, _ in pairs})
    if r_columns.cell_type is None and len(cell_types) > 1:
        raise InputError(
            f"{r.path} has no cell type column; the prediction has {shown(cell_types)}. Pass --cell-type-col."
        )
    genes, columns = _aligned_genes(p, r, gene_col, [] if notes is None else notes)
    groups = pd.MultiIndex.from_tuples([*((cell_type, "") for cell_type in cell_types), *pairs])
    r_group = groups.get_indexer(_keys(r, r_columns, cell_types[0], [name for _, name in pairs]))
    absent = groups[np.bincount(r_group[r_group >= 0], minlength=len(groups)) == 0]
    uncontrolled = [cell_type for cell_type, perturbation in absent if perturbation == ""]
    if uncontrolled:
        raise InputError(f"{r.path} has no control cells of cell types in the prediction: {shown(uncontrolled)}.")
    if len(absent):
        names = shown(f"{cell_type}/{perturbation}" for cell_type, perturbation in absent)
        raise InputError(
            f"{r.path} has no cells of {len(absent)} predicted pairs (cell type/perturbation): {names}. "
            "Predict only what can be compared."
        )
    predicted = Side(p, groups.get_indexer(p_keys), np.arange(len(genes)), target_sums[0], True)
    real = Side(r, r_group, columns, target_sums[1], False)
    return Comparison(predicted, real, cell_types, pairs, genes)


def prediction_columns(file: CellFile, record: Record | None, config: EvaluateConfig) -> Columns:
    """The prediction's own record; for a foreign file the given names where it has them, or detection."""
    if record is not None:
        own = record.columns
        return _detect(file, own["perturbation"], own["cell_type"], own["control"], own.get("labels", AUTO))
    pert_col, cell_type_col = (name if name in file.obs else None for name in (config.pert_col, config.cell_type_col))
    return _detect(file, pert_col, cell_type_col, config.control, config.labels or AUTO)


def real_columns(file: CellFile, predicted: Columns, config: EvaluateConfig) -> Columns:
    """The given names; where none are given those of the prediction if this file has them, else detection."""
    usual = usual_columns(
        file.obs,
        predicted.as_kept(),
        pert_col=config.pert_col,
        cell_type_col=config.cell_type_col,
        control=config.control,
    )
    return _detect(file, **usual | ({"rule": config.labels} if config.labels else {}))


def _detect(
    file: CellFile,
    pert_col: str | None,
    cell_type_col: str | None,
    control: str | tuple[str, ...] | None,
    rule: str,
) -> Columns:
    try:
        columns = detect_columns(
            file.obs,
            pert_col=pert_col,
            cell_type_col=cell_type_col,
            batch_col=next(iter(file.obs.columns), None),  # any: batches are not used, so candidates are not compared
            control=control,
            rule=rule,
            genes=all_names(file.var),
        )
    except NoControlError as error:
        raise InputError(
            f"{file.path}: {str(error).removesuffix('Pass --control.')}If one of these is the control, pass --control. "
            "If none is, add control cells to this file, those of the real cells for a prediction: effects are "
            "differences from them."
        ) from error
    if columns.perturbation is None:
        raise InputError(
            f"{file.path} has no perturbation column. Available: {shown(file.obs.columns, 30)}. Pass --pert-col."
        )
    return columns


def target_sums(
    p: CellFile, r: CellFile, record: Record | None, counts: str, target_sum: float | None, notes: list[str]
) -> tuple[float | None, float | None]:
    """What the counts of the prediction and of the real file are to be normalised to; None where values are log1p.

    What is decided for the user is added to `notes`.
    """
    p_scale = "log1p" if record is not None else _scale(p, "auto", "the prediction", is_predicted=True)
    r_scale = _scale(r, counts, "the real cells")
    own = record.target_sum if record is not None else None
    if target_sum is None:
        target_sum = own
    elif own not in (None, target_sum):
        raise InputError(
            f"The prediction is normalised to {own:g} counts a cell, not {target_sum:g}. Leave out --target-sum."
        )
    if target_sum is None and r_scale == "counts" and record is not None and record.is_log1p:
        raise InputError(
            f"{r.path} holds counts, but the model was trained on log1p values as they were, whose normalisation is "
            "not known. Choose log1p values with --layer, or pass --target-sum."
        )
    if target_sum is None and "counts" in (p_scale, r_scale):
        target_sum = TARGET_SUM
        notes.append(f"Counts are normalised to {TARGET_SUM:g} a cell; pass --target-sum if that is not right.")
    if r_scale == "log1p":
        notes.append(f"{r.path} holds log1p values: they are used as they are.")
    return (target_sum if p_scale == "counts" else None), (target_sum if r_scale == "counts" else None)


def _scale(file: CellFile, counts: str, what: str, *, is_predicted: bool = False) -> str:
    """ "counts" or "log1p"; `counts` is auto, raw or log1p."""
    progress.begin(f"Checking {what}", file.n_cells, "cells")
    scan = scan_file(file, progress.advance)
    if is_predicted and scan.n_negative:
        raise InputError(_effects(file.path, scan.n_negative))
    return decide_scale(scan, counts, file.path, file.choices)


def _effects(path: Path, n: int) -> str:
    """What is wrong with a prediction that has n values (or more) below zero."""
    return (
        f"{path} has {n:,} values below zero: these look like effects (deltas), not cells. Add the mean of the "
        "controls to them, cut at 0, and evaluate those cells."
    )


def differing_sides(
    p: Path, predicted: Normalisation, r: Path, real: Normalisation, record: Record | None
) -> str | None:
    """Say that prediction and reality were normalised differently; None where they were not, as far as is known."""
    if record is not None and record.is_mixed:
        return (
            f"{p} is of a run that was trained on files that were normalised differently "
            "(--mixed-scales allow): its mae means nothing."
        )
    if record is not None and record.target_sum is not None:
        predicted = normalised_to(record.target_sum)
    if not predicted.differs_from(real):
        return None
    return (
        "Prediction and real cells were normalised differently, so that mae means nothing and the other metrics are "
        f"biased: {p} is {predicted}; {r} is {real}. "
        "Give the real cells as counts (often a --layer), or normalise them alike."
    )


def _keys(file: CellFile, columns: Columns, only: str, known: Sequence[str] = ()) -> pd.MultiIndex:
    """(cell type, perturbation) of each cell; that of controls is "", of cells that are left out NOTHING.

    `only` is the cell type of a file without such a column; `known` are perturbations as they are to be spelled.
    """
    codes, names = perturbations(file.obs, columns)
    spelled = same_targets(names, known) if columns.rule != AS_IS else {}
    called = ["" if name == columns.control else spelled.get(name, name) for name in names]
    perturbation = np.array([*called, NOTHING], dtype=object)[codes]
    cell_type = np.repeat(np.array([only], dtype=object), file.n_cells)
    if columns.cell_type is not None:
        codes, names = labels(file.obs, columns.cell_type)
        cell_type = np.array(names, dtype=object)[codes]
    return pd.MultiIndex.from_arrays([cell_type, perturbation])


def _aligned_genes(p: CellFile, r: CellFile, gene_col: str | None, notes: list[str]) -> tuple[list[str], np.ndarray]:
    """The prediction's genes, and where each of them is in the real file."""
    own = gene_names(p.var)
    theirs = names_as_known(r.var, own.names, gene_col)
    for file, names in ((p, own), (r, theirs)):
        if names.are_numbers and gene_col is None:
            raise unnamed_genes(file.path)
        if names.column != INDEX:
            notes.append(f"{file.path}: genes are named by {names.column} ({shown(names.names[:3])}).")
    genes, index = list(own.names), pd.Index(theirs.names)
    known = set(theirs.names)
    missing = [gene for gene in genes if gene not in known]
    if missing:
        raise InputError(
            f"{len(missing)} of the prediction's {len(genes)} genes are not in {r.path}: {shown(missing)}. "
            f"It has {len(index)} genes such as {shown(index[:3])}; tried: {shown((INDEX, *map(str, r.var.columns)))}."
        )
    for file, names in ((p, pd.Index(genes)), (r, index)):
        twice = names[names.duplicated()].intersection(genes)
        if len(twice):
            raise InputError(f"{file.path} has genes of the prediction more than once: {shown(twice)}.")
    return genes, index.get_indexer_for(genes)
