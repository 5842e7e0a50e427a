"""Upstream's models on the folds of real_cells.py, scored by the same metrics.

arc-state's `state` and `pseudobulk` (0.11.1), trained by its own command, `state tx train`, on log1p values of all
genes (embed_key X_hvg), with the splits, the feature vectors, the width, the set size, the batch size, the learning
rate, the dropout and the number of steps of sest's heads; the rest is its default. Test pairs are predicted from sets
of the test context's control cells, as many cells as there are real ones. Its interpreter need not be sest's:

    python benchmarks/peers.py --peers-python .venv-peers/bin/python [--fold replicate] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from real_cells import METRICS, SCREENS, TRAINING, Fold, data_folder, folds_of, hardware

import sest
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.cells.split_file import TEST
from sest.data.dataset import Dataset, read_dataset

MODELS = ("state", "pseudobulk")
SHOWN = ("controls", "context_mean", "perturbation_mean", "kernel", "stack")
STEPS = int(TRAINING.max_steps * 1.4)  # as many as sest's heads take in real_cells.py
CONTROL = {"papalexi": "non-targeting", "perturbench": "control"}
# Run by --peers-python: FOLDER is the run's, INPUTS has basal (n, S, G) and pert (n, P); writes (n, S, G).
PREDICT = """
import contextlib, importlib, io, sys
import numpy as np, torch
folder, model, inputs, out = sys.argv[1:]
names = {"state": ("state_transition", "StateTransitionPerturbationModel"),
         "pseudobulk": ("pseudobulk", "PseudobulkPerturbationModel")}
module, cls = names[model]
kind = getattr(importlib.import_module("state.tx.models." + module), cls)
with contextlib.redirect_stdout(io.StringIO()):
    loaded = kind.load_from_checkpoint(folder + "/checkpoints/final.ckpt", map_location="cpu", weights_only=False)
loaded.eval()
given, found = np.load(inputs), []
with torch.inference_mode():
    for basal, pert in zip(given["basal"], given["pert"]):
        batch = {"ctrl_cell_emb": torch.from_numpy(basal), "pert_emb": torch.from_numpy(pert).expand(len(basal), -1)}
        batch["batch"] = torch.zeros(len(basal), 1)
        found.append(loaded.predict_step(batch, 0, padded=False)["preds"].reshape(len(basal), -1).numpy())
np.save(out, np.stack(found))
"""


def write_inputs(fold: Fold, cells: Path, folder: Path, data: Dataset) -> None:
    """cells.h5ad, fold.toml and features.pt as `state tx train` reads them."""
    folder.mkdir(parents=True)
    whole = ad.read_h5ad(cells)
    column = SCREENS[fold.screen][1]
    values = sp.csr_matrix(whole.X, dtype=np.float32)
    if np.equal(np.mod(values.data, 1), 0).all():
        values = log1p_rows(values, factors_to(data.targets.target_sum, total_counts(values)).astype(np.float32))
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(whole.obs["target_gene"].astype(str)),
            "cell_type": pd.Categorical(whole.obs[column].astype(str)),
            "gem_group": pd.Categorical(["one"] * len(whole)),
        },
        index=whole.obs_names,
    )
    var = pd.DataFrame({"gene_name": list(map(str, whole.var_names)), "highly_variable": True}, index=whole.var_names)
    made = ad.AnnData(values, obs=obs, var=var, obsm={"X_hvg": values.toarray()})
    file = folder / "data" / f"{SCREENS[fold.screen][0]}.h5ad"
    file.parent.mkdir()
    made.write_h5ad(file)
    (folder / "fold.toml").write_text(fold.toml().replace(f'"{file.name}"', json.dumps(str(file.parent))))
    named = zip(data.features.names, data.features.matrix, strict=True)
    features = {name: torch.from_numpy(row.copy()) for name, row in named}
    torch.save(features, folder / "features.pt")


def overrides(fold: Fold, model: str, folder: Path, steps: int, dropout: float | None) -> list[str]:
    """What `state tx train` is told; the backbone as wide and deep as sest's head."""
    width, heads = TRAINING.hidden, TRAINING.n_heads
    backbone = {
        "hidden_size": width,
        "intermediate_size": TRAINING.ffn,
        "num_hidden_layers": TRAINING.n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
    }
    return [
        f"data.kwargs.toml_config_path={folder / 'fold.toml'}",
        f"data.kwargs.perturbation_features_file={folder / 'features.pt'}",
        "data.kwargs.embed_key=X_hvg",
        "data.kwargs.output_space=gene",
        f"data.kwargs.control_pert={CONTROL[fold.screen]}",
        "data.kwargs.num_workers=0",
        f"model={model}",
        f"model.kwargs.cell_set_len={TRAINING.set_size}",
        f"model.kwargs.hidden_dim={width}",
        f"++model.kwargs.dropout={TRAINING.dropout if dropout is None else dropout}",
        f"model.kwargs.n_encoder_layers={TRAINING.n_encoder_layers}",
        f"model.kwargs.n_decoder_layers={TRAINING.n_decoder_layers}",
        *(f"model.kwargs.transformer_backbone_kwargs.{key}={value}" for key, value in backbone.items()),
        f"training.batch_size={TRAINING.batch_size}",
        f"training.lr={TRAINING.lr}",
        f"training.max_steps={steps}",
        "training.val_freq=1000000",
        "++training.use_mfu=false",
        "use_wandb=false",
        f"output_dir={folder}",
        f"name={model}",
    ]


