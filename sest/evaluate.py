"""Score a prediction against real cells, always beside baselines that need no network.

Own metrics (sest.metrics) are computed on pseudobulks streamed from both files; with the extra `eval`, cell-eval adds
the Virtual Cell Challenge's DES and overall score. Shapes: N cells, G genes of the prediction, pairs = (cell type,
perturbation) of the prediction. Space: log1p of counts normalised to target_sum.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

import sest
from sest.cell_eval_scores import (
    CONTROL,
    CellEvalFailed,
    LabelledCells,
    cell_eval_scores,
    cells_with_mean,
    controls_of,
    overall_scores,
    stack,
)
from sest.columns import Columns, detect_columns, labels
from sest.errors import InputError, shown
from sest.h5ad import CellFile, decide_scale
from sest.metrics import discrimination_score, mean_absolute_error, pearson_delta
from sest.progress import Progress, Silent

TARGET_SUM = 10_000.0  # counts a cell, where a foreign prediction does not say
BLOCK = 2048  # cells read at once
MAX_STORED = 2**32  # bytes of one array of uns that is read
ONE_CELL_TYPE = "unknown"  # the cell type of files that have no such column


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of one prediction and of the baselines on the same pairs."""

    table: pd.DataFrame
    """One row a (cell_type, perturbation, predictor): n_predicted, n_real, pearson_delta, mae, pds and, where
    cell-eval ran, des, cell_eval_mae, cell_eval_pds. `predictor`: model, context_mean or a stored baseline."""
    summary: dict[str, dict[str, float]]
    """metric -> predictor -> mean over all pairs. Where cell-eval ran also overall_score_over: baseline -> the model's
    overall score with that baseline as zero (1 is perfect, worse than the baseline counts as 0)."""
    provenance: dict[str, object]
    notes: tuple[str, ...]
    """What was decided for the user, one sentence each."""


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two files, and what its cells are."""

    file: CellFile
    group: np.ndarray  # (N,) index into the groups: controls of each cell type first, then pairs; -1 not used
    genes: np.ndarray  # (G,) columns of the file, in the prediction's order
    target_sum: float | None  # normalise counts to this; None: values are log1p already

    def log1p_rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Cells [start, stop) as log1p, (stop-start, G) float32. Counts are normalised over all genes of the file."""
        block = self.file.rows(start, stop)
        if self.target_sum is not None:
            total = np.asarray(block.sum(axis=1, dtype=np.float64)).ravel()
            factor = np.divide(self.target_sum, total, out=np.zeros_like(total), where=total > 0)
            block.data = np.log1p(block.data * np.repeat(factor, np.diff(block.indptr))).astype(np.float32)
        return block[:, self.genes]


@dataclass(frozen=True, eq=False)
class _Task:
    """What is compared."""

    predicted: _Side
    real: _Side
    cell_types: list[str]
    pairs: list[tuple[str, str]]  # (cell type, perturbation), sorted
    genes: list[str]

    @property
    def own_type(self) -> np.ndarray:
        """(n_pairs,) index into cell_types; it is also the group of the pair's controls."""
        return np.array([self.cell_types.index(cell_type) for cell_type, _ in self.pairs])


