"""What comes before the first step of a training: seconds of the processor and peak memory, imports included.

    python  a process that imports PyTorch and does nothing
    first   `sest train` where nothing is kept beside the cache: values are read, and means of pairs are made
    again   another run of the same cells, which finds what the first one kept

Both with `--data-device disk`, where every run maps one set of files with the values, and with `cpu`, where each reads
them into memory. A process ends where its first step would begin. The cells are those of scale.py; the head has the
size that --preset auto chooses for them.

    OMP_NUM_THREADS=1 python benchmarks/first_step.py --cells 200000               # 20 minutes, 8 GB of disk
    OMP_NUM_THREADS=1 python benchmarks/first_step.py --cells 6000 --genes 2000 --perturbations 60
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from scale import SEST, Size, Stage, measured, write_cells

UP_TO_A_STEP = """
import gc, os, sys
from sest.__main__ import OBJECTS, main
gc.set_threshold(OBJECTS)  # as main does before it imports anything
from sest.training.trainer import Trainer
def step(trainer):
    sys.stdout.flush()
    os._exit(0)
Trainer.step = step
main()
"""
EMBED = Stage(
    "embed", "embed {}/cells.h5ad --encoder pca --dim 512 --cache {}/cells.zarr --cells controls --device cpu"
)
TRAIN = "train {{}}/cells.zarr --perturbations onehot --device cpu --data-device {} --run {{}}/run"


def least(stage: Stage, program: Sequence[str], work: Path, options: argparse.Namespace, repeats: int) -> None:
    """Print the least seconds of some runs, with their peak memory."""
    costs = []
    for _ in range(repeats):
        costs.append(measured(stage, work, options.limit, program))
        shutil.rmtree(work / "run", ignore_errors=True)
    cost = min(costs, key=lambda cost: cost.cpu)
    print(f"{stage.name:12} {cost.shown('cpu'):>8} s {cost.shown('peak'):>8} MB", flush=True)


def make_cache(work: Path, options: argparse.Namespace) -> None:
    work.mkdir(parents=True, exist_ok=True)
    size = Size(options.cells, options.genes, options.perturbations)
    maker = get_context("spawn").Process(target=write_cells, args=(work / "cells.h5ad", size, False, options.on))
    maker.start()  # in a process of its own: see `measured`
    maker.join()
    least(EMBED, SEST, work, options, 1)
    (work / "cells.h5ad").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=30_000)
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--perturbations", type=int, default=1000, help="in each of two cell types")
    parser.add_argument("--on", type=float, default=0.2, help="share of a cell's genes that have counts")
    parser.add_argument("--repeats", type=int, default=3, help="of `python` and `again`, of which the least counts")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a command is ended")
    parser.add_argument("--work", type=Path, help="a folder that keeps the cache for the next time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first_step-") as folder:
        work = options.work or Path(folder) / "work"
        if not (work / "cells.zarr").exists():
            make_cache(work, options)
        least(Stage("python", ""), (sys.executable, "-c", "import torch"), work, options, options.repeats)
        for where in ("disk", "cpu"):
            shutil.rmtree(work / "cells.zarr" / ".derived", ignore_errors=True)
            for when, repeats in (("first", 1), ("again", options.repeats)):
                stage = Stage(f"{when}, {where}", TRAIN.format(where))
                least(stage, (sys.executable, "-c", UP_TO_A_STEP), work, options, repeats)


if __name__ == "__main__":
    main()
