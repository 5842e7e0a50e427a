"""Does a head gain when validation pairs train too? What retraining on all pairs would bring, measured beforehand.

The folds of recipe.py, whose test pairs are never looked at. Half of the validation perturbations validates; the other
half trains, or is held out as well; then the other way round. Prints the differences (trains minus held out), means
over both halves and the seeds with their standard errors:

    OMP_NUM_THREADS=1 python benchmarks/more_pairs.py [--seeds 3] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from real_cells import TRAINING, Fold, data_folder, embedded, folds_of, hardware
from recipe import FOLDS, METRICS, run


def halves(fold: Fold, half: int) -> tuple[Fold, Fold]:
    """The fold with half of its validation perturbations, and the others in training; and held out for the test."""
    trains, held = [], []
    for context, split, names in fold.fewshot:
        if split != "val":
            trains.append((context, split, names))
            held.append((context, split, names))
            continue
        mine, others = names[half::2], names[1 - half :: 2]
        trains.append((context, "val", mine))
        held += [(context, "val", mine), (context, "test", others)]
    merged: dict[tuple[str, str], tuple[str, ...]] = {}
    for context, split, names in held:
        merged[context, split] = merged.get((context, split), ()) + tuple(names)
    return replace(fold, fewshot=tuple(trains)), replace(fold, fewshot=tuple((c, s, n) for (c, s), n in merged.items()))


def main() -> None:
    """Train all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    data = data_folder()
    folds = [fold for fold in folds_of(data) if (fold.kind, fold.name) in FOLDS]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        work = Path(temporary)
        caches = embedded(folds, data, work)
        waiting: dict[str, list[tuple[Future[Any], Future[Any]]]] = {}
        for fold in folds:
            for number in range(2 * asked.seeds):
                arms = []
                for name, arm in zip(("trains", "held"), halves(fold, number % 2), strict=True):
                    folder = work / f"{fold.kind}-{fold.name}-{number}-{name}".replace(" ", "-")
                    config = replace(TRAINING, seed=number // 2)
                    arms.append(pool.submit(run, caches[fold.screen], folder, arm, config, False))
                waiting.setdefault(f"{fold.kind}, {fold.name}", []).append((arms[0], arms[1]))
        print(f"| fold | {' | '.join(METRICS)} |\n{'|---' * (1 + len(METRICS))}|", flush=True)
        for name, pairs in waiting.items():
            found = [(one.result(), other.result()) for one, other in pairs]
            cells = []
            for metric in METRICS:
                differences = [trains[metric] - held[metric] for trains, held in found]
                if any(map(math.isnan, differences)):  # one perturbation has no pds
                    cells.append("-")
                    continue
                error = statistics.stdev(differences) / len(differences) ** 0.5
                mean = statistics.fmean(held[metric] for _, held in found)
                cells.append(f"{mean:.4f} {statistics.fmean(differences):+.4f} ± {error:.4f}")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print("\n" + json.dumps(hardware()))


if __name__ == "__main__":
    main()
