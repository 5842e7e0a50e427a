"""Real cells: does the head predict held-out cells of two public screens better than what needs no network?

Embed, train, predict and evaluate, through the functions behind the commands. Two screens (../shared/data, or the
folder in SEST_DATA; files are read where they are, all that is made goes to --work):

    perturbench   three cell types train; the nine perturbations of the fourth (A172) are held out, [zeroshot]
    papalexi      the replicates stand for cell types; in one of them three knock-outs are held out, [fewshot]

Two encoders: `pca`, and a small State Embedding folder of random weights, which is a control and nothing else.
Run `python benchmarks/real_cells.py` (--small: one seed, few steps). Shapes: B sets, S cells a set, G genes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from safetensors.torch import save_file

import sest
from sest.cells.split_file import TEST
from sest.config import PredictConfig, TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.data.resident import resident_cells
from sest.data.sampler import SetRows, SetSampler
from sest.evaluation.baselines import predict_baselines
from sest.evaluation.means import split_pairs, training_means
from sest.evaluation.pairs import some_sets
from sest.prediction.predict import predict
from sest.training.train import train

PCA, RANDOM_SE = "pca", "random-se"
DIM = 256  # width of the embeddings, of either encoder
NARROW_DIM = 64  # of a PCA that leaves much of a cell out
VARIANTS = ((PCA, DIM, (0.0, 0.1)), (PCA, NARROW_DIM, (0.0, 0.1)), (RANDOM_SE, DIM, (0.0,)))  # and their dropouts
SMALL_VARIANTS = ((PCA, DIM, (0.0,)), (RANDOM_SE, DIM, (0.0,)))
SHOWN = ("train_seconds", "train_loss", "val_loss", "test_loss", "spread")
METRICS = ("test_loss", "pearson_delta", "mae", "pds")
SETTLED_STEPS, SETTLING_LR = 1.4, 0.1  # every run goes on to 1.4 x max_steps at a tenth of the learning rate
TRAINING = TrainConfig(
    max_steps=1500,
    batch_size=8,
    set_size=32,
    lr=1e-3,
    control_targets=True,  # else nothing says what cells of a held-out cell type look like
    hidden=128,
    n_layers=1,
    n_heads=4,
    ffn=256,
    n_encoder_layers=2,
    n_decoder_layers=2,
    dropout=0.0,
    val_every=100,
    checkpoint_every=100_000,
    log_every=100,
    num_workers=0,
)


@dataclass(frozen=True)
class Screen:
    """A file of cells and what is held out of it."""

    name: str
    file: str
    cell_type_col: str
    splits: str  # a starter.toml


SCREENS = (
    Screen(
        "perturbench",
        "perturbench_devel.h5ad",
        "cell_type",
        """
[datasets]
perturbench_devel = "perturbench_devel.h5ad"
[training]
perturbench_devel = "train"
[zeroshot]
"perturbench_devel.A172" = "test"
[fewshot."perturbench_devel.T98G"]
val = ["MAP2K3", "MAPK1", "TGFBR2"]
""",
    ),
    Screen(
        "papalexi",
        "papalexi_eccite.h5ad",
        "batch",
        """
[datasets]
papalexi_eccite = "papalexi_eccite.h5ad"
[training]
papalexi_eccite = "train"
[fewshot."papalexi_eccite.rep_1"]
test = ["STAT1", "JAK2", "IFNGR1"]
[fewshot."papalexi_eccite.rep_2"]
val = ["IFNGR2", "STAT2", "IRF1"]
""",
    ),
)


def data_folder() -> Path:
    """Where the screens lie: SEST_DATA, or ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SEST_DATA", beside))
    missing = [screen.file for screen in SCREENS if not (folder / screen.file).exists()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}. Set SEST_DATA to the folder that has them.")
    return folder


