"""The recipe of a training: what other settings change on validation pairs, at the full length of a run.

Folds of real_cells.py, whose test pairs are never looked at. Every variant differs from the first in what its name
says; seeds are paired. `python benchmarks/recipe.py` takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from real_cells import TRAINING, Fold, data_folder, embedded, folds_of, hardware
from torch import Tensor

from sest.config import TrainConfig
from sest.data.dataset import read_dataset
from sest.evaluation.means import training_effects
from sest.facts.run import read_runs
from sest.head.loss import HeadLoss
from sest.training.train import train
from sest.training.trainer import Trainer

Criterion = Callable[[Tensor, Tensor], Tensor]

FOLDS = (("replicate", "rep_1"), ("few-shot", "rep_1"), ("combination", "fold 2"), ("combination", "fold 3"))
VARIANTS: dict[str, dict[str, Any]] = {
    "as in real_cells.py": {},
    "dropout 0.1": {"dropout": 0.1},
    "weight decay 0.05": {"weight_decay": 0.05},
    "sets of 64, half as many": {"set_size": 64, "batch_size": 4},
    "constant rate": {},
    "warm-up, then cosine": {"schedule": "cosine", "warmup": 50},
    "constant rate, average": {"ema": 0.99},
    "twice as wide, two layers": {"hidden": 256, "ffn": 512, "n_layers": 2},
    "no control targets": {"control_targets": False},
    "small loss of the mean": {},
    "genes weighted by effect": {},
}
METRICS = ("energy_distance", "mae", "pearson_delta", "pearson_delta_independent", "pds")
SLOW_END = 0.1  # of the learning rate, in the last 2 / 7 of the steps; not in these:
IN_ONE_GO = ("constant rate", "warm-up, then cosine", "constant rate, average")


MEAN_WEIGHT = 0.1  # of the squared distance of the means; 4 takes the cells' spread away


def of_the_mean(criterion: Criterion, cache: Path, config: TrainConfig) -> Criterion:
    """The loss, and a small one of the distance of the predicted from the real mean."""

    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        return criterion(predicted, target) + MEAN_WEIGHT * (predicted.mean(1) - target.mean(1)).square().sum(-1)

    return loss


def weighted_by_effect(criterion: Criterion, cache: Path, config: TrainConfig) -> Criterion:
    """The loss of cells whose genes are scaled by how much their effects differ in training, as 1 on average."""
    sd = training_effects(read_dataset(cache, config)).delta.std(0)
    scale = 0.5 + 0.5 * sd / sd.mean()
    weight = torch.from_numpy(scale / np.sqrt(np.square(scale).mean())).float()

    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        return criterion(predicted * weight, target * weight)

    return loss


LOSSES = {
    "small loss of the mean": of_the_mean,
    "genes weighted by effect": weighted_by_effect,
}  # of the training alone


def run(
    cache: Path, folder: Path, fold: Fold, config: TrainConfig, in_one_go: bool, variant: str = ""
) -> dict[str, float]:
    """Train once; the metrics of the best validation.

    A loss of `LOSSES` is that of the training steps; validation keeps the usual one.
    """
    if variant in LOSSES:
        splits = folder.with_suffix(".toml")
        splits.write_text(fold.toml())
        data_config = replace(config, splits=str(splits), perturbations=fold.perturbations)
        begun = Trainer.__post_init__

        def with_loss(trainer: Trainer) -> None:
            begun(trainer)
            assert isinstance(trainer.ddp, HeadLoss)  # of one process
            trainer.ddp.criterion = LOSSES[variant](trainer.ddp.criterion, cache, data_config)

        with mock.patch.object(Trainer, "__post_init__", with_loss):
            return run(cache, folder, fold, config, in_one_go)
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    (folder / "starter.toml").write_text(fold.toml())
    steps = int(config.max_steps * 1.4)
    config = replace(config, splits=str(folder / "starter.toml"), perturbations=fold.perturbations)
    if in_one_go:
        train(cache, folder / "run", replace(config, max_steps=steps))
    else:
        train(cache, folder / "run", config)
        train(cache, folder / "run", replace(config, max_steps=steps, lr=config.lr * SLOW_END), resume="auto")
    scores = {score.metric: score.model for score in read_runs([folder / "run"])[0].scores()}
    return {metric: scores.get(metric, math.nan) for metric in METRICS}


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown: of every variant the mean difference to the first over seeds, and its standard error, by fold."""
    base = results[next(iter(VARIANTS))]
    lines = [f"| variant | metric | {' | '.join(base)} |", "|---" * (2 + len(base)) + "|"]
    for name, folds in results.items():
        for metric in METRICS:
            cells = []
            for fold, runs in folds.items():
                values = [r[metric] for r in runs]
                if any(map(math.isnan, values)):  # one perturbation has no pds, few controls no independent halves
                    cells.append("-")
                    continue
                if folds is base:
                    cells.append(f"{statistics.fmean(values):.4f}")
                    continue
                differences = [a - b[metric] for a, b in zip(values, base[fold], strict=True)]
                error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
                cells.append(f"{statistics.fmean(differences):+.4f} ± {error:.4f}")
            lines.append(f"| {name} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train every variant on every fold and seed; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variant", action="append", help="only these, beside the first; may be given several times")
    parser.add_argument("--kind", action="append", help="only folds of these kinds; may be given several times")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    asked = parser.parse_args()
    data = data_folder()
    folds = [fold for fold in folds_of(data) if (fold.kind, fold.name) in FOLDS]
    folds = [fold for fold in folds if not asked.kind or fold.kind in asked.kind]
    first = next(iter(VARIANTS))
    variants = {name: changes for name, changes in VARIANTS.items() if name in (first, *(asked.variant or VARIANTS))}
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        work = Path(temporary)
        caches = embedded(folds, data, work)
        waiting: dict[str, dict[str, list[Any]]] = {}
        for name, changes in variants.items():
            for fold in folds:
                for seed in range(asked.seeds):
                    config = replace(TRAINING, seed=seed, **changes)
                    folder = work / f"{name}-{fold.kind}-{fold.name}-{seed}".replace(" ", "-")
                    found = pool.submit(run, caches[fold.screen], folder, fold, config, name in IN_ONE_GO, name)
                    waiting.setdefault(name, {}).setdefault(f"{fold.kind}, {fold.name}", []).append(found)
        results = {n: {f: [one.result() for one in runs] for f, runs in folds.items()} for n, folds in waiting.items()}
    print(table(results))
    print("\n" + json.dumps(hardware()))
    if asked.out:
        asked.out.write_text(json.dumps({"hardware": hardware(), "results": results}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
