"""`sest predict`: a trained head to predicted cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import Force, options
from sest.cli.progress import ConsoleProgress
from sest.config import VCC2026, PredictConfig

if TYPE_CHECKING:
    from sest.prediction.predict import Prediction

GROUPS = {
    "What to predict": "template list only all_perturbations n_cells cell_type perturbations genes",
    "What is written": "format target_sum effects with_controls vcc",
    "From which control cells": (
        "cache controls all_controls encoder layer modality mixed_scales gene_col missing_genes"
    ),
    "What --template or --controls is": "pert_col cell_type_col control",
    "With what": "blend checkpoint device precision seed",
}


@help_page(
    "sest predict run --out predicted.h5ad",
    "sest predict run --out new.h5ad --controls atlas.h5ad --only STAT1,JAK2",
    usual="list only all_perturbations cell_type format controls all_controls encoder blend device",
)
@options(PredictConfig, GROUPS)
def predict(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="run folder, or one of its checkpoint folders; also hf://OWNER/NAME; several are averaged",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="output: the .h5ad to write")],
    force: Force = False,
    **options: Any,
) -> None:
    """Predict perturbed cells with a trained head and the baselines beside it.

    They are written with real control cells, as an .h5ad of log1p values, or
    as a submission to the challenge (--format).
    Without --template, --list, --only or --all-perturbations: the run's test
    split.
    """
    config = PredictConfig.from_values(options, "the command line")
    from sest.prediction.predict import predict as run_prediction  # imports torch

    with ConsoleProgress():
        result = run_prediction(run, out, config, force=force)
    show_prediction(result, out, config)


def show_prediction(result: Prediction, out: Path, config: PredictConfig) -> None:
    """Say what was predicted."""
    controls = f" and {result.n_controls:,} real controls" if config.format != VCC2026 else ", whole counts"
    console.say(
        f"{out}: {result.n_predicted:,} predicted cells of {result.n_perturbations:,} perturbations{controls}, "
        f"{result.n_genes:,} genes; "
        f"from {result.checkpoint} (step {result.step:,})"
        + (f" and {result.n_runs - 1} more." if result.n_runs > 1 else ".")
    )
    if config.vcc is not None:
        console.say(f"{config.vcc}: the same cells, for `vcc submit`.")
    for copy in result.copies:
        console.say(f"{copy}: the cells of this context and its real controls, for cell-eval2.")
