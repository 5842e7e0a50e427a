"""Models of others on the folds of real_cells.py, scored by the same metrics.

arc-state's `state` and `pseudobulk` (0.11.1), trained by its own command, `state tx train`, on log1p values of all
genes (embed_key X_hvg), with the splits, the feature vectors, the width, the set size, the batch size, the learning
rate, the dropout and the number of steps of sest's heads; the rest is its default. cell-gears (0.1.2; combinations
alone) and cellflow-tools (0.0.6) as peer_gears.py and peer_cellflow.py say. Test pairs are predicted from sets of the
test context's control cells, as many cells as there are real ones. Each interpreter runs the models whose package it
has; none need be sest's:

    python benchmarks/peers.py --peers-python .venv-peers/bin/python [--peers-python ...] [--fold replicate] [--small]
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
from real_cells import METRICS, SCREENS, TRAINING, Fold, data_folder, embedded, folds_of, hardware

import sest
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.cells.split_file import SPLIT_NAMES, TEST, TRAIN, VAL
from sest.data.dataset import Dataset, read_dataset

PACKAGES = {"state": "arc-state", "pseudobulk": "arc-state", "gears": "cell-gears", "cellflow": "cellflow-tools"}
OF_KIND = {"gears": "combination"}  # models for folds of one kind alone
HERE = Path(__file__).resolve().parent
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
    """data/, fold.toml and features.pt as `state tx train` reads them; vectors.npz with those of single targets."""
    folder.mkdir(parents=True)
    whole = ad.read_h5ad(cells)
    column = SCREENS[fold.screen][1]
    values = sp.csr_matrix(whole.X, dtype=np.float32)
    if np.equal(np.mod(values.data, 1), 0).all():
        values = log1p_rows(values, factors_to(data.targets.target_sum, total_counts(values)).astype(np.float32))
    split = np.full(len(whole), "none", object)
    for bit in (TEST, VAL, TRAIN):  # controls are of several
        split[data.in_split(bit)] = SPLIT_NAMES[bit]
    obs = pd.DataFrame(
        {
            "gene": pd.Categorical(whole.obs["target_gene"].astype(str)),
            "cell_type": pd.Categorical(whole.obs[column].astype(str)),
            "gem_group": pd.Categorical(["one"] * len(whole)),
            "split": pd.Categorical(split),
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
    targets = sorted({target for name in data.features.names[1:] for target in name.split("+")})
    found = [data.features.vectors.find(target) for target in targets]
    vectors = np.stack([np.zeros(data.features.width, np.float32) if v is None else v for v in found])
    np.savez(folder / "vectors.npz", allow_pickle=False, names=np.array(targets), vectors=vectors)


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
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    table, basal, pert = sets_of_test(data, TRAINING.set_size, seed=0)
    names = {key: table[column].to_numpy(str) for key, column in (("name", "target_gene"), ("cell_type", "cell_type"))}
    np.savez(folder / "inputs.npz", allow_pickle=False, basal=basal, pert=pert, **names)
    asked: list[str | Path] = [folder / model, model, folder / "inputs.npz", folder / f"{model}.npy"]
    commands: list[list[str | Path]] = [[HERE / f"peer_{model}.py", folder, folder / f"{model}.npy"]]
    if PACKAGES[model] == "arc-state":
        train: list[str | Path] = ["-m", "state", "tx", "train", *overrides(fold, model, folder, steps, dropout)]
        commands = [train, ["-c", PREDICT, *asked]]
    seconds: list[float] = []
    for command in commands:
        log, began = folder / f"{model}-{len(seconds)}.log", time.perf_counter()
        with open(log, "w") as file:
            words = [python, *map(str, command)]
            done = subprocess.run(
                words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            return {"error": log.read_text().strip().splitlines()[-1], "model": model}
        seconds.append(time.perf_counter() - began)
    out = folder / f"{model}.h5ad"
    write_prediction(out, table, np.load(folder / f"{model}.npy"), data, CONTROL[fold.screen])
    summary = sest.evaluate(out, cells, cell_type_col=SCREENS[fold.screen][1], cell_eval=False).summary
    return {"model": model, "seconds": seconds[0], "scores": {m: summary[m]["model"] for m in METRICS}, "n": len(table)}


def models_of(pythons: list[str]) -> dict[str, str]:
    """The interpreter of every model whose package one has."""
    found: dict[str, str] = {}
    for python in pythons:
        code = "import importlib.metadata as m; print(*(d.metadata['Name'].lower() for d in m.distributions()))"
        there = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        found |= {model: python for model, package in PACKAGES.items() if package in there}
    if not found:
        sys.exit(f"No interpreter of --peers-python has one of: {', '.join(sorted(set(PACKAGES.values())))}.")
    return found


def of_fold(
    pythons: dict[str, str], fold: Fold, cells: Path, cache: Path, folder: Path, steps: int, dropout: float | None
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
    found = [
        run_one(python, fold, model, cells, folder, data, steps, dropout)
        for model, python in pythons.items()
        if OF_KIND.get(model, fold.kind) == fold.kind
    ]
    baselines = {name: {m: summary[m][name] for m in METRICS} for name in SHOWN}
    return {"kind": fold.kind, "fold": fold.name, "models": found, "baselines": baselines}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a predictor, and the seconds that a training took (gears, cellflow: with predicting)."""
    lines = [f"| fold | predictor | {' | '.join(METRICS)} | s |", "|---" * (3 + len(METRICS)) + "|"]
    for result in results:
        name = f"{result['kind']}, {result['fold']}"
        rows = [(n, scores, "") for n, scores in result["baselines"].items()]
        for found in result["models"]:
            if "error" in found:
                lines.append(f"| {name} | {found['model']} | {found['error']} |{' |' * len(METRICS)}")
            else:
                name_of_model = f"{PACKAGES[found['model']]} {found['model']}"
                rows.append((name_of_model, found["scores"], f"{found['seconds']:.0f}"))
        for predictor, scores, seconds in rows:
            values = " | ".join(f"{scores[m]:.4f}" for m in METRICS)
            lines.append(f"| {name} | {predictor.replace('_', ' ')} | {values} | {seconds} |")
    return "\n".join(lines)


