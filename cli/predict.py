"""`sest predict`: a trained head to predicted cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sest.cli import console
from sest.cli.options import given, opt
from sest.config import PredictConfig

Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones
Whole = Optional[int]  # noqa: UP045


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or one of its checkpoint folders")],
    out: Annotated[Path, typer.Option("--out", "-o", help=".h5ad to write")],
    checkpoint: Annotated[Text, opt(PredictConfig, "checkpoint")] = None,
    cache: Annotated[Text, opt(PredictConfig, "cache")] = None,
    perturbations: Annotated[Text, opt(PredictConfig, "perturbations")] = None,
    template: Annotated[Text, opt(PredictConfig, "template")] = None,
    counts: Annotated[Text, opt(PredictConfig, "counts")] = None,
    only: Annotated[Text, opt(PredictConfig, "only")] = None,
    n_cells: Annotated[Whole, opt(PredictConfig, "n_cells")] = None,
    cell_type: Annotated[Text, opt(PredictConfig, "cell_type")] = None,
    cells: Annotated[Text, opt(PredictConfig, "cells")] = None,
    encoder: Annotated[Text, opt(PredictConfig, "encoder")] = None,
    layer: Annotated[Text, opt(PredictConfig, "layer")] = None,
    genes: Annotated[Text, opt(PredictConfig, "genes")] = None,
    pert_col: Annotated[Text, opt(PredictConfig, "pert_col")] = None,
    cell_type_col: Annotated[Text, opt(PredictConfig, "cell_type_col")] = None,
    control: Annotated[Text, opt(PredictConfig, "control")] = None,
    device: Annotated[Text, opt(PredictConfig, "device")] = None,
    precision: Annotated[Text, opt(PredictConfig, "precision")] = None,
    seed: Annotated[Whole, opt(PredictConfig, "seed")] = None,
) -> None:
    """Predict perturbed cells with a trained head.

    They are written, with real control cells, as an h5ad (log1p, at most 14).
    Without --template, --counts or --only: the cells of the run's test split.
    """
    options = given({name: value for name, value in locals().items() if name in PredictConfig.names()})
    config = PredictConfig.from_values(options, "the command line")
    from sest.predict import predict as run_prediction  # imports torch

    with console.ConsoleProgress() as progress:
        result = run_prediction(run, out, config, progress)
    console.say(
        f"{out}: {result.n_predicted:,} predicted cells of {result.n_perturbations:,} perturbations and "
        f"{result.n_controls:,} real controls, {result.n_genes:,} genes; "
        f"from {result.checkpoint} (step {result.step:,})."
    )