def evaluate(
    predicted: Path,
    real: Path,
    *,
    pert_col: str | None = None,
    cell_type_col: str | None = None,
    control: str | None = None,
    layer: str | None = None,
    counts: str = "auto",
    target_sum: float | None = None,
    with_cell_eval: bool = True,
    threads: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Score the cells of `predicted` (.h5ad, log1p, with controls) against those of `real` (.h5ad, counts or log1p).

    Column names, `control`, `layer` and `counts` (auto, raw, log1p) describe `real`; a prediction of `sest predict`
    knows its own, a foreign one is read with the same names or detected. An effect is a pseudobulk minus the control
    mean of its own file, as in cell-eval; PDS ranks within each cell type. Counts are normalised over all genes of
    their file, to `target_sum`, by default the prediction's. `seed` draws the control cells that stand for baselines in
    cell-eval, which runs where it is installed unless `with_cell_eval` is off.

    Raises InputError for genes or pairs of the prediction that `real` does not have, cell types without real controls,
    several possible columns, and whatever makes a file unreadable.
    """
    progress = progress or Silent()
    notes: list[str] = []
    with CellFile(predicted) as p, CellFile(real, layer) as r:
        told = _read_uns(predicted)
        p_columns = _prediction_columns(p, told, pert_col, cell_type_col, control)
        r_columns = _real_columns(r, p_columns, pert_col, cell_type_col, control)
        notes += [f"{predicted}: {note}" for note in p_columns.notes] + [f"{real}: {note}" for note in r_columns.notes]
        sums = _target_sums(p, r, told, counts, target_sum, notes, progress)
        task = _task((p, p_columns, sums[0]), (r, r_columns, sums[1]))
        table, predictors, n_controls = _own_scores(task, told, notes, progress)
        overall: dict[str, float] = {}
        if with_cell_eval and importlib.util.find_spec("cell_eval") is None:
            notes.append("cell-eval is not installed: no DES and no overall score. Run pip install 'sest[eval]'.")
        elif with_cell_eval:
            try:
                scores = _scores_of_cell_eval(task, predictors, threads, seed, progress)
            except CellEvalFailed as error:
                notes.append(f"cell-eval failed, so there is no DES and no overall score: {error}.")
            else:
                keys = ["cell_type", "perturbation", "predictor"]
                table = table.merge(scores, on=keys, how="left", validate="one_to_one")
                overall = overall_scores(table)
    summary: dict[str, dict[str, float]] = {}
    for metric in table.select_dtypes("floating"):
        values = {name: table.loc[table["predictor"] == name, metric].to_numpy() for name in predictors}
        summary[str(metric)] = {name: float(v.mean()) for name, v in values.items()}  # NaN stays NaN
    if overall:
        summary["overall_score_over"] = overall
    provenance: dict[str, object] = {
        "predicted": str(predicted),
        "real": str(real),
        "layer": layer,
        "control": r_columns.control,
        "predicted_counts_normalised_to": sums[0],
        "real_counts_normalised_to": sums[1],
        "n_genes": len(task.genes),
        "n_pairs": len(task.pairs),
        "n_real_controls": n_controls,
        "sest": sest.__version__,
        "cell_eval": importlib.metadata.version("cell-eval") if overall else None,
        "seed": seed,
    }
    return Evaluation(table, summary, provenance, tuple(notes))


def check_output(out: Path) -> None:
    """Raise InputError unless `out` is an empty folder, or one that can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder. Pass another --out or remove it.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"Cannot write {out.name} into {above}. Pass another --out.")


def write_results(evaluation: Evaluation, out: Path) -> None:
    """Write results.csv (the table) and summary.json (metrics, provenance, notes; sorted keys) into the folder `out`.

    The folder appears with both files or not at all. Raises InputError as `check_output`.
    """
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.{os.getpid()}"
    aside.mkdir()
    try:
        summary = {
            "metrics": {metric: _finite(scores) for metric, scores in evaluation.summary.items()},
            "notes": evaluation.notes,
            "provenance": evaluation.provenance,
        }
        _write(aside / "results.csv", evaluation.table.to_csv(index=False))
        _write(aside / "summary.json", json.dumps(summary, indent=2, sort_keys=True, allow_nan=False) + "\n")
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _scores_of_cell_eval(
    task: _Task, predictors: dict[str, np.ndarray], threads: int, seed: int, progress: Progress
) -> pd.DataFrame:
    """cell-eval's columns for every (cell_type, perturbation, predictor), one cell type in memory at a time."""
    parts = []
    n_types = len(task.cell_types)
    progress.begin("Running cell-eval", n_types, "cell types")
    for at, cell_type in enumerate(task.cell_types):
        rows = {n_types + i: name for i, (of, name) in enumerate(task.pairs) if of == cell_type}  # group -> name
        real, predicted = (_cells(side, {at: CONTROL, **rows}) for side in (task.real, task.predicted))
        if CONTROL not in predicted[1]:
            predicted = stack([predicted, controls_of(real)])
        predictions = {"model": predicted}
        for predictor in [name for name in predictors if name != "model"]:
            controls = controls_of(real if predictor == "context_mean" else predicted)
            stand_in = [controls]
            for group, perturbation in rows.items():
                n = int((task.predicted.group == group).sum())  # the model's number: the same power for its test
                rng = np.random.default_rng([seed, group])  # the same choice of control cells for every baseline
                mean = predictors[predictor][group - n_types]
                stand_in.append((cells_with_mean(mean, controls[0], n, rng), np.repeat(perturbation, n)))
            predictions[predictor] = stack(stand_in)
        parts.append(cell_eval_scores(real, predictions, task.genes, threads).assign(cell_type=cell_type))
        progress.advance(1)
    return pd.concat(parts, ignore_index=True)


