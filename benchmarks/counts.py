"""Whole counts of predicted cells: which model gives the challenge's six scores the best values, the mean held fixed?

One of papalexi's replicates is held out whole, as a context of the Virtual Cell Challenge 2026: `sest predict --format
vcc2026` from its control cells, with the counts made as sest makes them, by other models of the same fold changes, or
by hand from log1p predictions; scored by `cell-eval2 run --preset vcc2026` in an environment of its own:

    python3 -m venv .venv-challenge && .venv-challenge/bin/pip install cell-eval2 pdex
    python benchmarks/counts.py --peers-python .venv-challenge/bin/python            # ten minutes

Cells (../shared/data, or SEST_DATA) are read where they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import anndata
import numpy as np
import scipy.sparse
import torch
from real_cells import DIM, SCREENS, TRAINING, data_folder, folds_of, hardware, train_one
from scipy.sparse import csr_matrix as Counts

import sest
import sest.prediction.submission
from sest.config import PredictConfig
from sest.prediction.counts import changed_counts
from sest.prediction.predict import predict

SCORES = (
    "pds_cosine",
    "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae",
)


def scaled(counts: Counts, fold: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Counts:
    """The control cells' counts times the fold change, rounded up or down at random."""
    product = counts.multiply(fold).tocsr()
    whole = np.floor(product.data)
    whole += rng.random(len(whole)) < product.data - whole
    result = Counts((whole.astype(np.float32), product.indices, product.indptr), shape=product.shape)
    result.eliminate_zeros()
    return result


def expected(counts: Counts, fold: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(n, G) counts that cells of these depths have on average."""
    changed = share * fold
    return np.outer(np.asarray(counts.sum(1)).ravel(), changed / changed.sum())


def poisson(counts: Counts, fold: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Counts:
    """Drawn around the mean profile, every gene alone."""
    return Counts(rng.poisson(expected(counts, fold, share)).astype(np.float32))


def multinomial(counts: Counts, fold: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Counts:
    """Drawn from the mean profile, with the cell's total kept."""
    mean = expected(counts, fold, share)
    totals = np.rint(np.asarray(counts.sum(1)).ravel()).astype(int)
    return Counts(rng.multinomial(totals, mean / mean.sum(1, keepdims=True)).astype(np.float32))


def negative_binomial(
    dispersion: np.ndarray,
) -> Callable[[Counts, np.ndarray, np.ndarray, np.random.Generator], Counts]:
    """Drawn around the mean profile with the dispersion (G,) of the controls."""

    def draw(counts: Counts, fold: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> Counts:
        mean = expected(counts, fold, share)
        return Counts(rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape)).astype(np.float32))

    return draw


def by_hand(predicted: anndata.AnnData, controls: anndata.AnnData) -> anndata.AnnData:
    """Log1p predictions as counts: each cell scaled to the depth of a control cell, rounded at random."""
    rng = np.random.default_rng(0)
    shares = np.expm1(predicted.X.toarray().astype(np.float64))
    shares *= (rng.choice(np.asarray(controls.X.sum(1)).ravel(), len(shares)) / shares.sum(1))[:, None]
    whole = np.floor(shares)
    whole += rng.random(whole.shape) < shares - whole
    is_control = (predicted.obs["target_gene"] == "non-targeting").to_numpy()
    counts = anndata.AnnData(Counts(whole.astype(np.float32)), obs=predicted.obs[["target_gene"]], var=predicted.var)
    together = anndata.concat([counts[~is_control], controls[:, predicted.var_names]])
    together.obs["context"] = "A"
    return together


def dispersion_of(controls: anndata.AnnData) -> np.ndarray:
    """(G,) of a negative binomial, from moments of the counts at equal depth."""
    counts = np.asarray(controls.X.toarray(), np.float64)
    depth = counts.sum(1, keepdims=True)
    scaled = counts / depth * depth.mean()
    mean, variance = scaled.mean(0), scaled.var(0)
    noise = mean * depth.mean() * (1 / depth).mean()
    return np.clip((variance - noise) / np.maximum(mean, 1e-9) ** 2, 0.01, 20.0)


