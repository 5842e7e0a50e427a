"""Score a prediction against real cells, always beside baselines that need no network.

Own metrics (sest.evaluation.metrics) are computed on pseudobulks streamed from both files; with the extra `eval`,
cell-eval adds the Virtual Cell Challenge's DES and overall score. Shapes: N cells, G genes of the prediction, pairs =
(cell type, perturbation) of the prediction. Space: log1p of counts normalised to target_sum.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

import sest
from sest import progress
from sest.config import EvaluateConfig
from sest.errors import shown
from sest.evaluation.ceiling import (
    LEAST_CELLS,
    Ceiling,
    Folds,
    ceiling,
    independent_pearson_delta,
    means_of_halves,
    n_folds,
    score_halves,
)
from sest.evaluation.cell_eval_scores import (
    CONTROL,
    CellEvalFailed,
    cell_eval_scores,
    cells_with_mean,
    controls_of,
    overall_scores,
    stack,
)
from sest.evaluation.distances import PAIRS, Controls, energy_distances, random_of, sampled
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, pearson_delta
from sest.evaluation.record import Record, read_record
from sest.evaluation.results import Evaluation, means_over_pairs
from sest.evaluation.sides import (
    Comparison,
    Reading,
    align,
    check_scales,
    differing_sides,
    prediction_columns,
    real_columns,
)
from sest.files.cell_file import CellFile
from sest.files.in_memory import file_of
from sest.files.remote import located
from sest.files.write_h5ad import as_written
from sest.machine.jit import say_slow_loops

if TYPE_CHECKING:
    from anndata import AnnData


NOT_TOLD = (
    "{} does not say which cells were predicted together, and how far they follow the controls: both are taken for "
    "independent. energy_distance is too low for a model that sees several cells at once, and "
    "pearson_delta_independent for one that starts from the control cells."
)


def evaluate(
    predicted: str | os.PathLike[str] | AnnData,
    real: str | os.PathLike[str] | AnnData,
    config: EvaluateConfig | None = None,
) -> Evaluation:
    """Score predicted cells (log1p, with controls) against real ones (counts or log1p).

    An effect is a pseudobulk minus the control mean of its own file, as in cell-eval; PDS ranks within each cell type.
    Counts are normalised over all genes of their file.

    Args:
        predicted, real: .h5ad files, or AnnData in memory (written to a temporary file and read from it).
        config: column names, layer, values and control label describe `real`; a prediction of `sest predict` knows its
            own, a foreign one is read with the same names or detected.

    Raises:
        InputError: genes or pairs of the prediction that `real` does not have, cell types without real controls,
            several possible columns, and whatever makes a file unreadable.
    """
    config = config or EvaluateConfig()
    notes: list[str] = []
    p_name, r_name = _name(predicted, "predicted"), _name(real, "real")
    with (
        file_of(predicted, "predicted", None) as p_path,
        file_of(real, "real", config.layer) as r_path,
        CellFile(as_written(p_path)) as p,
        CellFile(as_written(r_path), config.layer, config.modality) as r,
    ):
        p.path, r.path = located(p_name), located(r_name)  # what messages call them
        record = read_record(p)
        p_columns = prediction_columns(p, record, config)
        r_columns = real_columns(r, p_columns, config)
        notes += [f"{file.path}: {note}" for file, c in ((p, p_columns), (r, r_columns)) for note in c.notes]
        task = align(p, p_columns, r, r_columns, record, config, notes)
        if record is None or record.draw is None or record.followed is None:
            notes.append(NOT_TOLD.format(p.path) + ("" if record is None else " Run `sest predict` again."))
        scored = _pairs_with_energy(task, config.seed, notes)
        say_slow_loops()
        task, one, other, draws = _read(task, scored, record, config, notes)
        read = one, other
        table, predictors = _own_scores(task, scored, read, draws, record, config.seed, notes)
        ceilings = _ceilings(task, read[1].cells, notes)
        overall: dict[str, float] = {}
        if config.cell_eval:
            table, overall = _add_cell_eval(table, task, read, predictors, config, notes)
    summary = means_over_pairs(table)
    for metric, score in means_of_halves(ceilings).items() if ceilings else ():
        summary["pearson_delta_independent" if metric == "pearson_delta" else metric]["real_half"] = score
    if overall:
        summary["overall_score_over"] = overall
    provenance: dict[str, object] = {
        "predicted": p_name,
        "made_by": record.made_by if record is not None else {},
        "real": r_name,
        "layer": config.layer,
        "modality": config.modality,
        "control": r_columns.control,
        "predicted_counts_normalised_to": read[0].target_sum,
        "real_counts_normalised_to": read[1].target_sum,
        "n_genes": len(task.genes),
        "n_pairs": len(task.pairs),
        "n_real_controls": dict(zip(task.cell_types, read[1].cells.counts.tolist(), strict=False)),
        "sest": sest.__version__,
        "cell_eval": importlib.metadata.version("cell-eval") if overall else None,
        "seed": config.seed,
    }
    return Evaluation(table, summary, provenance, tuple(notes), tuple(ceilings))


def _name(cells: str | os.PathLike[str] | AnnData, what: str) -> str:
    return os.fspath(cells) if isinstance(cells, str | os.PathLike) else f"{what} AnnData"


def _read(
    task: Comparison, scored: np.ndarray, record: Record | None, config: EvaluateConfig, notes: list[str]
) -> tuple[Comparison, Reading, Reading, list[np.ndarray | None]]:
    """The cells of both sides, the real ones in folds; draws and controls of the prediction's sample, where known.

    Counts of a prediction that has fewer genes than the real file can only be normalised over these: then both are.

    Nothing is scored before both are known to be sound.
    """
    n_types, n_groups = len(task.cell_types), task.n_groups
    wanted = {i: (name,) for i, name in enumerate(task.cell_types)}
    wanted |= {n_types + pair: task.pairs[pair] for pair in scored.tolist()}
    keep = {side: sampled(side.group, wanted, config.seed) for side in (task.predicted, task.real)}
    predicted = task.predicted.read(n_groups, n_types, keep=keep[task.predicted])
    by_genes = predicted.target_sum is not None and task.real.file.n_genes > len(task.genes)
    of_real = replace(task.real, by_genes=by_genes)
    real = of_real.read(n_groups, n_types, n_folds(n_groups, len(task.genes)), config.seed, keep[task.real])
    check_scales(predicted, real, of_real.file.path, record, config, notes)
    if by_genes:
        notes.append(
            "Counts of both files are normalised over the genes of the prediction, which has not all of the real ones."
            if real.target_sum is not None
            else "The prediction's counts are normalised over its genes, and the real log1p values were over more of "
            "them, so that mae means nothing. Give the real cells as counts (often a --layer)."
        )
    task = replace(task, real=of_real)
    made = (None, None) if record is None else (record.draw, record.source)
    return task, predicted, real, [None if numbers is None else numbers[keep[task.predicted]] for numbers in made]


def _own_scores(
    task: Comparison,
    scored: np.ndarray,
    read: tuple[Reading, Reading],
    draws: Sequence[np.ndarray | None],
    record: Record | None,
    seed: int,
    notes: list[str],
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The table with the own metrics, and each predictor's pseudobulks (n_pairs, G)."""
    n_types, own_type = len(task.cell_types), task.own_type
    alone = np.flatnonzero(np.bincount(own_type, minlength=n_types) == 1)
    if len(alone):
        names = shown(task.cell_types[i] for i in alone)
        notes.append(f"One perturbation each is scored in {names}: no pds there (-), as it ranks several.")
    p, r = read
    predicted, n_predicted, real, n_real = p.cells.means, p.cells.counts, r.cells.means, r.cells.counts
    if differing := differing_sides(
        task.predicted.file.path, p.normalisation, task.real.file.path, r.normalisation, record
    ):
        notes.append(differing)
    without = np.flatnonzero(n_predicted[:n_types] == 0)
    added_to = None if record is None else record.control_means(task.cell_types, len(task.genes))
    if len(without):
        predicted[without] = real[without]
    from_controls = predicted[:n_types] if added_to is None else added_to
    if len(without) and added_to is None:
        names = shown(task.cell_types[i] for i in without)
        notes.append(f"The prediction has no control cells of {names}: its effects are from the real ones.")
    predictors = {"model": predicted[n_types:], "controls": real[own_type]}
    if record is not None:
        predictors |= record.baselines_of(task.pairs, len(task.genes))
    table = pd.DataFrame(task.pairs, columns=["cell_type", "perturbation"])
    table["n_predicted"], table["n_real"] = n_predicted[n_types:], n_real[n_types:]
    observed, control = real[n_types:], real[own_type]
    distances = _energy(task, predictors, scored, *read, predicted[:n_types], draws, seed, notes)
    parts = []
    for name, means in predictors.items():
        own_control = control if name == "controls" else from_controls[own_type]
        pds, independent = np.empty((2, len(means)))
        for i in range(n_types):
            at = np.flatnonzero(own_type == i)
            follows = 1.0 if name != "model" else record.followed if record is not None else None
            independent[at] = independent_pearson_delta(
                r.cells, i, means[at], observed[at], own_control[at[0]], follows or 0.0
            )
            perturbations = [task.pairs[row][1] for row in at]
            pds[at] = discrimination_score(
                means[at], observed[at], control[at], perturbations, task.genes, own_control[at]
            )
        parts.append(
            table.assign(
                predictor=name,
                pearson_delta=pearson_delta(means, observed, control, own_control),
                pearson_delta_independent=independent,
                mae=mean_absolute_error(means, observed),
                pds=pds,
                energy_distance=distances[name],
            )
        )
    return pd.concat(parts, ignore_index=True), predictors