def _own_scores(
    task: _Task, told: dict[str, Any], notes: list[str], progress: Progress
) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, int]]:
    """The table with the own metrics, each predictor's pseudobulks (n_pairs, G), and real controls a cell type."""
    n_types, own_type = len(task.cell_types), task.own_type
    predicted, n_predicted = _pseudobulks(task.predicted, n_types + len(task.pairs), "predicted cells", progress)
    real, n_real = _pseudobulks(task.real, n_types + len(task.pairs), "real cells", progress)
    without = np.flatnonzero(n_predicted[:n_types] == 0)
    if len(without):
        predicted[without] = real[without]
        names = shown(task.cell_types[i] for i in without)
        notes.append(f"The prediction has no control cells of {names}: its effects are from the real ones.")
    predictors = {"model": predicted[n_types:], "context_mean": real[own_type], **_baselines(told, task)}
    table = pd.DataFrame(task.pairs, columns=["cell_type", "perturbation"])
    table["n_predicted"], table["n_real"] = n_predicted[n_types:], n_real[n_types:]
    observed, control = real[n_types:], real[own_type]
    parts = []
    for name, means in predictors.items():
        own_control = control if name == "context_mean" else predicted[own_type]
        pds = np.empty(len(means))
        for i in range(n_types):
            at = np.flatnonzero(own_type == i)
            perturbations = [task.pairs[row][1] for row in at]
            pds[at] = discrimination_score(
                means[at], observed[at], control[at], perturbations, task.genes, own_control[at]
            )
        parts.append(
            table.assign(
                predictor=name,
                pearson_delta=pearson_delta(means, observed, control, own_control),
                mae=mean_absolute_error(means, observed),
                pds=pds,
            )
        )
    n_controls = dict(zip(task.cell_types, n_real[:n_types].tolist(), strict=True))
    return pd.concat(parts, ignore_index=True), predictors, n_controls


def _task(predicted: tuple[CellFile, Columns, float | None], real: tuple[CellFile, Columns, float | None]) -> _Task:
    """Find the pairs of the prediction, its genes and the cells of both in the real file, or raise InputError."""
    p, p_columns, p_sum = predicted
    r, r_columns, r_sum = real
    p_keys = _keys(p, p_columns, ONE_CELL_TYPE)
    pairs = sorted({key for key in p_keys.unique() if key[1] != ""})
    if not pairs:
        raise InputError(f"{p.path} has no perturbed cells: all are {p_columns.control!r}.")
    cell_types = sorted({cell_type for cell_type, _ in pairs})
    if r_columns.cell_type is None and len(cell_types) > 1:
        raise InputError(
            f"{r.path} has no cell type column; the prediction has {shown(cell_types)}. Pass --cell-type-col."
        )
    genes = p.var.index.tolist()
    groups = pd.MultiIndex.from_tuples([*((cell_type, "") for cell_type in cell_types), *pairs])
    r_group = groups.get_indexer(_keys(r, r_columns, cell_types[0]))
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
    return _Task(
        _Side(p, groups.get_indexer(p_keys), np.arange(len(genes)), p_sum),
        _Side(r, r_group, _gene_columns(r, genes), r_sum),
        cell_types,
        pairs,
        genes,
    )


def _prediction_columns(
    file: CellFile, told: dict[str, Any], pert_col: str | None, cell_type_col: str | None, control: str | None
) -> Columns:
    """The prediction's own record; for a foreign file the given names where it has them, or detection."""
    if told:
        own = {key: str(value) for key, value in told["columns"].items()}
        return _detect(file, own["perturbation"], own["cell_type"], own["control"])
    pert_col, cell_type_col = (name if name in file.obs else None for name in (pert_col, cell_type_col))
    return _detect(file, pert_col, cell_type_col, control)


