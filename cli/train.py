"""`sest train`: phase two, store to head."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from sest.cli import console
from sest.cli.options import given, opt, whole_or_auto
from sest.config import TrainConfig, read_toml
from sest.errors import InputError
from sest.progress import Silent
from sest.ranks import device_of_rank, ranks_of

if TYPE_CHECKING:
    from sest.dataset import Dataset
    from sest.diagnose import Finding
    from sest.model import StateTransition

Text = Optional[str]  # noqa: UP045 - Typer shows Optional types as plain ones
Whole = Optional[int]  # noqa: UP045
Real = Optional[float]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045


def train(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="a finished store, made by `sest embed`")],
    run: Annotated[Path, typer.Option("--run", "-r", help="run folder to create, or to continue with --resume")],
    resume: Annotated[
        Text,
        typer.Option(
            help="continue from 'auto' (the run's furthest checkpoint) or a checkpoint folder; default: a new run",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="TOML with options (as config.toml of a run); the command line wins; default: none", show_default=False
        ),
    ] = None,
    perturbations: Annotated[Text, opt(TrainConfig, "perturbations")] = None,
    splits: Annotated[Text, opt(TrainConfig, "splits")] = None,
    missing_perturbations: Annotated[Text, opt(TrainConfig, "missing_perturbations")] = None,
    val_fraction: Annotated[Real, opt(TrainConfig, "val_fraction")] = None,
    max_steps: Annotated[Whole, opt(TrainConfig, "max_steps")] = None,
    batch_size: Annotated[Whole, opt(TrainConfig, "batch_size", parser=whole_or_auto)] = None,
    set_size: Annotated[Whole, opt(TrainConfig, "set_size")] = None,
    accumulate: Annotated[Whole, opt(TrainConfig, "accumulate")] = None,
    lr: Annotated[Real, opt(TrainConfig, "lr")] = None,
    weight_decay: Annotated[Real, opt(TrainConfig, "weight_decay")] = None,
    clip: Annotated[Real, opt(TrainConfig, "clip")] = None,
    loss: Annotated[Text, opt(TrainConfig, "loss")] = None,
    target_sum: Annotated[Text, opt(TrainConfig, "target_sum")] = None,
    controls: Annotated[Text, opt(TrainConfig, "controls")] = None,
    control_targets: Annotated[Switch, opt(TrainConfig, "control_targets")] = None,
    hidden: Annotated[Whole, opt(TrainConfig, "hidden")] = None,
    n_layers: Annotated[Whole, opt(TrainConfig, "n_layers")] = None,
    n_heads: Annotated[Whole, opt(TrainConfig, "n_heads")] = None,
    ffn: Annotated[Whole, opt(TrainConfig, "ffn")] = None,
    n_encoder_layers: Annotated[Whole, opt(TrainConfig, "n_encoder_layers")] = None,
    n_decoder_layers: Annotated[Whole, opt(TrainConfig, "n_decoder_layers")] = None,
    dropout: Annotated[Real, opt(TrainConfig, "dropout")] = None,
    val_every: Annotated[Whole, opt(TrainConfig, "val_every")] = None,
    val_sets: Annotated[Whole, opt(TrainConfig, "val_sets")] = None,
    checkpoint_every: Annotated[Whole, opt(TrainConfig, "checkpoint_every")] = None,
    log_every: Annotated[Whole, opt(TrainConfig, "log_every")] = None,
    early_stopping: Annotated[Switch, opt(TrainConfig, "early_stopping")] = None,
    patience: Annotated[Whole, opt(TrainConfig, "patience")] = None,
    max_bad_steps: Annotated[Whole, opt(TrainConfig, "max_bad_steps")] = None,
    precision: Annotated[Text, opt(TrainConfig, "precision")] = None,
    compile: Annotated[Switch, opt(TrainConfig, "compile")] = None,
    gradients: Annotated[Text, opt(TrainConfig, "gradients")] = None,
    num_workers: Annotated[Whole, opt(TrainConfig, "num_workers")] = None,
    scratch: Annotated[Text, opt(TrainConfig, "scratch")] = None,
    data_device: Annotated[Text, opt(TrainConfig, "data_device")] = None,
    tensorboard: Annotated[Switch, opt(TrainConfig, "tensorboard")] = None,
    wandb: Annotated[Text, opt(TrainConfig, "wandb")] = None,
    device: Annotated[Text, opt(TrainConfig, "device")] = None,
    seed: Annotated[Whole, opt(TrainConfig, "seed")] = None,
) -> None:
    """Train the State Transition head from a store.

    Several GPUs: torchrun --nproc-per-node 4 -m sest train CACHE -r DIR (-r, as torchrun takes --run for an option of
    its own).

    The run folder gets config.toml, metrics.jsonl, checkpoint-step-N/, best/ (lowest val_loss) and last/.
    """
    options = given({name: value for name, value in locals().items() if name in TrainConfig.names()})
    if config is not None:
        file_values = read_toml(config)
        file_values.pop("provenance", None)
        TrainConfig.from_values(file_values, str(config))
        options = {**file_values, **options}
    if resume == "auto" and not run.exists():
        raise InputError(f"{run} does not exist: nothing to resume. Leave --resume out to start it.")
    from sest.curves import read_curves, read_lines
    from sest.diagnose import diagnose
    from sest.run_folder import METRICS, resumed_config  # imports torch
    from sest.train import train as run_training

    if resume is None:
        resolved = TrainConfig.from_values(options, "the command line")
    else:
        resolved = resumed_config(run, resume, options)
    ranks = ranks_of(None, None, os.environ)
    resolved = dataclasses.replace(resolved, device=device_of_rank(resolved.device, os.environ))
    if ranks.rank:  # the first process speaks for all
        run_training(cache, run, resolved, Silent(), resume=resume, ranks=ranks)
        return
    patience = resolved.patience if resolved.early_stopping else None
    with console.ConsoleProgress(patience=patience) as progress:

        def start(data: Dataset, model: StateTransition) -> None:
            _show_start(data, model)
            progress.remember(read_lines(run / METRICS))

        result = run_training(
            cache, run, resolved, progress, resume=resume, ranks=ranks, on_start=start, on_log=progress.show
        )
    why = "no improvement" if result.reason == "early_stopping" else "all steps done"
    best = f"; best val_loss {result.best_val_loss:.4f} at step {result.best_step:,}" if result.best_step else ""
    console.say(f"{run}: step {result.step:,} ({why}){best}.")
    if result.metrics:
        console.table(
            "Last validation", ["metric", "model", "perturbation mean", "controls"], validation_rows(result.metrics)
        )
    curves = read_curves(run / METRICS)
    show_findings(
        "Diagnosis", diagnose(curves, run=str(run), cache=str(cache), max_steps=resolved.max_steps, patience=patience)
    )
    console.say(f"`sest report {shlex.quote(str(run))}` draws all of this.")


def show_findings(title: str, findings: list[Finding]) -> None:
    """What the curves say, a line each."""
    console.say(title)
    for finding in findings:
        console.say(f"- {finding.name} ({finding.level}): {finding.evidence} {finding.advice}".rstrip())


def validation_rows(metrics: dict[str, float]) -> list[list[str]]:
    """The metrics of a validation beside its baselines, as table rows."""
    return [
        [name, *(f"{metrics[key]:.4f}" for key in (name, f"{name}_perturbation_mean", f"{name}_controls"))]
        for name in ("val_loss", "pearson_delta", "mae", "pds")
    ]


def show_splits(rows: list[list[Any]]) -> None:
    """The cells of a store by dataset, cell type and split: the fields of `sest.splits.SplitRow`."""
    columns = ["dataset", "cell type", "split", "perturbations", "cells", "controls"]
    console.table("Cells", columns, [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows])


def _show_start(data: Dataset, model: StateTransition) -> None:
    """Show what will be trained on, and what."""
    from sest.model import n_parameters

    show_splits([list(vars(row).values()) for row in data.table])
    s = model.sizes
    console.say(
        f"Head: {n_parameters(model):,} trainable parameters; embeddings {s.dim}, features {s.n_features}, "
        f"{s.n_genes:,} genes; targets: {_targets(data)}."
    )


def _targets(data: Dataset) -> Any:
    if data.targets.scale == "log1p":
        return "log1p values as they are"
    return f"log1p of counts normalised to {data.targets.target_sum:g}"
