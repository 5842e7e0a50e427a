"""What many held-out pairs cost: seconds of the processor and peak memory, each command in a process of its own.

    train      one step of a small head, its validation, and the weights of the blend
    head none  `sest train --head none`, the baselines alone
    report     `sest report` of the first run: predictors, scores and pictures of all held-out pairs

The cells are those of scale.py, a fifth of the genes in each. Of 1,000 perturbations in two cell types 910 are held out
in one of them. Weights of the blend are set by hand, so that the head and the head held against itself count in every
effect: after one step they would be zero, and nothing would be predicted with them.

    OMP_NUM_THREADS=1 python benchmarks/held_out_pairs.py                # 4 minutes
    OMP_NUM_THREADS=1 python benchmarks/held_out_pairs.py --cells 6000 --perturbations 60 --genes 2000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from scale import CELL_TYPES, Size, Stage, measured, write_cells

BY_HAND = """
from unittest import mock
from sest.blend import blend
from sest.blend.weights import Weights
def by_hand(parts, observed, *rest):
    means = {"stack": 0.4, "head": 0.3, "anchored": 0.2}
    return Weights({name: means[name] for name in parts}, dict.fromkeys(parts, 0.0), len(observed))
with mock.patch.object(blend, "fit_weights", by_hand):
    from sest.__main__ import main
    main()
"""
TRAIN = "train {}/cells.zarr --perturbations onehot --val-fraction 0.91 --device cpu"
STAGES = (
    Stage("embed", "embed {}/cells.h5ad --encoder pca --dim 16 --cache {}/cells.zarr --device cpu"),
    Stage("train", f"{TRAIN} --run {{}}/run --max-steps 1 --batch-size 2 --hidden 32 --n-layers 1 --n-heads 2"),
    Stage("head none", f"{TRAIN} --run {{}}/none --head none"),
    Stage("report", "report {}/run --out {}/report.html --device cpu"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--perturbations", type=int, default=1000, help=f"in each of {len(CELL_TYPES)} cell types")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds after which a command is ended")
    parser.add_argument("--work", type=Path, help="where all files are made, 2 GB; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="held_out_pairs-", dir=options.work) as folder:
        work = Path(folder) / "work"
        work.mkdir()
        size = Size(options.cells, options.genes, options.perturbations)
        write_cells(work / "cells.h5ad", size, predicted=False)
        for stage in STAGES:
            cost = measured(stage, work, options.limit, (sys.executable, "-c", BY_HAND))
            print(f"{stage.name:10} {cost.shown('cpu'):>8} s {cost.shown('peak'):>8} MB", flush=True)


if __name__ == "__main__":
    main()