def _pairs_with_energy(task: Comparison, seed: int, notes: list[str]) -> np.ndarray:
    """The pairs that get an energy distance: all, or PAIRS of them, drawn."""
    n = len(task.pairs)
    if n <= PAIRS:
        return np.arange(n)
    notes.append(f"energy_distance is that of {PAIRS} of {n:,} pairs, drawn.")
    return np.sort(np.random.default_rng([seed, n]).choice(n, PAIRS, replace=False))


def _energy(
    task: Comparison,
    predictors: dict[str, np.ndarray],
    scored: np.ndarray,
    predicted: Reading,
    real: Reading,
    control_means: np.ndarray,
    draws: Sequence[np.ndarray | None],
    seed: int,
    notes: list[str],
) -> dict[str, np.ndarray]:
    """Energy distances (n_pairs,) by predictor, NaN of pairs that are not `scored`.

    `control_means`: (cell types, G) of the prediction's controls; `draws`: see `_read`.
    """
    n_types, own_type = len(task.cell_types), task.own_type
    found = {name: np.full(len(task.pairs), np.nan) for name in predictors}
    progress.begin("Comparing cells", len(scored), "pairs")
    together, controls = 0, []
    for kind in range(n_types):
        of_real, own = real.sample_of(kind), predicted.sample_of(kind)
        controls.append(Controls(of_real, own if own.shape[0] else of_real, control_means[kind]))
    for pair in scored.tolist():
        group = n_types + pair
        mine = predicted.sampled == group
        draw, source = (numbers if numbers is None else numbers[mine] for numbers in draws)
        together += draw is not None and len(np.unique(draw)) < 2
        distances = energy_distances(
            real.sample_of(group),
            predicted.sample_of(group),
            controls[own_type[pair]],
            {name: means[pair] for name, means in predictors.items()},
            int(predicted.cells.counts[group]),
            random_of(seed, 0x305E, *task.pairs[pair]),
            draw,
            source,
        )
        for name, distance in distances.items():
            found[name][pair] = distance
        progress.advance(1)
    if together:
        notes.append(f"No energy_distance of {together:,} pairs: all of their few cells were predicted together.")
    return found


