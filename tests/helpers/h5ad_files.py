"""Small .h5ad files of random counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

FORMS: dict[str, Callable[[np.ndarray], object]] = {
    "csr": scipy.sparse.csr_matrix,
    "csc": scipy.sparse.csc_matrix,
    "dense": np.asarray,
}


def gene_names(n: int) -> list[str]:
    return [f"G{i}" for i in range(n)]


def counts(n_cells: int = 40, n_genes: int = 30, seed: int = 0) -> np.ndarray:
    """Poisson counts (n_cells, n_genes) with many ties; cell 1 is empty."""
    values = np.random.default_rng([seed, 7]).poisson(1.2, (n_cells, n_genes)).astype(np.float32)
    values[1] = 0
    return values


def write_cells(
    path: Path,
    values: np.ndarray,
    form: str = "csr",
    *,
    obs: pd.DataFrame | None = None,
    var: pd.DataFrame | None = None,
    layers: dict[str, object] | None = None,
) -> Path:
    """Write an .h5ad: a third of the cells are controls, two perturbations, two cell types, two batches.

    Args:
        form: of X, one of FORMS.
        obs: a table instead of that one.
        var: a table instead of one of `gene_names`.
    """
    n_cells, n_genes = values.shape
    if obs is None:
        labels = ["non-targeting", "STAT1", "JAK2"]
        obs = pd.DataFrame(
            {
                "target_gene": [labels[i % 3] for i in range(n_cells)],
                "cell_type": [("k562", "rpe1")[i // 3 % 2] for i in range(n_cells)],
                "batch": [f"b{i // 6 % 2}" for i in range(n_cells)],
            },
            index=[f"cell{i}" for i in range(n_cells)],
            dtype="category",
        )
    if var is None:
        var = pd.DataFrame(index=gene_names(n_genes))
    path.parent.mkdir(parents=True, exist_ok=True)
    anndata.AnnData(FORMS[form](values), obs=obs, var=var, layers=layers).write_h5ad(path)
    return path
