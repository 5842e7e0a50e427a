"""The whole pipeline on a simulated Perturb-seq experiment: what `sest demo` runs and `make demo` shows.

Two cell types; in one of them some perturbations are held out. The head sees their features and what they do in the
other cell type, so it can beat both "nothing happens" and "the same as elsewhere".
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sest.config import EmbedConfig, EvaluateConfig, PredictConfig, TrainConfig
from sest.embedding.embed import embed
from sest.evaluation.evaluate import evaluate
from sest.evaluation.results import Evaluation
from sest.outputs import check_output
from sest.prediction.predict import predict
from sest.report.write import Report, write_report
from sest.simulation.screen import write_screen
from sest.simulation.simulation import Simulation
from sest.training.train import TrainResult, train

MADE = (
    "cells.h5ad",
    "features.safetensors",
    "starter.toml",
    "cache.zarr",
    "run",
    "predicted.h5ad",
    "evaluation",
)
DIM = 64  # stored width of the embeddings
SIMULATION = Simulation()
QUICK_SIMULATION = Simulation(
    n_cells_per_perturbation=30, n_controls=80, n_perturbations=12, n_genes=300, expressed_genes=120, umi_per_cell=600
)
TRAINING = TrainConfig(
    max_steps=600,
    batch_size=16,
    set_size=32,
    lr=2e-3,
    hidden=128,
    n_layers=1,
    n_heads=4,
    n_encoder_layers=2,
    n_decoder_layers=2,
    dropout=0.0,  # noise that is gone at prediction would stand for the variation between cells
    val_every=100,
    checkpoint_every=300,
    log_every=25,
    num_workers=2,
)
QUICK_TRAINING = TrainConfig(
    max_steps=20,
    batch_size=4,
    set_size=16,
    hidden=32,
    n_layers=1,
    n_heads=2,
    val_every=10,
    checkpoint_every=10,
    log_every=5,
    num_workers=1,
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    training: TrainResult
    evaluation: Evaluation
    report: Report


def run_demo(
    out: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    force: bool = False,
    on_command: Callable[[str], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> DemoResult:
    """Simulate, embed, train, predict, evaluate and report.

    Args:
        out: a new folder for everything.
        quick: tiny sizes, to see that everything works; its figures mean nothing.
        seed: of the simulation and the training.
        force: delete what an earlier demo left in `out`.
        on_command: is given every step as the command line that does the same.
        on_log: is given every line of metrics.jsonl.

    Raises:
        InputError: `out` exists and is not empty, or holds something else than a demo.
    """
    out = Path(out)
    check_output(out, force=force, made=MADE)
    out.mkdir(parents=True, exist_ok=True)
    for older in out.iterdir():
        if older.is_dir() and not older.is_symlink():
            shutil.rmtree(older)
        else:
            older.unlink()
    tell = on_command or (lambda command: None)
    simulation = replace(QUICK_SIMULATION if quick else SIMULATION, seed=seed)
    cells, features, splits, cache, run, predicted, scores = (out / name for name in MADE)
    tell(_line("simulate", cells, "--features", features, "--splits", splits, *_simulation_options(simulation)))
    write_screen(simulation, cells, features, splits)
    seeded = ("--seed", seed) if seed else ()
    tell(_line("embed", splits, "--encoder", "pca", "--dim", DIM, "--cache", cache, *seeded))
    embed([splits], cache, EmbedConfig(encoder="pca", dim=DIM, seed=seed))
    values = {**(QUICK_TRAINING if quick else TRAINING).to_values(), "seed": seed}
    files = {"perturbations": str(features), "splits": str(splits)}
    tell(_line("train", cache, "--run", run, *_options({**values, **files}, TrainConfig().to_values())))
    training = train(cache, run, TrainConfig(**{**values, **files}), on_log=on_log)
    tell(_line("predict", run, "--out", predicted))
    predict(run, predicted, PredictConfig())
    tell(_line("evaluate", predicted, cells, "--out", scores, "--no-cell-eval"))
    evaluation = evaluate(predicted, cells, EvaluateConfig(cell_eval=False))
    evaluation.write(scores)
    tell(_line("report", run))
    report = write_report(run)
    return DemoResult(training, evaluation, report)


def _simulation_options(simulation: Simulation) -> list[object]:
    here, usual = (
        {key.removesuffix("_per_perturbation"): value for key, value in asdict(s).items()}
        for s in (simulation, SIMULATION)
    )
    return _options(here, usual)


def _options(values: dict[str, Any], defaults: dict[str, Any]) -> list[object]:
    """The options that differ from the defaults."""
    changed = {key: value for key, value in values.items() if value != defaults.get(key)}
    return [part for key, value in changed.items() for part in (f"--{key.replace('_', '-')}", value)]


def _line(*words: object) -> str:
    """A command of sest as a line for a shell."""
    return shlex.join(["sest", *map(str, words)])
