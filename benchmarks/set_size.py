"""Pairs of few cells in sets of 128, and in sets that fit them: what the head is worth for the same work.

Simulated screens with 10 and 40 cells of every perturbation in two cell types, whose features tell what each does; some
of the perturbations are held out, whose cells a trained head predicts and `sest evaluate` scores: an energy distance
between files of cells does not depend on the size of sets. Every run has as many cells a step; a second one with sets
that fit sees the cells as often as that with sets of 128, in fewer steps.

    OMP_NUM_THREADS=1 python benchmarks/set_size.py --seeds 3
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch

import sest
from sest.cells.split_file import TRAIN
from sest.config import TrainConfig
from sest.data.dataset import read_dataset
from sest.data.sampler import SetSampler
from sest.training.prepare import settled

CELLS_A_STEP = 512
METRICS = ("mae", "pearson_delta", "pds", "energy_distance")


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def screen(folder: Path, n_cells: int, seed: int) -> Path:
    """A simulated screen and its cache; returns the cells."""
    folder.mkdir()
    cells = sest.simulate(
        folder / "cells.h5ad",
        features=folder / "features.npz",
        splits=folder / "cells.toml",
        n_perturbations=150,
        n_cells_per_perturbation=n_cells,
        n_controls=400,
        n_genes=1000,
        expressed_genes=400,
        umi_per_cell=3000,
        seed=seed,
    )
    sest.embed(folder / "cells.toml", folder / "cells.zarr", encoder="pca", dim=32, device="cpu")
    return cells


def trained(
    folder: Path, set_size: int, steps: int, seed: int, as_often_as: int = 0
) -> tuple[dict[str, float], int, float]:
    """Scores of a head on the held-out pairs, its steps and the processor's seconds.

    `as_often_as`: only as many steps as see the cells as often as all of them do with sets of that size.
    """
    config = TrainConfig(
        splits=str(folder / "cells.toml"),
        perturbations=str(folder / "features.npz"),
        set_size=set_size,
        hidden=64,
        n_layers=2,
        n_heads=4,
        dropout=0.0,
        lr=1e-3,
        val_every=10**6,
        seed=seed,
        device="cpu",
    )
    data = read_dataset(folder / "cells.zarr", config)
    size = settled(config, data).set_size
    batch = max(CELLS_A_STEP // size, 1)
    if as_often_as:
        n_sets, of_those = (
            SetSampler(data.labels, data.in_split(TRAIN), n, 0).sets_per_epoch for n in (size, as_often_as)
        )
        steps = max(round(steps * (n_sets * size) / (of_those * as_often_as)), 1)
    began = cpu()
    given = {**config.to_values(), "batch_size": batch, "max_steps": steps, "set_size": size}
    run = sest.train(folder / "cells.zarr", folder / f"run-{set_size}-{steps}-{seed}", **given)
    seconds = cpu() - began
    out = folder / f"predicted-{set_size}-{steps}-{seed}.h5ad"
    run.predict(out=out, blend="head")
    found = sest.evaluate(out, folder / "cells.h5ad", cell_eval=False).summary
    scores = {metric: found[metric]["model"] for metric in METRICS} | {"controls": found["mae"]["controls"]}
    return scores, steps, seconds


def main() -> None:
    """Train with sets of both kinds; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| cells a pair | set size | steps | CPU s | {' | '.join(METRICS)} | mae, controls |")
    print("|---" * (5 + len(METRICS)) + "|")
    with tempfile.TemporaryDirectory() as work:
        for n_cells in (10, 40):
            for set_size, as_often_as in ((128, 0), (0, 0), (0, 128)):
                rows = []
                for seed in range(asked.seeds):
                    folder = Path(work) / f"{n_cells}-{seed}"
                    if not folder.exists():
                        screen(folder, n_cells, seed)
                    rows.append(trained(folder, set_size, asked.steps, seed, as_often_as))
                means = {name: np.mean([scores[name] for scores, _, _ in rows]) for name in rows[0][0]}
                errors = {name: np.std([s[name] for s, _, _ in rows]) / max(len(rows) - 1, 1) ** 0.5 for name in means}
                several = len(rows) > 1
                told = [f"{means[m]:.4f}" + (f" ± {errors[m]:.4f}" if several else "") for m in METRICS]
                seconds, steps = np.mean([s for _, _, s in rows]), rows[0][1]
                row = [n_cells, set_size or "auto", steps, f"{seconds:.0f}", *told, f"{means['controls']:.4f}"]
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
