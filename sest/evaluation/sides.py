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
    Scanner,
    cell_sums,
    decide_scale,
    factors_to,
    log1p_rows,
    normalisation_of,
    normalised_to,
    total_counts,
)
from sest.config import EvaluateConfig
from sest.data.gather import add_log1p
from sest.errors import InputError, shown
from sest.evaluation.ceiling import Folds, deal
from sest.evaluation.cell_eval_scores import LabelledCells
from sest.evaluation.record import Record
from sest.files.cell_file import CellFile

TARGET_SUM = 10_000.0  # counts a cell, where a foreign prediction does not say
BLOCK = 2048  # cells read at once
COUNTS, LOG1P = "counts", "log1p"  # what decide_scale says
NOTHING = "\0"  # no label: those of cells that are left out
ONE_CELL_TYPE = "unknown"  # the cell type of files that have no such column


@dataclass(frozen=True, eq=False)
class Reading:
    """What one side's cells are, once all of its file was read."""

    cells: Folds  # sums of log1p cells of each group
    sample: sp.csr_matrix  # (n, G) log1p of the cells that were to be kept, in the order of the file
    sampled: np.ndarray  # (n,) their groups
    target_sum: float | None  # what counts were normalised to; None: values are log1p already
    normalisation: Normalisation  # as was asked, or what the sums of some controls say

    def sample_of(self, group: int) -> sp.csr_matrix:
        """The cells of a group that were kept."""
        return self.sample[self.sampled == group]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two files, and what its cells are."""

    file: CellFile
    group: np.ndarray  # (N,) index into the groups: controls of each cell type first, then pairs; -1 not used
    genes: np.ndarray  # (G,) columns of the file, in the prediction's order
    is_predicted: bool
    counts: str | None  # auto, raw or log1p, see decide_scale; None: log1p, as the prediction's record says
    target_sum: float  # what counts are normalised to
    by_genes: bool = False  # over the G genes alone, as the other file has no others; else over all of the file

    def log1p_rows(self, rows: sp.csr_matrix, target_sum: float | None) -> sp.csr_matrix:
        """Rows of the file (n, all genes) as log1p over the G genes, float32."""
        rows = rows[:, self.genes] if self.by_genes else rows
        if target_sum is not None:
            rows = log1p_rows(rows, factors_to(target_sum, total_counts(rows)))
        return rows if self.by_genes else rows[:, self.genes]

    def read(
        self, n_groups: int, n_types: int, folds: int = 1, seed: int = 0, keep: np.ndarray | None = None
    ) -> Reading:
        """Sum the log1p cells of each group by fold, and decide over all values of the file what they are.

        The file is read once, as what its first values are, and again only if all of them say otherwise.

        Args:
            n_types: the groups below are controls.
            keep: (N,) bool of the cells that are given back.

        Raises:
            InputError: values that are neither counts nor log1p, and a prediction with values below zero.
        """
        keep = np.zeros(self.file.n_cells, bool) if keep is None else keep
        into = np.where(self.group < 0, -1, self.group * folds + deal(self.group, folds, seed))
        scanner, known = Scanner(self.file.n_cells, hashed=False), {"raw": COUNTS, "log1p": LOG1P, None: LOG1P}
        taken_for, *found = self._sums(n_groups * folds, n_types, into, keep, known.get(self.counts), scanner)
        scan = scanner.scan(self.file.var.index)
        if self.is_predicted and scan.n_negative:
            raise InputError(_effects(self.file.path, scan.n_negative))
        path, choices = self.file.path, self.file.choices
        scale = LOG1P if self.counts is None else decide_scale(scan, self.counts, path, choices, self.file.log_base)
        if scale != taken_for:
            del found  # the sums are as large as all else
            _, *found = self._sums(n_groups * folds, n_types, into, keep, scale, None)
        sums, sample, of_controls = found
        cells = Folds(
            sums.reshape(n_groups, folds, -1),
            np.bincount(into[into >= 0], minlength=len(sums)).reshape(n_groups, folds),
            seed,
        )
        if scale == COUNTS:
            return Reading(cells, sample, self.group[keep], self.target_sum, normalised_to(self.target_sum))
        return Reading(cells, sample, self.group[keep], None, normalisation_of(of_controls))

    def _sums(
        self,
        n_sums: int,
        n_types: int,
        into: np.ndarray,
        keep: np.ndarray,
        scale: str | None,
        scanner: Scanner | None,
    ) -> tuple[str, np.ndarray, sp.csr_matrix, np.ndarray]:
        """What the values were taken for, (n_sums, G) sums, the cells to keep, and the `cell_sums` of some controls.

        Args:
            into: (N,) the sum that each cell is added to; -1: none.
            scale: what the values are; None: what the first ones say.
            scanner: is shown all cells; None: cells that are not used are not read.
        """
        progress.begin(f"Reading {'predicted' if self.is_predicted else 'real'} cells", self.file.n_cells, "cells")
        sums, of_controls, n_sampled = np.zeros((n_sums, len(self.genes))), [np.zeros((0, 7))], 0
        kept = [sp.csr_matrix((0, len(self.genes)), dtype=np.float32)]
        column = np.full(self.file.n_genes, -1)
        column[self.genes] = np.arange(len(self.genes))
        for start in range(0, self.file.n_cells, BLOCK):
            stop = min(start + BLOCK, self.file.n_cells)
            used = np.flatnonzero(into[start:stop] >= 0)
            if len(used) or scanner is not None:
                stored = self.file.rows(start, stop)
                if scanner is not None:
                    scanner.add(stored)
                    if scale is None and stored.nnz:
                        scale = COUNTS if scanner.n_fractional == 0 and scanner.max_value > 1 else LOG1P
                target_sum = self.target_sum if scale == COUNTS else None
                by_sum = used[np.argsort(into[start:stop][used], kind="stable")]  # each is in the cache once
                read, of = (stored[:, self.genes], column[self.genes]) if self.by_genes else (stored, column)
                add_log1p(by_sum, into[start:stop][by_sum], read, of, target_sum, sums)
                with np.errstate(divide="ignore", invalid="ignore"):  # of counts below zero, which are refused later
                    kept.append(self.log1p_rows(stored[np.flatnonzero(keep[start:stop])], target_sum))
                if target_sum is None and n_sampled < SAMPLED_CELLS:
                    controls = used[self.group[start:stop][used] < n_types][: SAMPLED_CELLS - n_sampled]
                    of_controls.append(cell_sums(stored[controls]))
                    n_sampled += len(controls)
            progress.advance(stop - start)
        return scale or LOG1P, sums, sp.vstack(kept, format="csr"), np.concatenate(of_controls)

    def cells_of(self, names: dict[int, str], target_sum: float | None) -> LabelledCells:
        """All cells of the groups `names` (n, G), and the name of each one's group; target_sum: as read."""
        blocks, groups = [], []
        wanted = np.isin(self.group, list(names))
        for start in range(0, self.file.n_cells, BLOCK):
            stop = min(start + BLOCK, self.file.n_cells)
            used = np.flatnonzero(wanted[start:stop])
            if len(used):
                blocks.append(self.log1p_rows(self.file.rows(start, stop)[used], target_sum))
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
    record: Record | None,
    config: EvaluateConfig,
    notes: list[str],
) -> Comparison:
    """Find the pairs and genes of the prediction `p` and the cells of both in the real file `r`.

    Args:
        record: what the prediction says of itself.
        config: `gene_col` is the var column of `r` with the names of its genes; None: the one with most of the
            prediction's.
        notes: what is decided for the user is added to them.

    Raises:
        InputError: `r` lacks genes, pairs or controls of cell types of the prediction, `p` has no perturbed cells or is
            normalised to another total than config.target_sum.
    """
    asked = _asked(record, config)
    p_code, p_keys = _keys(p, p_columns, ONE_CELL_TYPE)
    pairs = sorted({key for key in p_keys if key[1] not in ("", NOTHING)})
    if not pairs:
        raise InputError(f"{p.path} has no perturbed cells: all are {p_columns.control!r}.")
    cell_types = sorted({cell_type for cell_type, _ in pairs})
    if r_columns.cell_type is None and len(cell_types) > 1:
        raise InputError(
            f"{r.path} has no cell type column; the prediction has {shown(cell_types)}. Pass --cell-type-col."
        )
    genes, columns = _aligned_genes(p, r, config.gene_col, notes)
    groups = [*((cell_type, "") for cell_type in cell_types), *pairs]
    place = {key: i for i, key in enumerate(groups)}
    r_code, r_keys = _keys(r, r_columns, cell_types[0], [name for _, name in pairs])
    p_group, r_group = (
        np.array([place.get(key, -1) for key in keys])[code] for code, keys in ((p_code, p_keys), (r_code, r_keys))
    )
    there = set(r_keys)
    absent = [key for key in groups if key not in there]
    uncontrolled = [cell_type for cell_type, perturbation in absent if perturbation == ""]
    if uncontrolled:
        raise InputError(f"{r.path} has no control cells of cell types in the prediction: {shown(uncontrolled)}.")
    if len(absent):
        names = shown(f"{cell_type}/{perturbation}" for cell_type, perturbation in absent)
        raise InputError(
            f"{r.path} has no cells of {len(absent)} predicted pairs (cell type/perturbation): {names}. "
            "Predict only what can be compared."
        )
    counts, total = "auto" if record is None else None, TARGET_SUM if asked is None else asked
    predicted = Side(p, p_group, np.arange(len(genes)), True, counts, total)
    real = Side(r, r_group, columns, False, config.counts, total)
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