def _ceilings(task: Comparison, real_cells: Folds, notes: list[str]) -> list[Ceiling]:
    """What real cells show of themselves, by cell type; where that is nothing, it is said."""
    progress.begin("Comparing halves of the real cells", len(task.cell_types), "cell types")
    found, n_types, n_cells = [], len(task.cell_types), real_cells.counts
    for i, cell_type in enumerate(task.cell_types):
        rows = np.flatnonzero(task.own_type == i)
        names = [task.pairs[row][1] for row in rows]
        controls, folds_of = real_cells.some(np.array([i])), partial(_some_pairs, real_cells, n_types + rows)
        halves = score_halves(controls, n_cells[n_types + rows], folds_of, names, task.genes)
        one = ceiling(controls, halves, cell_type)
        if one is None:
            notes.append(
                f"{cell_type}: fewer than {LEAST_CELLS} controls, or cells of every perturbation: whether there is an "
                "effect to predict cannot be told."
            )
        else:
            found.append(one)
            notes += [verdict] if (verdict := one.verdict()) else []
        progress.advance(1)
    return found


def _some_pairs(cells: Folds, groups: np.ndarray, places: np.ndarray) -> Folds:
    """Those of some of the pairs, whose groups are (n,)."""
    return cells.some(groups[places])


def _add_cell_eval(
    table: pd.DataFrame,
    task: Comparison,
    read: tuple[Reading, Reading],
    predictors: dict[str, np.ndarray],
    config: EvaluateConfig,
    notes: list[str],
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The table with cell-eval's columns, and its overall scores; as it was, with a note, where that cannot be."""
    if importlib.util.find_spec("cell_eval") is None:
        notes.append("cell-eval is not installed: no DES and no overall score. Run pip install 'sest[eval]'.")
        return table, {}
    try:
        scores = _scores_of_cell_eval(task, read, predictors, config.threads, config.seed)
    except CellEvalFailed as error:
        notes.append(f"cell-eval failed, so there is no DES and no overall score: {error}.")
        return table, {}
    table = table.merge(scores, on=["cell_type", "perturbation", "predictor"], how="left", validate="one_to_one")
    return table, overall_scores(table)


def _scores_of_cell_eval(
    task: Comparison, read: tuple[Reading, Reading], predictors: dict[str, np.ndarray], threads: int, seed: int
) -> pd.DataFrame:
    """cell-eval's columns for every (cell_type, perturbation, predictor), one cell type in memory at a time."""
    parts = []
    n_types = len(task.cell_types)
    progress.begin("Running cell-eval", n_types, "cell types")
    for at, cell_type in enumerate(task.cell_types):
        rows = {n_types + i: name for i, (of, name) in enumerate(task.pairs) if of == cell_type}  # group -> name
        predicted, real = (
            side.cells_of({at: CONTROL, **rows}, found.target_sum)
            for side, found in zip((task.predicted, task.real), read, strict=True)
        )
        if CONTROL not in predicted[1]:
            predicted = stack([predicted, controls_of(real)])
        predictions = {"model": predicted}
        for predictor in [name for name in predictors if name != "model"]:
            controls = controls_of(real if predictor == "controls" else predicted)
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
