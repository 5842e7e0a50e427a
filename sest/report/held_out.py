"""The section on held-out perturbations: how well each is predicted, and which genes change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sest.evaluation.pairs import mean_scores
from sest.report.cache_facts import CacheFacts, PairResults
from sest.report.figures import MOST_GENES, MOST_PAIRS, choosable, gene_scatter, overview, pair_name, ranked
from sest.report.page import Html, Page, details, element, join, note, paragraph, sentence_case, table
from sest.report.run_facts import RunFacts

NO_CACHE = "Left out: it needs the cache and the model, and --no-model was given."
EXTREMES = 5  # worst and best pairs in tables of their own


def perturbations(page: Page, run: RunFacts, cache: CacheFacts | None) -> Html:
    if cache is None:
        return note(NO_CACHE)
    if cache.pairs is None:
        return note("Not shown, as the held-out cells could not be predicted. ", cache.notes["pairs"])
    assert run.checkpoint is not None
    whose = "head and baselines together" if run.checkpoint.has_blend else "the head"
    parts = [
        paragraph(
            f"The held-out cells as `sest predict` gives them from {run.checkpoint.folder.name}/ (step "
            f"{run.checkpoint.state['step']:,}), by {whose}, one line a cell type and perturbation. A change is a "
            "mean log1p expression minus that of the controls."
        )
    ]
    parts += [_means(result) for result in cache.pairs]
    parts.append(page.plot("Effect and how well it is predicted, one dot a perturbation", overview(cache.pairs)))
    parts.append(_genes(page, cache.pairs, cache.genes))
    parts += [_pair_tables(result) for result in cache.pairs]
    return join(parts)


def _means(result: PairResults) -> Html:
    scores = mean_scores(result.scores)
    never = ""
    if result.n_not_learned:
        never = (
            f" Of {result.n_not_learned:,} of these pairs the head can have learned nothing: their scores are chance."
        )
    pds = f"{scores['pds']:.3f}" if np.isfinite(scores["pds"]) else "- (it needs two perturbations of a cell type)"
    sets = f"{result.n_sets:,} of its {result.of_sets:,} sets" if result.n_sets < result.of_sets else "all its sets"
    return paragraph(
        element("b", f"{sentence_case(result.split)} split"),
        f": {len(result.perturbations):,} pairs, {int(result.n_cells.sum()):,} cells ({sets} predicted). Means: "
        f"pearson_delta {scores['pearson_delta']:.3f} (stack {scores['stack']:.3f}), "
        f"mae {scores['mae']:.4g}, pds {pds}.{never} {' '.join(f'Weights in {said}' for said in result.weights)}",
    )


def _genes(page: Page, results: Sequence[PairResults], genes: Sequence[str]) -> Html:
    pairs = choosable(results)
    figures = {}
    for result, k in pairs:
        score = float(result.scores["pearson_delta"][k])
        name = f"{pair_name(result, k)} ({result.split}, {score:.2f})"
        figures[name] = gene_scatter(result, k, genes)
    n_all = sum(len(result.perturbations) for result in results)
    limit = f" To choose from: the worst and the best {MOST_PAIRS // 2} pairs." if n_all > MOST_PAIRS else ""
    shown = f"The {MOST_GENES} genes" if len(genes) > MOST_GENES else f"All {len(genes):,} genes"
    largest = " with the largest observed or predicted change" if len(genes) > MOST_GENES else ""
    return join(
        [
            element("h3", "Predicted against observed change, one dot a gene"),
            paragraph(
                f"{shown}{largest}; on the dashed line a prediction is right. The list is ordered from the worst to "
                f"the best pearson_delta.{limit}"
            ),
            page.choices(["Worst predicted, or another", "Best predicted, or another"], [0, len(figures) - 1], figures),
        ]
    )


def _pair_tables(result: PairResults) -> Html:
    order = ranked(result)
    columns = ["perturbation", "cell type", "cells", "pearson_delta", "stack", "mae", "pds", "effect"]

    def rows(chosen: np.ndarray) -> list[list[Any]]:
        scores = result.scores
        return [
            [
                result.perturbations[k],
                result.cell_types[k],
                int(result.n_cells[k]),
                *(float(scores[name][k]) for name in ("pearson_delta", "stack", "mae", "pds")),
                float(result.effect[k]),
            ]
            for k in chosen
        ]

    split = sentence_case(result.split)
    if len(order) < 2 * EXTREMES:
        return join([element("h3", f"{split} split: all pairs, the worst first"), table(columns, rows(order))])
    return join(
        [
            element("h3", f"{split} split: the {EXTREMES} worst"),
            table(columns, rows(order[:EXTREMES])),
            element("h3", f"{split} split: the {EXTREMES} best"),
            table(columns, rows(order[::-1][:EXTREMES])),
            details(f"All {len(order):,} pairs of the {result.split} split", table(columns, rows(order))),
        ]
    )
