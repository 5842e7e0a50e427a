"""What tests of predictions share: how to find cells of the demo, and how they predict with its run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np

CONTROL, SET_SIZE = "non-targeting", 16
Predict = Callable[..., ad.AnnData]
# A run of one step, where what it learns does not matter.
SMALL: dict[str, Any] = {
    "max_steps": 1,
    "batch_size": 2,
    "set_size": 8,
    "hidden": 8,
    "n_layers": 1,
    "n_heads": 1,
    "num_workers": 0,
}


def rows_of(cells: ad.AnnData, perturbation: str, cell_type: str) -> np.ndarray:
    return np.flatnonzero((cells.obs["target_gene"] == perturbation) & (cells.obs["cell_type"] == cell_type))