def _asked(record: Record | None, config: EvaluateConfig) -> float | None:
    """What counts are to be normalised to, as far as it is known."""
    own = record.target_sum if record is not None else None
    if config.target_sum is not None and own not in (None, config.target_sum):
        raise InputError(
            f"The prediction is normalised to {own:g} counts a cell, not {config.target_sum:g}. Leave out --target-sum."
        )
    return own if config.target_sum is None else config.target_sum


def check_scales(
    predicted: Reading, real: Reading, path: Path, record: Record | None, config: EvaluateConfig, notes: list[str]
) -> None:
    """Add to `notes` what was decided of the scales, of the real cells at `path` too.

    Raises:
        InputError: counts are compared with what was normalised nobody knows how.
    """
    if _asked(record, config) is None and real.target_sum is not None and record is not None and record.is_log1p:
        raise InputError(
            f"{path} holds counts, but the model was trained on log1p values as they were, whose normalisation is "
            "not known. Choose log1p values with --layer, or pass --target-sum."
        )
    if _asked(record, config) is None and (predicted.target_sum, real.target_sum) != (None, None):
        notes.append(f"Counts are normalised to {TARGET_SUM:g} a cell; pass --target-sum if that is not right.")
    if real.target_sum is None:
        notes.append(f"{path} holds log1p values: they are used as they are.")


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


def _keys(
    file: CellFile, columns: Columns, only: str, known: Sequence[str] = ()
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(N,) codes of the cells, and the (cell type, perturbation) each of them stands for, which may repeat.

    The perturbation of controls is "", of cells that are left out NOTHING. `only` is the cell type of a file without
    such a column; `known` are perturbations as they are to be spelled.
    """
    codes, names = perturbations(file.obs, columns)
    spelled = same_targets(names, known) if columns.rule != AS_IS else {}
    called = ["" if name == columns.control else spelled.get(name, name) for name in names]
    called.append(NOTHING)  # of code -1
    kind: np.ndarray = np.zeros(file.n_cells, np.int64)
    kinds: tuple[str, ...] = (only,)
    if columns.cell_type is not None:
        kind, kinds = labels(file.obs, columns.cell_type)
    both = kind.astype(np.int64) * len(called) + codes % len(called)
    there, code = np.unique(both, return_inverse=True)
    return code, [(kinds[i // len(called)], called[i % len(called)]) for i in there.tolist()]


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