def scores(python: str, predicted: Path, real: Path, out: Path) -> dict[str, float]:
    """The six, by cell-eval2."""
    program = str(Path(python).with_name("cell-eval2"))
    command = [program, "run", "-ap", str(predicted), "-ar", str(real), "--preset", "vcc2026"]
    done = subprocess.run([*command, "--pert-col", "target_gene", "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    with open(out / "agg_results.csv", newline="") as file:
        mean = next(row for row in csv.DictReader(file) if row["statistic"] == "mean")
    return {name: float(mean[name]) for name in SCORES}


def main() -> None:
    """Train, predict with every model of the counts, score; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", required=True, help="interpreter that has cell-eval2 and pdex")
    parser.add_argument("--fold", default="rep_3", choices=("rep_1", "rep_2", "rep_3"), help="the replicate held out")
    parser.add_argument("--blend", action="append", help="only these; may be given several times (all four)")
    parser.add_argument("--model", action="append", help="only these models; may be given several times (all)")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder()
    file, column = SCREENS["papalexi"]
    fold = next(fold for fold in folds_of(data) if (fold.kind, fold.zeroshot) == ("replicate", asked.fold))
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        options: dict[str, Any] = {"pert_col": "target_gene", "cell_type_col": column, "encoder": "pca", "dim": DIM}
        sest.embed(data / f"{file}.h5ad", work / "cache.zarr", **options)
        (work / "starter.toml").write_text(fold.toml())
        train_one(work / "cache.zarr", work, fold, TRAINING)
        real = anndata.read_h5ad(data / f"{file}.h5ad")
        real = real[real.obs[column].astype(str) == asked.fold].copy()
        names = real.obs["target_gene"].astype(str).replace("control", "non-targeting")
        real.obs = real.obs[[]].assign(target_gene=names.astype("category"), context="A")
        real.X = scipy.sparse.csr_matrix(real.X).astype(np.float32)
        real.write_h5ad(work / "real.h5ad")
        controls = real[real.obs["target_gene"] == "non-targeting"].copy()
        controls.write_h5ad(work / "controls.h5ad")
        models = {
            "thinned, added to": changed_counts,
            "scaled, rounded": scaled,
            "poisson": poisson,
            "multinomial": multinomial,
            "negative binomial": negative_binomial(dispersion_of(controls)),
        }
        perturbations = sorted(set(names) - {"non-targeting"})
        run, results = work / "runs" / "seed-0", dict[str, dict[str, dict[str, float]]]()
        for blend in asked.blend or ("auto", "head", "stack", "controls"):
            config = PredictConfig(
                controls=str(work / "controls.h5ad"), blend=blend, control="non-targeting", n_cells=400
            )
            for name in asked.model or (*models, "log1p cells, by hand"):
                folder = work / f"{blend}-{name}".replace(" ", "-")
                folder.mkdir()
                copy = folder / "copies" / "A.h5ad"
                if name in models:
                    now = replace(config, format="vcc2026", with_controls=str(copy.parent))
                    with mock.patch.object(sest.prediction.submission, "changed_counts", models[name]):
                        predict(run, folder / "all.h5ad", now, perturbations)
                else:
                    predict(run, folder / "all.h5ad", config, perturbations)
                    copy.parent.mkdir()
                    by_hand(anndata.read_h5ad(folder / "all.h5ad"), controls).write_h5ad(copy)
                found = scores(asked.peers_python, copy, work / "real.h5ad", folder / "scores")
                results.setdefault(blend, {})[name] = found
                print(blend, name, json.dumps(found), flush=True)
    print(f"| cells | counts | {' | '.join(SCORES)} |")
    print("|---" * (2 + len(SCORES)) + "|")
    for blend, of_models in results.items():
        for name, found in of_models.items():
            print(f"| {blend} | {name} | {' | '.join(f'{found[score]:.4f}' for score in SCORES)} |")
    print("\n" + json.dumps(hardware()))
    if asked.out:
        asked.out.write_text(json.dumps({"hardware": hardware(), "results": results}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
