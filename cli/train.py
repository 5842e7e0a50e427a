"""`sest train`: phase two, cache to head."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sest.cli import console
from sest.cli.help import help_page
from sest.cli.options import options, whole_or_auto
from sest.cli.progress import ConsoleProgress
from sest.config import TrainConfig, upgraded
from sest.errors import InputError
from sest.machine.ranks import device_of_rank, ranks_of
from sest.options import read_toml

if TYPE_CHECKING:
    from sest.data.dataset import Dataset
    from sest.head.model import StateTransition
    from sest.runs.diagnose import Finding
    from sest.training.train import TrainResult

GROUPS = {
    "What is learned from": "perturbations splits missing_perturbations val_fraction val_contexts target_sum "
    "mixed_scales gene_axis match_controls control_targets",
    "How long, how fast it learns": "preset max_steps max_time lr schedule warmup ema weight_decay clip batch_size "
    "set_size accumulate loss",
    "The head": "head init_from freeze hidden n_layers n_heads ffn n_encoder_layers n_decoder_layers dropout",
    "Validation and stopping": "val_every val_sets monitor early_stopping patience max_bad_steps",
    "What is kept and shown": "checkpoint_every keep_last log_every tensorboard wandb",
    "Speed and memory": "precision compile device gradients num_workers data_device scratch",
    "Repeating a run": "seed",
}


@help_page(
    "sest train cache.zarr --run run --splits splits.toml",
    "sest train cache.zarr --run run --resume auto --max-steps 80000",
    "torchrun --nproc-per-node 4 -m sest train cache.zarr -r run",
    usual="resume perturbations splits preset max_steps max_time head early_stopping device",
)
@options(TrainConfig, GROUPS, batch_size={"parser": whole_or_auto}, set_size={"parser": whole_or_auto})
def train(
    cache: Annotated[Path, typer.Argument(metavar="CACHE", help="a finished cache, made by `sest embed`")],
    run: Annotated[
        Path,
        typer.Option(
            "--run",
            "-r",
            help="run folder to create, or to continue with --resume; -r under torchrun, which takes --run for its own",
        ),
    ],
    resume: Annotated[
        str | None,
        typer.Option(
            help="continue from 'auto' (the run's furthest checkpoint) or a checkpoint folder; default: a new run"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML with options (as config.toml of a run); the command line wins; default: none"),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="train so many runs, of seeds that count up from --seed, one after another into seed-0, seed-1 ... of "
            "the run folder; `sest predict` averages them",
            rich_help_panel="Repeating a run",
        ),
    ] = 1,
    **options: Any,
) -> None:
    """Train the State Transition head from a cache.

    The run folder gets config.toml, metrics.jsonl, checkpoint-step-N/, best/ (lowest val_loss) and last/. At the end
    the weights of the head and of baselines are fitted on the validation pairs (see `sest blend`).
    """
    if config is not None:
        values = read_toml(config)
        if values.pop("provenance", None) is not None:  # a run's own config.toml, of an earlier sest perhaps
            values = upgraded(values)
        TrainConfig.from_values(values, str(config))
        options = {**values, **options}
    if seeds == 1:
        _train_one(cache, run, options, resume, config is not None)
        return
    from sest.training.train import train_seeds

    if ranks_of(None, None, os.environ).world_size > 1:
        raise InputError(
            "--seeds trains in one process. Under torchrun start one training a seed (--seed), each in a --run."
        )
    if resume not in (None, "auto"):
        raise InputError("With --seeds every run goes on from its own furthest checkpoint: pass --resume auto.")
    first = TrainConfig.from_values(options, "the command line").seed
    runs = train_seeds(
        run,
        first,
        seeds,
        lambda folder, seed, how: _train_one(cache, folder, {**options, "seed": seed}, how, config is not None),
        resume=resume is not None,
    )
    console.say(f"{len(runs)} runs: {', '.join(map(str, runs))}. `sest predict {shlex.quote(str(run))}` averages them.")


def _train_one(cache: Path, run: Path, options: dict[str, Any], resume: str | None, from_file: bool) -> None:
    from sest.runs.run_folder import config_of  # imports torch
    from sest.training.train import train as run_training

    resolved = config_of(run, options, resume, "the command line", from_file=from_file)
    ranks = ranks_of(None, None, os.environ)
    resolved = dataclasses.replace(resolved, device=device_of_rank(resolved.device, os.environ))
    if ranks.rank:  # the first process speaks for all
        run_training(cache, run, resolved, resume=resume, ranks=ranks, given=options)
        return
    with ConsoleProgress() as progress:

        def start(data: Dataset, model: StateTransition | None) -> None:
            show_beginning(progress, cache, run, data, model)

        result = run_training(
            cache, run, resolved, resume=resume, ranks=ranks, given=options, on_start=start, on_log=progress.show
        )
    show_end(result, cache, run)


def show_beginning(
    progress: ConsoleProgress, cache: Path, run: Path, data: Dataset, model: StateTransition | None
) -> None:
    """What will be trained, and all that the panel is to know; without a head (None) there is nothing to watch."""
    from sest.runs.curves import read_lines
    from sest.runs.run_folder import METRICS

    show_start(data, model)
    if model is not None:
        progress.train(about_run(cache, run))
        if (run / METRICS).exists():
            progress.remember(read_lines(run / METRICS))


def about_run(cache: Path, run: Path) -> dict[str, Any]:
    """What `sest.runs.diagnose.diagnose` is to know of a run."""
    from sest.cache import open_cache
    from sest.runs.run_folder import read_run_config

    config = TrainConfig.from_values(read_run_config(run)[0], str(run))
    return {
        "run": str(run),
        "cache": str(cache),
        "max_steps": config.max_steps,
        "patience": config.patience if config.early_stopping else None,
        "config": config,
        "encoder": str(open_cache(cache).attributes["encoder"]),
    }


def show_end(result: TrainResult, cache: Path, run: Path) -> None:
    """Say what became of a run."""
    from sest.runs.curves import read_curves
    from sest.runs.diagnose import diagnose
    from sest.runs.run_folder import METRICS

    why = {"early_stopping": "no improvement", "no_head": "no head"}.get(result.reason, "all steps done")
    best = f"; best val_loss {result.best_val_loss:.4f} at step {result.best_step:,}" if result.best_step else ""
    console.say(f"{run}: step {result.step:,} ({why}){best}.")
    if result.metrics:
        show_validation("Last validation", result.metrics)
    show_findings("Diagnosis", diagnose(read_curves(run / METRICS), **about_run(cache, run)))
    show_blend(result.blend)
    console.say(f"`sest report {shlex.quote(str(run))}` draws all of this.")


def show_findings(title: str, findings: list[Finding]) -> None:
    """What the curves say, a line each."""
    if findings:
        console.say(title)
    for finding in findings:
        console.say(f"- {finding.name} ({finding.level}): {finding.evidence} {finding.advice}".rstrip())


def show_blend(sentences: Sequence[str]) -> None:
    """What head and baselines count in predictions."""
    if sentences:
        console.say("Weights in predictions")
    for sentence in sentences:
        console.say(f"- {sentence}")


VALIDATED_BESIDE = ("controls", "perturbation_mean", "ridge", "kernel", "stack", "real_half")


def show_validation(title: str, metrics: dict[str, float]) -> None:
    """A table of the metrics of a validation, beside baselines and half of the real cells."""
    from sest.runs.curves import METRICS

    columns = [
        "metric",
        "model",
        *(name.replace("_", " ").replace("perturbation", "pert.") for name in VALIDATED_BESIDE),
    ]
    beside = ("", *(f"_{name}" for name in VALIDATED_BESIDE))
    rows = []
    for name in METRICS:
        values = (console.figure(metrics.get(f"{name}{of}", math.nan), width=6) for of in beside)
        said = name.replace("_independent", " indep.").replace("_", " ")
        rows.append([name if name == "val_loss" else said, *values])
    console.table(title, columns, rows)


def show_splits(rows: list[list[Any]]) -> None:
    """The cells of a cache by dataset, cell type and split: the fields of `sest.cells.splits.SplitRow`."""
    columns = ["dataset", "cell type", "split", "perturbations", "cells", "controls"]
    console.table("Cells", columns, [[f"{v:,}" if isinstance(v, int) else str(v) for v in row] for row in rows])


def show_start(data: Dataset, model: StateTransition | None) -> None:
    """Show what will be trained on, and what."""
    from sest.head.model import n_parameters

    show_splits([list(vars(row).values()) for row in data.table])
    if model is None:
        console.say(f"No head: the stack of baselines; {len(data.targets.genes):,} genes; targets: {_targets(data)}.")
        return
    s = model.sizes
    console.say(
        f"Head: {n_parameters(model):,} trainable parameters; embeddings {s.dim}, features {s.n_features}, "
        f"{s.n_genes:,} genes; targets: {_targets(data)}."
    )


def _targets(data: Dataset) -> Any:
    if data.targets.scale == "log1p":
        return "log1p values as they are"
    return f"log1p of counts normalised to {data.targets.target_sum:g}"