def main() -> None:
    """Run the models on the folds; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, action="append", help="an interpreter with a package")
    parser.add_argument("--fold", action="append", help="only folds of these kinds; may be given several times")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--dropout", type=float, help=f"default: that of sest's heads, {TRAINING.dropout}; its own: 0.1"
    )
    parser.add_argument("--small", action="store_true", help="20 steps of arc-state's models")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--work", type=Path, help="folder for all that is made; default: a temporary one")
    asked = parser.parse_args()
    data, pythons = data_folder(), models_of(asked.peers_python)
    folds = [fold for fold in folds_of(data) if not asked.fold or fold.kind in asked.fold]
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(asked.workers, get_context("spawn")) as pool:
        work = (asked.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        waiting = []
        caches = embedded(folds, data, work, dim=8)
        for fold in folds:
            cells = data / f"{SCREENS[fold.screen][0]}.h5ad"
            folder = work / f"{fold.kind}-{fold.name}".replace(" ", "-")
            given = (fold, cells, caches[fold.screen], folder, 20 if asked.small else STEPS, asked.dropout)
            waiting.append(pool.submit(of_fold, pythons, *given))
        results = [one.result() for one in waiting]
    print(table(results))
    print("\n" + json.dumps(hardware()))
    if asked.out:
        asked.out.write_text(json.dumps({"hardware": hardware(), "results": results}, indent=1, sort_keys=True) + "\n")
    sys.exit(any("error" in found for result in results for found in result["models"]))


if __name__ == "__main__":
    main()