def _real_columns(
    file: CellFile, predicted: Columns, pert_col: str | None, cell_type_col: str | None, control: str | None
) -> Columns:
    """The given names; where none are given those of the prediction if this file has them, else detection."""
    pert_col = pert_col or (predicted.perturbation if predicted.perturbation in file.obs else None)
    cell_type_col = cell_type_col or (predicted.cell_type if predicted.cell_type in file.obs else None)
    if control is None and pert_col in file.obs and predicted.control in labels(file.obs, str(pert_col))[1]:
        control = predicted.control
    return _detect(file, pert_col, cell_type_col, control)


def _detect(file: CellFile, pert_col: str | None, cell_type_col: str | None, control: str | None) -> Columns:
    columns = detect_columns(
        file.obs,
        pert_col=pert_col,
        cell_type_col=cell_type_col,
        batch_col=next(iter(file.obs.columns), None),  # any: batches are not used, so candidates are not compared
        control=control,
    )
    if columns.perturbation is None:
        raise InputError(
            f"{file.path} has no perturbation column. Available: {shown(file.obs.columns, 30)}. Pass --pert-col."
        )
    return columns


def _keys(file: CellFile, columns: Columns, only: str) -> pd.MultiIndex:
    """(cell type, perturbation) of each cell; the perturbation of controls is "", which is never a label.

    `only` is the cell type of a file without such a column.
    """
    codes, names = labels(file.obs, str(columns.perturbation))
    perturbation = np.array(["" if name == columns.control else name for name in names], dtype=object)[codes]
    cell_type = np.repeat(np.array([only], dtype=object), file.n_cells)
    if columns.cell_type is not None:
        codes, names = labels(file.obs, columns.cell_type)
        cell_type = np.array(names, dtype=object)[codes]
    return pd.MultiIndex.from_arrays([cell_type, perturbation])


def _target_sums(
    p: CellFile,
    r: CellFile,
    told: dict[str, Any],
    counts: str,
    target_sum: float | None,
    notes: list[str],
    progress: Progress,
) -> tuple[float | None, float | None]:
    """What the counts of the prediction and of the real file are to be normalised to; None where values are log1p."""

    def scale_of(file: CellFile, requested: str, what: str) -> str:
        progress.begin(f"Checking {what}", file.n_cells, "cells")
        return decide_scale(file.scan(progress.advance), requested, file.path, file.layers)

    p_scale = "log1p" if told else scale_of(p, "auto", "the prediction")
    r_scale = scale_of(r, counts, "the real cells")
    own = told.get("target_sum") if told.get("scale") != "log1p" else None
    if target_sum is None and own is not None:
        target_sum = float(own)
    elif target_sum is not None and own is not None and float(own) != target_sum:
        raise InputError(
            f"The prediction is normalised to {float(own):g} counts a cell, not {target_sum:g}. Leave out --target-sum."
        )
    if target_sum is None and r_scale == "counts" and told.get("scale") == "log1p":
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


def _gene_columns(file: CellFile, genes: list[str]) -> np.ndarray:
    """Where each of the prediction's genes is in the file: by the var index, or the column with more matches."""
    names = [file.var.index, *(pd.Index(file.var[column].astype(str)) for column in file.var)]
    best = max(names, key=lambda index: int(np.isin(genes, index).sum()))  # the first of equals
    missing = [gene for gene in genes if gene not in best]
    if missing:
        raise InputError(
            f"{len(missing)} of the prediction's {len(genes)} genes are not in {file.path}: {shown(missing)}. "
            f"It has {len(best)} genes such as {shown(best[:3])}."
        )
    twice = best[best.duplicated()].intersection(genes)
    if len(twice):
        raise InputError(f"{file.path} has genes of the prediction more than once (var {best.name}): {shown(twice)}.")
    return best.get_indexer_for(genes)