def sets_of_test(data: Dataset, set_size: int, seed: int) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Of every test pair the sets of control cells to predict from, (n, S, G) log1p, and its features, (n, P)."""
    labels, mask, rng = data.labels, data.in_split(TEST), np.random.default_rng(seed)
    perturbed = np.flatnonzero(mask & ~labels.is_control)
    pairs = pd.DataFrame({"context": labels.context[perturbed], "perturbation": labels.perturbation[perturbed]})
    rows, basal, vectors = [], [], []
    for (context, perturbation), cells in pairs.groupby(["context", "perturbation"]):
        controls = np.flatnonzero(mask & labels.is_control & (labels.context == context))
        for start in range(0, len(cells), set_size):
            chosen = rng.choice(controls, set_size, replace=len(controls) < set_size)
            basal.append(data.targets.log1p(np.sort(chosen)).toarray())
            vectors.append(data.features.matrix[perturbation])
            kind, name = labels.contexts[context][1], labels.perturbations[perturbation]
            rows.append((kind, name, min(set_size, len(cells) - start)))
    table = pd.DataFrame(rows, columns=["cell_type", "target_gene", "n_cells"])
    return table, np.stack(basal), np.stack(vectors)


def write_prediction(out: Path, table: pd.DataFrame, predicted: np.ndarray, data: Dataset, control: str) -> None:
    """Predicted cells and the real controls of their contexts, as `sest evaluate` reads them."""
    labels, mask = data.labels, data.in_split(TEST)
    values = [cells[:n] for cells, n in zip(predicted, table["n_cells"], strict=True)]
    names = table.loc[table.index.repeat(table["n_cells"]), ["cell_type", "target_gene"]]
    kinds = np.array([cell_type for _, cell_type in labels.contexts])
    rows = np.flatnonzero(mask & labels.is_control & np.isin(kinds[labels.context], table["cell_type"]))
    controls = pd.DataFrame({"cell_type": kinds[labels.context[rows]], "target_gene": control})
    obs = pd.concat([names, controls], ignore_index=True).astype("category")
    obs.index = obs.index.astype(str)
    x = sp.vstack([sp.csr_matrix(np.concatenate(values).clip(0, 14)), data.targets.log1p(rows)], format="csr")
    ad.AnnData(x, obs=obs, var=pd.DataFrame(index=list(data.targets.genes))).write_h5ad(out)


def run_one(
    python: str, fold: Fold, model: str, cells: Path, folder: Path, data: Dataset, steps: int, dropout: float | None
) -> dict[str, Any]:
    """Train, predict and score one model on one fold."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1", "WANDB_MODE": "disabled"}
    log, began = folder / f"{model}.log", time.perf_counter()
    command = [python, "-m", "state", "tx", "train", *overrides(fold, model, folder, steps, dropout)]
    with open(log, "w") as file:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        return {"error": log.read_text().strip().splitlines()[-1], "model": model}
    seconds = time.perf_counter() - began
    table, basal, pert = sets_of_test(data, TRAINING.set_size, seed=0)
    np.savez(folder / "inputs.npz", allow_pickle=False, basal=basal, pert=pert)
    asked = [folder / model, model, folder / "inputs.npz", folder / f"{model}.npy"]
    words = [python, "-c", PREDICT, *map(str, asked)]
    told = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if told.returncode:
        return {"error": told.stderr.strip().splitlines()[-1], "model": model}
    out = folder / f"{model}.h5ad"
    write_prediction(out, table, np.load(folder / f"{model}.npy"), data, CONTROL[fold.screen])
    summary = sest.evaluate(out, cells, cell_type_col=SCREENS[fold.screen][1], cell_eval=False).summary
    return {"model": model, "seconds": seconds, "scores": {m: summary[m]["model"] for m in METRICS}, "n": len(table)}


