"""Features of measured genes: do their loadings (`genes`) predict what trained worse than columns (`onehot`) do?

The papalexi cells of controls and of the targets that are measured genes, a replicate held out whole, the heads of
real_cells.py: what `--perturbations auto` decides about. Prints a row a replicate and source, means over the seeds:

    OMP_NUM_THREADS=1 python benchmarks/features.py [--seeds 2] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from real_cells import DIM, SCREENS, TRAINING, Fold, data_folder, hardware, train_one

import sest
from sest.config import PredictConfig
from sest.prediction.predict import predict

SOURCES = ("onehot", "genes", "genes+onehot")
REPLICATES = ("rep_1", "rep_2", "rep_3")
METRICS = ("mae", "pearson_delta", "pds", "energy_distance")
CONTROL, N_VALIDATED = "non-targeting", 3


def measured_cells(folder: Path) -> list[str]:
    """Write the cells into `folder` and embed them; returns their targets."""
    whole = ad.read_h5ad(data_folder() / f"{SCREENS['papalexi'][0]}.h5ad")
    labels = whole.obs["target_gene"].astype(str)
    whole[labels.isin([*whole.var_names, CONTROL])].copy().write_h5ad(folder / "measured.h5ad")
    options: dict[str, Any] = {
        "pert_col": "target_gene",
        "cell_type_col": SCREENS["papalexi"][1],
        "encoder": "pca",
        "dim": DIM,
    }
    sest.embed(folder / "measured.h5ad", folder / "measured.zarr", **options)
    return sorted(set(labels) & set(whole.var_names))


def scores_of(work: Path, fold: Fold, seed: int) -> dict[str, list[float]]:
    """Train one head; the metrics of head, blend and stack."""
    torch.set_num_threads(1)
    folder, cells = work / f"{fold.name}-{fold.perturbations}-{seed}", work / "measured.h5ad"
    folder.mkdir()
    (folder / "starter.toml").write_text(fold.toml().replace(SCREENS["papalexi"][0], cells.stem))
    train_one(work / "measured.zarr", folder, fold, replace(TRAINING, seed=seed))
    found = {}
    for name, blend in (("head", "head"), ("blend", "auto")):
        predict(folder / "runs" / f"seed-{seed}", folder / f"{name}.h5ad", PredictConfig(blend=blend))
        summary = sest.evaluate(folder / f"{name}.h5ad", cells, cell_eval=False).summary
        found[name] = [summary[metric]["model"] for metric in METRICS]
    return found | {"stack": [summary[metric]["stack"] for metric in METRICS]}


def main() -> None:
    """Run all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        work = Path(temporary)
        targets = measured_cells(work)
        waiting = {}
        for i, held_out in enumerate(REPLICATES):
            validated = (REPLICATES[(i + 1) % 3], "val", tuple(targets[i :: len(targets) // N_VALIDATED]))
            for source in SOURCES:
                fold = Fold("replicate", held_out, "papalexi", held_out, (validated,), source)
                waiting[held_out, source] = [pool.submit(scores_of, work, fold, s) for s in range(asked.seeds)]
        print(f"{len(targets)} targets: {', '.join(targets)}\n")
        print(f"| held out | features | predictor | {' | '.join(METRICS)} |\n{'|---' * (3 + len(METRICS))}|")
        for (held_out, source), runs in waiting.items():
            results = [run.result() for run in runs]
            for predictor in results[0]:
                means = np.mean([result[predictor] for result in results], axis=0)
                values = " | ".join(f"{mean:.4f}" for mean in means)
                print(f"| {held_out} | {source} | {predictor} | {values} |", flush=True)
    print("\n" + json.dumps(hardware()))


if __name__ == "__main__":
    main()
