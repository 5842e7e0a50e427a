"""`sest evaluate`: predicted cells against real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.config import EvaluateConfig
from sest.errors import InputError, nearest
from sest.evaluation.ceiling import Ceiling
from sest.outputs import check_output

if TYPE_CHECKING:
    from sest.evaluation.results import Evaluation

GROUPS = {
    "What REAL is": "pert_col cell_type_col control labels gene_col layer modality counts",
    "How it is scored": "target_sum cell_eval threads seed",
}


@help_page(
    "sest evaluate predicted.h5ad cells.h5ad --out evaluation",
    "sest evaluate predicted.h5ad cells.h5ad --out scores --suite vcc2025",
    usual="suite force pert_col cell_type_col control labels counts target_sum cell_eval",
)
@options(EvaluateConfig, GROUPS)
def evaluate(
    predicted: Annotated[Path, typer.Argument(metavar="PRED", help=".h5ad of `sest predict`, or any log1p prediction")],
    real: Annotated[Path, typer.Argument(metavar="REAL", help=".h5ad with the real cells, counts or log1p")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="output: a new or empty folder, for results.csv and summary.json")
    ],
    suite: Annotated[
        str | None,
        typer.Option(
            help="the challenge's own scores, by its packages, context by context: vcc2025 (extra eval) or vcc2026 "
            "(extra challenge); default: none"
        ),
    ] = None,
    force: Force = False,
    **options: Any,
) -> None:
    """Score predicted cells against real ones, beside baselines.

    Metrics: pearson_delta, mae and pds on pseudobulks; with the extra `eval` also cell-eval's.
    """
    config = EvaluateConfig.from_values(options, "the command line")
    if suite is not None:
        _suite(predicted, real, suite, out, force, config)
        return
    from sest.evaluation.evaluate import evaluate as score
    from sest.evaluation.results import FILES

    check_output(out, inputs=[predicted, real], force=force, made=FILES)
    with ConsoleProgress():
        evaluation = score(predicted, real, config)
    evaluation.write(out, force=force)
    show_evaluation(evaluation, f"{predicted.name} against {real.name}")
    console.say(f"Written: {out / 'results.csv'}, {out / 'summary.json'}")


def show_evaluation(evaluation: Evaluation, title: str) -> None:
    """Scores of all predictors, and what half of the real cells shows of the other."""
    for note in evaluation.notes:
        console.say(note)
    show_summary(evaluation.summary, title)
    show_ceilings(evaluation.ceilings)


def _suite(predicted: Path, real: Path, suite: str, out: Path, force: bool, config: EvaluateConfig) -> None:
    """Score by the packages of the challenge, and show it beside what sest says."""
    from sest.cache.disk import folder_aside
    from sest.compat.suite import MADE, MEMBERS, OVERALL, SCORES, SUITES, score_suite

    if suite not in SUITES:
        raise InputError(f"--suite is {suite!r}; it takes one of: {', '.join(SUITES)}.{nearest(suite, SUITES)}")
    check_output(out, inputs=[predicted, real], force=force, made=MADE)
    with ConsoleProgress(), folder_aside(out.resolve(), parents=True) as aside:
        results = score_suite(predicted, real, suite, aside, config)
    for result in results:
        show_summary(result.own.summary, f"context {result.context}: {predicted.name} against {real.name}")
        for note in result.own.notes:
            console.say(note)
        show_ceilings(result.own.ceilings)
        if result.failed:
            console.say(f"No score in context {result.context}. The package says: {result.failed}")
            continue
        short = {**MEMBERS[suite], OVERALL: "Overall"}
        rows = [
            [short[str(row[0])], *(console.figure(float(value)) for value in row[1:])]
            for row in result.table.to_numpy()
        ]
        columns = ["member", "this", "controls", "mean response", "replicate", "score", "of controls"]
        console.table(f"{suite}, context {result.context}", columns, rows)
    console.say(f"Written: {out / SCORES}, and for each context a folder with all that was measured.")


def show_ceilings(ceilings: Sequence[Ceiling]) -> None:
    """What halves of the real cells show of each other: where that is nothing, there is nothing to predict."""
    rows = [
        [
            c.cell_type,
            f"{c.n_perturbations:,}",
            f"{c.n_cells:,}",
            f"{c.n_controls:,}",
            f"{c.pearson_delta:.2f} ± {c.pearson_delta_se:.2f}",
            console.figure(c.mae),
            console.figure(c.mae_controls),
            console.figure(c.pds),
        ]
        for c in ceilings
    ]
    if rows:
        columns = ["cell type", "pert.", "cells", "controls", "pearson delta", "mae", "mae of controls", "pds"]
        console.table("half of the real cells predicts the other half", columns, rows)


def show_summary(summary: dict[str, dict[str, float]], title: str) -> None:
    """A table of predictors, the model first, and their metrics."""
    predictors = list(dict.fromkeys(name for scores in summary.values() for name in scores))
    columns = ["predictor", *(metric.replace("_", " ") for metric in summary)]
    rows = [
        [name.replace("_", " "), *(console.figure(scores.get(name, math.nan)) for scores in summary.values())]
        for name in predictors
    ]
    console.table(title, columns, rows)