def _pseudobulks(side: _Side, n_groups: int, what: str, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Means (n_groups, G) float64 of each group's log1p cells, NaN for an empty one, and cells a group (n_groups,)."""
    sums = np.zeros((n_groups, len(side.genes)))
    progress.begin(f"Reading {what}", side.file.n_cells, "cells")
    for start in range(0, side.file.n_cells, BLOCK):
        stop = min(start + BLOCK, side.file.n_cells)
        used = np.flatnonzero(side.group[start:stop] >= 0)
        if len(used):
            group = side.group[start:stop][used]
            member = sp.csr_matrix((np.ones(len(used)), (group, used)), shape=(n_groups, stop - start))
            block = (member @ side.log1p_rows(start, stop).astype(np.float64)).tocoo()
            sums[block.row, block.col] += block.data  # a product has each place once
        progress.advance(stop - start)
    n_cells = np.bincount(side.group[side.group >= 0], minlength=n_groups)
    with np.errstate(invalid="ignore"):
        return sums / n_cells[:, None], n_cells


def _cells(side: _Side, names: dict[int, str]) -> LabelledCells:
    """All cells of some groups (n, G), and the name of each one's group."""
    blocks, groups = [], []
    wanted = np.isin(side.group, list(names))
    for start in range(0, side.file.n_cells, BLOCK):
        stop = min(start + BLOCK, side.file.n_cells)
        used = np.flatnonzero(wanted[start:stop])
        if len(used):
            blocks.append(side.log1p_rows(start, stop)[used])
            groups.append(side.group[start:stop][used])
    return sp.vstack(blocks, format="csr"), np.array([names[group] for group in np.concatenate(groups)])


def _baselines(told: dict[str, Any], task: _Task) -> dict[str, np.ndarray]:
    """The stored baselines in the order of `pairs`, (n_pairs, G); context_mean is always that of the real controls."""
    own = ("model", "context_mean")
    stored = {name: np.asarray(values) for name, values in told.get("baselines", {}).items() if name not in own}
    if not stored:
        return {}
    rows = pd.MultiIndex.from_arrays([np.asarray(told["pairs"][key], str) for key in ("cell_type", "perturbation")])
    shape = len(rows), len(task.genes)
    at = rows.get_indexer(pd.MultiIndex.from_tuples(task.pairs))
    for name, values in stored.items():
        if values.shape != shape or values.dtype.kind != "f" or not np.isfinite(values).all():
            what = f"{name!r} is not {shape[0]} x {shape[1]} finite numbers"
        elif (at < 0).any():
            what = f"{name!r} lacks {int((at < 0).sum())} of its pairs"
        else:
            continue
        raise InputError(f"The prediction's stored baseline {what}. Run `sest predict` again.")
    return {name: values[at].astype(np.float64) for name, values in sorted(stored.items())}


def _read_uns(path: Path) -> dict[str, Any]:
    """What `sest predict` recorded in uns["sest"] (target_sum, scale, columns, baselines, pairs); empty if foreign."""
    from anndata.io import read_elem  # slow to import

    with h5py.File(path, "r") as file:
        if "uns" not in file or "sest" not in file["uns"]:
            return {}
        _check_stored(file, "uns", ("sest",))
        told: dict[str, Any] = read_elem(file["uns/sest"])
    needed: dict[str, tuple[str, ...]] = {"columns": ("perturbation", "cell_type", "control")}
    if "baselines" in told:
        needed["pairs"] = ("cell_type", "perturbation")
    absent = [f"{group}/{key}" for group, keys in needed.items() for key in keys if key not in told.get(group, {})]
    if absent:
        raise InputError(f"{path}: uns['sest'] has no {shown(absent)}. Run `sest predict` again.")
    return told


def _check_stored(group: h5py.Group, name: str, only: tuple[str, ...] | None = None, depth: int = 0) -> None:
    """Refuse what AnnData's reader must not follow: links, storage in other files, endless depth, absurd sizes."""
    where = f"{group.file.filename}: {group.name.rstrip('/')}/{name}"
    if not isinstance(group.get(name, getlink=True), h5py.HardLink) or depth > 6:
        raise InputError(f"{where} is a link to another place; links are not followed.")
    item = group[name]
    if isinstance(item, h5py.Group):
        for child in item if only is None else only:
            _check_stored(item, child, None, depth + 1)
    elif item.external or item.is_virtual or item.nbytes > MAX_STORED:
        raise InputError(f"{where} is stored in another file or larger than {MAX_STORED >> 30} GiB, which is not read.")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: null."""
    return {name: score if np.isfinite(score) else None for name, score in scores.items()}
