"""Small stores with known contents, written directly: a test of training depends on no encoder and no h5ad file.

The cells are Poisson counts whose rates depend on cell type and perturbation, so that there is something to learn, and
their embeddings are random vectors, so that nothing can be read from them by accident. Numbers of cells are chosen so
that sets come out whole, short, and shorter than half (see `SIZES`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import scipy.sparse

from sest.cache import StoreWriter
from sest.cache.schema import SCHEMA_VERSION
from sest.cache.writer import GroupPlan
from sest.config import TrainConfig
from sest.progress import Silent

GENES = tuple(f"g{i}" for i in range(20))
SIZES = {"P": 8, "Q": 5, "R": 1, "S": 6, "T": 9}  # cells of every perturbation and cell type; sets have 4
DIM = 6


class Notes(Silent):
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@dataclass(frozen=True, eq=False)
class TinyGroup:
    """The cells of one file, in file order. n cells, G genes, E embedding width."""

    path: str
    genes: tuple[str, ...]
    matrix: scipy.sparse.csr_matrix  # (n, G) int16 counts or float32 log1p
    obs: pd.DataFrame  # perturbation, cell_type, batch
    embeddings: np.ndarray  # (n, E)
    scale: str
    control: str


def tiny_group(
    path: str = "screen",
    *,
    genes: Sequence[str] = GENES,
    cell_types: Sequence[str] = ("x", "y"),
    sizes: dict[str, int] | None = None,
    n_controls: int = 7,
    batches: Sequence[str] = ("b1", "b2"),
    scale: str = "counts",
    control: str = "ctrl",
    seed: int = 0,
) -> TinyGroup:
    """Draw the cells of one file: every cell type has `n_controls` controls and `sizes` perturbed cells, shuffled."""
    rng = np.random.default_rng([seed, len(genes)])
    sizes = SIZES if sizes is None else sizes
    labels = [
        (name, cell_type)
        for cell_type in cell_types
        for name, n in {control: n_controls, **sizes}.items()
        for _ in range(n)
    ]
    labels = [labels[i] for i in rng.permutation(len(labels))]
    rate = {name: rng.gamma(1.0, 2.0, len(genes)) for name in (*cell_types, *sizes)}
    rate[control] = np.ones(len(genes))
    counts = rng.poisson(np.stack([rate[cell_type] * (0.5 + rate[name]) for name, cell_type in labels]))
    values = counts.astype(np.int16)
    if scale == "log1p":
        values = np.log1p(1e4 * counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical([name for name, _ in labels]),
            "cell_type": pd.Categorical([cell_type for _, cell_type in labels]),
            "batch": pd.Categorical(rng.choice(list(batches), len(labels)), categories=list(batches)),
        },
        index=[f"{path}-{i}" for i in range(len(labels))],
    )
    embeddings = rng.normal(size=(len(labels), DIM)).astype(np.float32)
    return TinyGroup(path, tuple(genes), scipy.sparse.csr_matrix(values), obs, embeddings, scale, control)


def write_store(path: Path, groups: Sequence[TinyGroup], *, dtype: str = "float16", projection: bool = True) -> Path:
    """Write groups as a finished store, as `sest embed --encoder pca` would describe it."""
    attributes = {
        "schema_version": SCHEMA_VERSION,
        "sest_version": "test",
        "encoder": "pca",
        "encoder_sha256": "0" * 64,
        "gene_table_sha256": "0" * 64,
        "native_dim": DIM,
        "dim": DIM,
        "projection": "pca" if projection else "none",
        "dtype": dtype,
        "precision": "fp32",
        "cells": "all",
        "seed": 0,
        "groups": [g.path for g in groups],
        "inputs": {g.path: {"sha256": str(float(g.matrix.sum()))} for g in groups},
        "licence": None,
    }
    # Durability is for tests/faults and test_cache.py; 100 calls of fsync a group take most of the time here.
    with mock.patch("os.fsync"), StoreWriter(path, attributes) as writer:
        for g in groups:
            plan = GroupPlan(
                path=g.path,
                indptr=g.matrix.indptr.astype(np.int64),
                n_genes=len(g.genes),
                target_dtype=str(g.matrix.dtype),
                dim=DIM,
                embedding_dtype=dtype,
                attributes=_attributes(g),
            )
            writer.add_group(plan, g.obs, pd.DataFrame(index=pd.Index(g.genes, dtype=str)))
            writer.write_target_shard(plan, 0, g.matrix.data, g.matrix.indices.astype(np.int32))
            writer.write_embedding_shard(plan, 0, g.embeddings)
        if projection:
            basis, zero = np.eye(DIM, dtype=np.float32), np.zeros(DIM, np.float32)
            arrays = {"mean": zero, "basis": basis, "explained_variance": zero + np.float32(1 / DIM)}
            writer.write_projection(arrays, {"sha256": "0" * 64, "genes": list(GENES[:DIM])})
        writer.finish()
    return path


def _attributes(group: TinyGroup) -> dict[str, Any]:
    is_control = (group.obs.get("perturbation", pd.Series(index=group.obs.index, dtype=str)) == group.control).sum()
    return {
        "dataset": group.path.split("/")[0],
        "columns": {"perturbation": "gene", "cell_type": "cell_type", "batch": "batch", "control": group.control},
        "scale": group.scale,
        "n_cells": len(group.obs),
        "n_genes": len(group.genes),
        "n_embedded": len(group.obs),
        "perturbations": group.obs["perturbation"].nunique() - 1 if "perturbation" in group.obs else 0,
        "controls": int(is_control),
    }


def tiny_config(**changes: Any) -> TrainConfig:
    """A head of some thousand parameters and steps of milliseconds: 3 sets of 4 cells, 12 steps, one thread."""
    values: dict[str, Any] = {
        "max_steps": 12,
        "batch_size": 3,
        "set_size": 4,
        "lr": 1e-3,
        "hidden": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "val_every": 4,
        "checkpoint_every": 4,
        "log_every": 1,
        "num_workers": 0,
        "device": "cpu",
    }
    return TrainConfig.from_values({**values, **changes}, "tiny_config")