def write_random_se(folder: Path, genes: Sequence[str], seed: int = 0) -> Path:
    """Write a State Embedding folder of random weights: 2 layers, width 128, 4 heads, 256 slots, DIM outputs."""
    width, token_dim, hidden, bins, n_layers = 128, 64, 256, 10, 2
    linear = {  # name -> (rows, columns), the state_dict of sest.se.weights
        "encoder.0": (width, token_dim),
        "count_encoder.0": (64, 1),
        "count_encoder.2": (bins, 64),
        "decoder.0.intermediate_dense": (hidden, width),
        "decoder.0.dense": (width, hidden),
        "decoder.1": (DIM, width),
        "dataset_embedder": (10, DIM),
    }
    norms = ["encoder.1", "decoder.0.layer_norm"]
    for layer in (f"transformer_encoder.layers.{i}" for i in range(n_layers)):
        linear |= {f"{layer}.qkv_proj": (3 * width, width), f"{layer}.out_proj": (width, width)}
        linear |= {f"{layer}.linear1": (hidden, width), f"{layer}.linear2": (width, hidden)}
        norms += [f"{layer}.norm1", f"{layer}.norm2"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {name: normal(1, token_dim) for name in ("cls_token", "dataset_token")}
    tensors["bin_encoder.weight"] = normal(bins, width)
    for name, (rows, columns) in linear.items():  # activations stay near 1
        tensors |= {f"{name}.weight": normal(rows, columns) / columns**0.5, f"{name}.bias": 0.1 * normal(rows)}
    for name in norms:
        tensors |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    torch.save(dict(zip(genes, normal(len(genes), token_dim), strict=True)), folder / "protein_embeddings.pt")
    (folder / "config.yaml").write_text("model:\n  nhead: 4\ndataset:\n  pad_length: 256\n  cls_token_idx: 3\n")
    return folder


def embed_screen(screen: Screen, cells: Path, encoder: str, dim: int, work: Path) -> Path:
    """Embed what training reads; returns the cache. Of the random encoder only controls are needed, so only they."""
    cache = work / f"{screen.name}-{encoder}-{dim}.zarr"
    which: dict[str, Any] = {"encoder": PCA, "dim": dim}
    if encoder == RANDOM_SE:
        genes = anndata.read_h5ad(cells, backed="r").var_names.tolist()
        folder = write_random_se(work / f"{screen.name}-se", genes)
        which = {"encoder": folder, "dim": "native" if dim == DIM else dim, "cells": "controls"}
    sest.embed(cells, cache, pert_col="target_gene", cell_type_col=screen.cell_type_col, **which)
    return cache


def other_cells(sampler: SetSampler, sets: SetRows, data: Dataset, seed: int) -> np.ndarray:
    """Real cells of each set's context and perturbation that are not in the set: (sets, S) rows.

    Where fewer than S are left they are drawn with replacement. Two such sets differ by chance alone.
    """
    pairs = zip(sampler.context.tolist(), sampler.perturbation.tolist(), strict=True)
    cells = dict(zip(pairs, sampler.cells, strict=True))
    rows = []
    for number, (targets, perturbation) in enumerate(zip(sets["targets"], sets["perturbation"], strict=True)):
        mine = cells[int(data.labels.context[targets[0]]), int(perturbation)]
        left = np.setdiff1d(mine, targets)
        left = left if len(left) else mine
        size = len(targets)
        rows.append(np.random.default_rng([seed, number]).choice(left, size, replace=len(left) < size))
    return np.stack(rows)


def mean_distance(cells: torch.Tensor) -> float:
    """Mean Euclidean distance of the different cells of one set, (1, S, G)."""
    return float(torch.pdist(cells[0]).mean())


def test_losses(run: Path, data: Dataset, config: TrainConfig) -> tuple[dict[str, float], float]:
    """Mean energy distance of the test sets, of best/ and of cells that need no network. Every test cell is used.

    `controls`: the control cells the model was given. `perturbation_mean`: the same cells moved by the perturbation's
    mean effect in training, clipped at 0. `other_cells`: real cells of the same perturbation, what chance alone costs.
    Also returns the spread: how far predicted cells of a set lie apart, in units of how far the real ones do.
    """
    device = torch.device("cpu")
    resident = resident_cells(data.targets, data.embeddings, data.embedding_row, device)
    sampler = SetSampler(data.labels, data.in_split(TEST), config.set_size, config.seed)
    sets = sampler.fixed_sets()
    others = other_cells(sampler, sets, data, config.seed)
    pairs = split_pairs(data, TEST)
    names = [data.labels.perturbations[p] for p in pairs.perturbation]
    means = predict_baselines(training_means(data), names, pairs.control)["perturbation_mean"]  # (K, G)
    pair_of = {key: k for k, key in enumerate(zip(pairs.context.tolist(), pairs.perturbation.tolist(), strict=True))}
    model = sest.load_model(run)
    totals = dict.fromkeys(("model", "controls", "perturbation_mean", "other_cells"), 0.0)
    spread = 0.0
    n_sets = len(sets["perturbation"])
    with torch.inference_mode():
        for i in range(n_sets):
            one = slice(i, i + 1)
            part = some_sets(sets, one)
            batch = resident.batch(part)
            vectors = torch.from_numpy(data.features.matrix[part["perturbation"]])  # (1, P)
            controls = resident.expression(part["controls"])  # (1, S, G)
            pair = pair_of[int(data.labels.context[part["targets"][0, 0]]), int(part["perturbation"][0])]
            predicted = {
                "model": model(batch["basal"], vectors),
                "controls": controls,
                "other_cells": resident.expression(others[one]),
            }
            shift = torch.from_numpy(means[pair] - pairs.control[pair]).float()  # (G,)
            predicted["perturbation_mean"] = (controls + shift).clamp_min(0)
            for name, cells in predicted.items():
                totals[name] += float(sest.energy_distance(cells, batch["target"]).sum())
            spread += mean_distance(predicted["model"]) / mean_distance(batch["target"])
    return {name: total / n_sets for name, total in totals.items()}, spread / n_sets


def measure(screen: Screen, cells: Path, cache: Path, config: TrainConfig, work: Path) -> dict[str, Any]:
    """Train, predict and evaluate once; returns every figure of the run."""
    work.mkdir(parents=True)
    splits, run, predicted = work / "starter.toml", work / "run", work / "predicted.h5ad"
    splits.write_text(screen.splits)
    config = replace(config, splits=str(splits))
    lines: list[dict[str, Any]] = []
    started = time.perf_counter()
    train(cache, run, config, on_log=lines.append)
    config = replace(config, lr=config.lr * SETTLING_LR, max_steps=int(config.max_steps * SETTLED_STEPS))
    result = train(cache, run, config, resume="auto", on_log=lines.append)
    seconds = time.perf_counter() - started
    predict(run, predicted, PredictConfig())
    scores = sest.evaluate(predicted, cells, cell_eval=False).summary
    validations = {line["step"]: line for line in lines if "val_loss" in line}
    best = validations[result.best_step]
    losses, spread = test_losses(run, read_dataset(cache, config), config)
    losses["context_mean"] = losses["controls"]  # the name `evaluate` has for the same baseline
    return {
        "seed": config.seed,
        "train_seconds": seconds,
        "trainable_parameters": result.n_parameters,
        "best_step": result.best_step,
        "train_loss": next(line["loss"] for line in reversed(lines) if "loss" in line),
        "val_loss": {
            "model": best["val_loss"],
            "context_mean": best["val_loss_controls"],
            "perturbation_mean": best["val_loss_perturbation_mean"],
        },
        "test_loss": losses,
        "spread": spread,
        **{metric: scores[metric] for metric in METRICS if metric in scores},
    }


def over_seeds(runs: list[dict[str, Any]], metric: str, predictor: str) -> str:
    """Mean over the runs, and the sample standard deviation where there are several."""
    values = [run[metric][predictor] for run in runs]
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: one table a screen of the test split, then what dropout and a narrow embedding do."""
    text = []
    for screen in dict.fromkeys(r["screen"] for r in results):
        mine = [r for r in results if r["screen"] == screen and r["dropout"] == 0 and r["dim"] == DIM]
        text += [f"\n{screen}, test split", "", f"| predictor | {' | '.join(METRICS)} |", "|---" * 5 + "|"]
        rows = [(f"model, {r['encoder']}", r["runs"], "model") for r in mine]
        reference = rows[0][1]
        rows += [(f"{name} (no network)", reference, name) for name in ("context_mean", "perturbation_mean")]
        for label, runs, predictor in rows:
            text.append(f"| {label} | {' | '.join(over_seeds(runs, m, predictor) for m in METRICS)} |")
        chance = over_seeds(reference, "test_loss", "other_cells")
        text.append(f"| other real cells of the same perturbation | {chance} | | | |")
    text += ["\nDropout and width, pca, seed 0; controls: the val_loss and test_loss of predicting controls", ""]
    text += ["| screen | dim | dropout | train_loss | val_loss | controls | test_loss | controls | spread |"]
    text += ["|---" * 9 + "|"]
    for r in results:
        if r["encoder"] == PCA:
            run = r["runs"][0]
            values = [run["train_loss"]]
            values += [run[m][who] for m in ("val_loss", "test_loss") for who in ("model", "context_mean")]
            figures = " | ".join(f"{value:.3f}" for value in [*values, run["spread"]])
            text.append(f"| {r['screen']} | {r['dim']} | {r['dropout']:g} | {figures} |")
    return "\n".join(text)


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    packages = {name: version(name) for name in ("torch", "numpy", "anndata", "zarr")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "sest": sest.__version__,
        **packages,
    }


def main() -> None:
    """Run every screen and encoder, print the tables, write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="one seed, 500 + 200 steps, no dropout: about 2 minutes")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every training (3)")
    parser.add_argument("--screen", choices=[screen.name for screen in SCREENS], help="only this one")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--work", type=Path, help="new folder for caches and runs; default: a temporary one")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the steps are small; two threads on busy cores wait for each other
    n_seeds, training = (1, replace(TRAINING, max_steps=500)) if asked.small else (asked.seeds, TRAINING)
    data = data_folder()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for screen in (screen for screen in SCREENS if asked.screen in (None, screen.name)):
            cells = data / screen.file
            for encoder, dim, dropouts in SMALL_VARIANTS if asked.small else VARIANTS:
                cache = embed_screen(screen, cells, encoder, dim, work)
                for dropout in dropouts:
                    runs = []
                    for seed in range(n_seeds if dim == DIM and dropout == 0 else 1):
                        config = replace(training, dropout=dropout, seed=seed)
                        folder = work / f"{cache.stem}-dropout{dropout:g}-seed{seed}"
                        runs.append(measure(screen, cells, cache, config, folder))
                        shown = {key: runs[-1][key] for key in SHOWN}
                        print(folder.name, json.dumps(shown), flush=True)
                    about = {"screen": screen.name, "encoder": encoder, "dim": dim, "dropout": dropout}
                    results.append({**about, "runs": runs})
    print(tables(results))
    record = {"hardware": hardware(), "training": training.to_values(), "results": results}
    print("\n" + json.dumps(record["hardware"]))
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
