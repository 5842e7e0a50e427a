"""The section on held-out perturbations: every score beside every baseline's, and effects, genes and cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sest.facts.cache import CacheFacts
from sest.facts.cells import CellMap
from sest.facts.pairs import CONTROL_SETS, MOST_RANKED, PairResults
from sest.facts.run import RunFacts
from sest.facts.scores import MODEL, Scoreboard
from sest.report.page import Html, Page, element, grid, join, note, paragraph, sentence_case, table
from sest.report.pair_figures import (
    HEAT_PAIRS,
    MOST_BARS,
    MOST_GENES,
    MOST_PAIRS,
    calibration,
    cell_maps,
    choosable,
    discrimination,
    gene_scatter,
    heat_map,
    overview,
    pair_name,
    plain,
    score_bars,
)

NO_CACHE = "Left out: it needs the cache and the model, and --no-model was given."


def perturbations(page: Page, run: RunFacts, cache: CacheFacts | None, boards: Sequence[Scoreboard]) -> Html:
    """boards: those with pairs, one a split or an evaluation."""
    parts = [scores(page, board) for board in boards]
    if cache is None:
        return join([*parts, note(NO_CACHE)])
    if cache.pairs is None:
        return join([*parts, note("Not shown, as the held-out cells could not be predicted. ", cache.notes["pairs"])])
    assert run.checkpoint is not None
    whose = "head and baselines together" if run.checkpoint.has_blend else "the head"
    parts.append(
        paragraph(
            f"From here on the held-out cells as `sest predict` gives them from {run.checkpoint.folder.name}/ (step "
            f"{run.checkpoint.state['step']:,}), by {whose}. A change is a mean log1p expression minus that of the "
            "controls."
        )
    )
    parts += [_predicted(result) for result in cache.pairs]
    parts.append(_effects(page, cache.pairs))
    if cache.cells is not None:
        parts.append(_cells(page, cache.cells))
    parts.append(_genes(page, cache.pairs, cache.genes))
    return join(parts)


def scores(page: Page, board: Scoreboard) -> Html:
    """The means of a board, and every pair."""
    order = board.predictors
    metrics = list(board.by_pair)
    means = []
    for predictor in order:
        of = {s.metric: s.model if predictor == MODEL else s.baselines.get(predictor, math.nan) for s in board.scores}
        name = "this model" if predictor == MODEL else plain(predictor)
        means.append([element("b", name) if predictor == MODEL else name, *(of.get(metric) for metric in metrics)])
    if any(math.isfinite(board.real_half.get(metric, math.nan)) for metric in metrics):
        means.append(["half of the real cells", *(board.real_half.get(metric) for metric in metrics)])
    parts = [
        element("h3", f"{sentence_case(board.of)}: every score beside every baseline"),
        paragraph(f"Of {board.by}; means over {board.n_pairs:,} pairs. {_limits(board)}"),
        table(["predictor", *map(plain, metrics)], means),
    ]
    if not metrics:
        return join(parts)
    bars = {plain(metric): score_bars(board.by_pair[metric], metric, board.no_effect) for metric in metrics}
    n = len(next(iter(board.by_pair.values())))
    few = f" Of {n:,} pairs the {MOST_BARS // 2} furthest behind and ahead." if n > MOST_BARS else ""
    said = f"The bar is this model; each mark a baseline. At the top the pairs furthest behind the best baseline.{few}"
    parts.append(page.buttons(f"Scores of single pairs, {board.of}", bars, said, by="Metric"))
    parts += [_all_pairs(page, board, metric) for metric in metrics]
    return join(parts)


def _limits(board: Scoreboard) -> str:
    said = []
    if board.no_effect:
        said.append(f"No measurable effect, so no score there is a win: {', '.join(board.no_effect)}.")
    pds = board.by_pair.get("pds")
    if pds is not None and (n := int(pds[MODEL].isna().sum())):
        said.append(
            f"No pds of {n:,} pairs: it needs two perturbations of a cell type, and ranks {MOST_RANKED} at most."
        )
    return " ".join(said)


def _all_pairs(page: Page, board: Scoreboard, metric: str) -> Html:
    """A table of every pair, the worst first."""
    wide = board.by_pair[metric]
    order = np.argsort(np.nan_to_num(wide[MODEL].to_numpy(), nan=-np.inf), kind="stable")
    kinds, names = (wide.index.get_level_values(level).astype(str) for level in (0, 1))
    predictors = list(wide.columns)
    values = wide.to_numpy()
    assert board.pairs is not None
    n_cells = board.pairs.loc[board.pairs["predictor"] == MODEL, "n_real"].to_numpy()
    none = ["no effect" if kind in board.no_effect else "" for kind in kinds] if board.no_effect else None
    rows: list[list[Any]] = [
        [
            names[k],
            kinds[k],
            int(n_cells[k]),
            *(float(f"{v:.5g}") if math.isfinite(v) else None for v in values[k].tolist()),
            *([none[k]] if none else []),
        ]
        for k in order
    ]
    columns = ["perturbation", "cell type", "cells", *("this model" if p == MODEL else plain(p) for p in predictors)]
    return page.numbers(
        f"{plain(metric)} of all {len(rows):,} pairs", [*columns, *(["measurable"] if none else [])], rows
    )


def _predicted(result: PairResults) -> Html:
    """How many cells of a split were predicted, and what counts in them."""
    never = ""
    if result.n_not_learned:
        never = (
            f" Of {result.n_not_learned:,} of these pairs the head can have learned nothing: their scores are chance."
        )
    sets = f"{result.n_sets:,} of its {result.of_sets:,} sets" if result.n_sets < result.of_sets else "all its sets"
    draws = f", from {CONTROL_SETS} draws of controls a cell type" if result.shares_controls else ""
    return paragraph(
        element("b", f"{sentence_case(result.split)} split"),
        f": {len(result.perturbations):,} pairs, {int(result.n_cells.sum()):,} cells ({sets} predicted{draws}).{never} "
        f"{' '.join(f'Weights in {said}' for said in result.weights)}",
    )


def _effects(page: Page, results: Sequence[PairResults]) -> Html:
    last = results[-1]
    observed, model, _ = last.sizes
    known = observed > 0
    said = "On the dashed line a predicted effect is as large as the real one."
    if known.any():
        said += f" Median ratio of this model: {np.median(model[known] / observed[known]):.2g}."
    return grid(
        [
            page.plot("Effect and how well it is predicted, one dot a perturbation", overview(results)),
            page.plot(f"Size of effects, predicted and real, {last.split} split", calibration(last), said),
        ]
    )


def _cells(page: Page, cells: CellMap) -> Html:
    figures = cell_maps(cells)
    names = ["Largest effect, or another", "Smaller effect, or another"][: min(2, len(figures))]
    return join(
        [
            element("h3", f"Predicted, real and control cells: {cells.cell_type}, {cells.split} split"),
            paragraph(
                f"The {len(figures)} perturbations of largest effect, on the two principal components of the real "
                "cells' expression. A good prediction has its cells where the real ones are, and spread as they are."
            ),
            page.choices(names, [0, len(figures) - 1][: len(names)], figures),
        ]
    )


def _genes(page: Page, results: Sequence[PairResults], genes: Sequence[str]) -> Html:
    last, pairs = results[-1], choosable(results)
    maps = [
        page.plot(
            f"Genes that change most, log2 fold change, {last.split} split",
            heat_map(last, genes),
            f"The {min(HEAT_PAIRS, len(last.perturbations))} pairs of largest effect and the genes whose change is "
            "surest there, beside the spread of the controls. Change of mean log1p expression, divided by ln 2.",
        )
    ]
    if (matrix := discrimination(last, genes)) is not None:
        said = (
            "A row is dark where a real effect is near (L1 over genes) to the predicted one: its own, the circle, "
            "should be the darkest."
        )
        maps.append(page.plot(f"Which real effects a prediction is nearest to, {last.split} split", matrix, said))
    figures = {}
    for result, k in pairs:
        score = float(result.of_model("pearson_delta")[k])
        figures[f"{pair_name(result, k)} ({result.split}, {score:.2f})"] = gene_scatter(result, k, genes)
    n_all = sum(len(result.perturbations) for result in results)
    limit = f" To choose from: the worst and the best {MOST_PAIRS // 2} pairs." if n_all > MOST_PAIRS else ""
    shown = f"The {MOST_GENES} genes" if len(genes) > MOST_GENES else f"All {len(genes):,} genes"
    largest = " with the largest observed or predicted change" if len(genes) > MOST_GENES else ""
    return join(
        [
            element("h3", "Genes"),
            grid(maps),
            element("h3", "Predicted against observed change, one dot a gene"),
            paragraph(
                f"{shown}{largest}; on the dashed line a prediction is right. The list is ordered from the worst to "
                f"the best pearson_delta.{limit}"
            ),
            page.choices(["Worst predicted, or another", "Best predicted, or another"], [0, len(figures) - 1], figures),
        ]
    )