def of_fold(
    python: str, fold: Fold, cells: Path, cache: Path, folder: Path, steps: int, dropout: float | None
) -> dict[str, Any]:
    """All models on one fold, and sest's baselines beside them."""
    torch.set_num_threads(1)
    splits = folder.with_suffix(".toml")
    splits.write_text(fold.toml())
    config = replace(TRAINING, splits=str(splits), perturbations=fold.perturbations, head="none", max_steps=1)
    data = read_dataset(cache, config)
    write_inputs(fold, cells, folder, data)
    run = folder / "stack"
    sest.train(cache, run, **config.to_values())
    sest.open_run(run).predict(out=folder / "stack.h5ad")
    summary = sest.evaluate(
        folder / "stack.h5ad", cells, cell_type_col=SCREENS[fold.screen][1], cell_eval=False
    ).summary
    found = [run_one(python, fold, model, cells, folder, data, steps, dropout) for model in MODELS]
    baselines = {name: {m: summary[m][name] for m in METRICS} for name in SHOWN}
    return {"kind": fold.kind, "fold": fold.name, "models": found, "baselines": baselines}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a predictor, and the seconds that upstream's training took."""
    lines = [f"| fold | predictor | {' | '.join(METRICS)} | s |", "|---" * (3 + len(METRICS)) + "|"]
    for result in results:
        name = f"{result['kind']}, {result['fold']}"
        rows = [(n, scores, "") for n, scores in result["baselines"].items()]
        for found in result["models"]:
            if "error" in found:
                lines.append(f"| {name} | {found['model']} | {found['error']} |{' |' * len(METRICS)}")
            else:
                rows.append((f"arc-state {found['model']}", found["scores"], f"{found['seconds']:.0f}"))
        for predictor, scores, seconds in rows:
            values = " | ".join(f"{scores[m]:.4f}" for m in METRICS)
            lines.append(f"| {name} | {predictor.replace('_', ' ')} | {values} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    """Run upstream on the folds; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="an interpreter with arc-state 0.11.1")
    parser.add_argument("--fold", action="append", help="only folds of these kinds; may be given several times")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--dropout", type=float, help=f"default: that of sest's heads, {TRAINING.dropout}; its own: 0.1"
    )
    parser.add_argument("--small", action="store_true", help="20 steps")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--work", type=Path, help="folder for all that is made; default: a temporary one")
    asked = parser.parse_args()
    data = data_folder()
    folds = [fold for fold in folds_of(data) if not asked.fold or fold.kind in asked.fold]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        work = (asked.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        waiting = []
        for screen in dict.fromkeys(fold.screen for fold in folds):
            file, column = SCREENS[screen]
            options: dict[str, Any] = {"pert_col": "target_gene", "cell_type_col": column, "encoder": "pca", "dim": 8}
            sest.embed(data / f"{file}.h5ad", work / f"{screen}.zarr", **options)
        for fold in folds:
            cells = data / f"{SCREENS[fold.screen][0]}.h5ad"
            folder = work / f"{fold.kind}-{fold.name}".replace(" ", "-")
            given = (fold, cells, work / f"{fold.screen}.zarr", folder, 20 if asked.small else STEPS, asked.dropout)
            waiting.append(pool.submit(of_fold, asked.peers_python, *given))
        results = [one.result() for one in waiting]
    print(table(results))
    print("\n" + json.dumps(hardware()))
    if asked.out:
        asked.out.write_text(json.dumps({"hardware": hardware(), "results": results}, indent=1, sort_keys=True) + "\n")
    sys.exit(any("error" in found for result in results for found in result["models"]))


if __name__ == "__main__":
    main()
