"""A prediction and real cells as two small files, for the tests of the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = [f"g{i}" for i in range(8)]
PAIRS = [("k562", "g0"), ("k562", "g1"), ("k562", "g0+g1"), ("rpe1", "g0"), ("rpe1", "g2")]
Written = tuple[Path, Path]


def log1p(counts: np.ndarray, target_sum: float) -> np.ndarray:
    """Dense, row by row: nothing shared with the module."""
    return np.stack([np.log1p(row / row.sum() * target_sum) for row in counts.astype(np.float64)])


def cells(seed: int, n: int, extra_genes: int = 0) -> ad.AnnData:
    """Poisson counts of n cells for every pair and control; the first gene of each perturbation is 5 times higher."""
    rng = np.random.default_rng(seed)
    keys = [*PAIRS, ("k562", "control"), ("rpe1", "control")]
    obs = pd.DataFrame([key for key in keys for _ in range(n)], columns=["cell_type", "target_gene"], dtype="category")
    obs.index = [f"cell{i}" for i in range(len(obs))]
    genes = [*GENES, *(f"extra{i}" for i in range(extra_genes))]
    rate = np.full((len(obs), len(genes)), 4.0) * rng.uniform(0.5, 2, len(genes))
    for row, perturbation in enumerate(obs["target_gene"]):
        for name in set(perturbation.split("+")) & set(genes):
            rate[row, genes.index(name)] *= 5
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def sest_uns(**more: Any) -> dict[str, Any]:
    columns = {"perturbation": "target_gene", "cell_type": "cell_type", "control": "control"}
    return {"target_sum": 1000.0, "scale": "counts", "columns": columns, **more}


def unchanged(adata: ad.AnnData) -> ad.AnnData:
    return adata


def write_two_files(
    folder: Path,
    uns: dict[str, Any] | None = None,
    change_real: Callable[[ad.AnnData], ad.AnnData] = unchanged,
    change_predicted: Callable[[ad.AnnData], ad.AnnData] = unchanged,
) -> Written:
    """Write a prediction as `sest predict` does (log1p, 1,000 counts a cell) and real counts with shuffled genes."""
    predicted = cells(1, 6)
    predicted.X = sp.csr_matrix(log1p(predicted.X.toarray(), 1000.0).astype(np.float32))
    predicted.uns["sest"] = sest_uns() if uns is None else uns
    real = cells(2, 9, extra_genes=3)
    real = real[:, np.random.default_rng(0).permutation(real.n_vars)].copy()
    paths = folder / "predicted.h5ad", folder / "real.h5ad"
    for adata, path in zip((change_predicted(predicted), change_real(real)), paths, strict=True):
        adata.write_h5ad(path)
    return paths


def means(path: Path, target_sum: float | None) -> dict[tuple[str, str], np.ndarray]:
    """Dense pseudobulks (G,) of every (cell type, perturbation)."""
    adata = ad.read_h5ad(path)
    values = adata.X.toarray() if target_sum is None else log1p(adata.X.toarray(), target_sum)
    at = [adata.var_names.get_loc(gene) for gene in GENES]
    groups = adata.obs.groupby(["cell_type", "target_gene"], observed=True).indices
    return {key: values[rows][:, at].mean(axis=0) for key, rows in groups.items()}
