"""Small caches with known contents, written directly: no encoder, no .h5ad file.

Two kinds of cells. `random_group` draws values that mean nothing, for tests of the cache itself: `GROUPS` are two of
them, with odd sizes. `small_screen` draws Poisson counts whose rates depend on cell type and perturbation, so that a
head has something to learn; its embeddings are random, so that nothing can be read from them by accident.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from sest.cache import CacheWriter, journal, schema
from sest.cache.layout import GroupPlan

GENES = tuple(f"g{i}" for i in range(20))
SIZES = {"P": 8, "Q": 5, "R": 1, "S": 6, "T": 9}  # cells of every perturbation and cell type: sets of 4 come out
# whole, short, and shorter than half
DIM = 6


@dataclass(frozen=True, eq=False)
class CellGroup:
    """The cells of one file, in file order: what is written is what must be read. n cells, G genes, E width."""

    path: str
    genes: tuple[str, ...]
    matrix: scipy.sparse.csr_matrix  # (n, G) in the stored type
    obs: pd.DataFrame  # perturbation, cell_type, batch, or some of them
    embeddings: np.ndarray  # (n, E)
    scale: str  # "counts" or "log1p"
    control: str

    @property
    def var(self) -> pd.DataFrame:
        return pd.DataFrame(index=pd.Index(self.genes, dtype=str))

    @property
    def plan(self) -> GroupPlan:
        """For embeddings stored as float16."""
        return GroupPlan(
            path=self.path,
            indptr=self.matrix.indptr.astype(np.int64),
            n_genes=len(self.genes),
            target_dtype=self.matrix.dtype.name,
            dim=self.embeddings.shape[1],
            embedding_dtype="float16",
            attributes=self._attributes(),
        )

    def _attributes(self) -> dict[str, Any]:
        labelled = "perturbation" in self.obs
        return {
            "dataset": self.path.split("/")[0],
            "columns": {"perturbation": "gene", "cell_type": "cell_type", "batch": "batch", "control": self.control},
            "scale": self.scale,
            "n_cells": len(self.obs),
            "n_genes": len(self.genes),
            "n_embedded": len(self.obs),
            "perturbations": self.obs["perturbation"].nunique() - 1 if labelled else 0,
            "controls": int((self.obs["perturbation"] == self.control).sum()) if labelled else 0,
        }


def random_group(path: str, n_cells: int, dtype: str, seed: int) -> CellGroup:
    """Random values over 11 genes with embeddings of width 3."""
    rng = np.random.default_rng(seed)
    whole = dtype.startswith("int")
    matrix = scipy.sparse.csr_matrix((rng.poisson(0.8, (n_cells, 11)) * (1 if whole else 0.37)).astype(dtype))
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical([("ctrl", "A", "B")[i % 3] for i in range(n_cells)])},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    genes = tuple(f"G{i}" for i in range(11))
    embeddings = rng.normal(size=(n_cells, 3)).astype(np.float16)
    return CellGroup(path, genes, matrix, obs, embeddings, "counts" if whole else "log1p", "ctrl")


def small_screen(
    path: str = "screen",
    *,
    genes: Sequence[str] = GENES,
    cell_types: Sequence[str] = ("x", "y"),
    sizes: Mapping[str, int] = SIZES,
    n_controls: int = 7,
    batches: Sequence[str] = ("b1", "b2"),
    scale: str = "counts",
    control: str = "ctrl",
    dim: int = DIM,
    seed: int = 0,
) -> CellGroup:
    """Draw the cells of one file: every cell type has `n_controls` controls and `sizes` perturbed cells, shuffled."""
    rng = np.random.default_rng([seed, len(genes)])
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
    values: np.ndarray = counts.astype(np.int16)
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
    embeddings = rng.normal(size=(len(labels), dim)).astype(np.float32)
    return CellGroup(path, tuple(genes), scipy.sparse.csr_matrix(values), obs, embeddings, scale, control)


GROUPS = (random_group("a", 19, "int16", 0), random_group("ds/b", 13, "float32", 1))
ATTRIBUTES: dict[str, Any] = {
    "schema_version": schema.SCHEMA_VERSION,
    "sest_version": "0.0",
    "dim": 3,
    "dtype": "float16",
    "groups": [group.path for group in GROUPS],
    "inputs": {group.path: {"sha256": f"of {group.path}", "scale": "counts"} for group in GROUPS},
}
PROJECTION = {"mean": np.arange(5, dtype=np.float32), "basis": np.arange(15, dtype=np.float32).reshape(5, 3)}


def continue_cache(path: Path, attributes: Mapping[str, Any] = ATTRIBUTES) -> list[str]:
    """Write or continue the cache of GROUPS; returns what had to be written."""
    with CacheWriter(path, attributes) as writer:
        return [] if writer.complete else _fill(writer, GROUPS, "float16", (PROJECTION, {"genes": ["G1"]}))


def write_cache(path: Path, groups: Sequence[CellGroup], *, dtype: str = "float16", projection: bool = True) -> Path:
    """Write groups as a finished cache, as `sest embed --encoder pca` would describe it."""
    dim = groups[0].embeddings.shape[1]
    attributes = {
        "schema_version": schema.SCHEMA_VERSION,
        "sest_version": "test",
        "encoder": "pca",
        "encoder_sha256": "0" * 64,
        "gene_table_sha256": "0" * 64,
        "native_dim": dim,
        "dim": dim,
        "projection": "pca" if projection else "none",
        "dtype": dtype,
        "precision": "fp32",
        "cells": "all",
        "seed": 0,
        "groups": [g.path for g in groups],
        "inputs": {g.path: {"sha256": str(float(g.matrix.sum()))} for g in groups},
        "licence": None,
    }
    fitted = None
    if projection:
        basis, zero = np.eye(dim, dtype=np.float32), np.zeros(dim, np.float32)
        arrays = {"mean": zero, "basis": basis, "explained_variance": zero + np.float32(1 / dim)}
        fitted = arrays, {"sha256": "0" * 64, "genes": [f"g{i}" for i in range(dim)]}
    with CacheWriter(path, attributes) as writer:
        _fill(writer, groups, dtype, fitted)
    return path


def _fill(
    writer: CacheWriter,
    groups: Sequence[CellGroup],
    dtype: str,
    projection: tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None,
) -> list[str]:
    """Write what is missing: targets, projection, embeddings; returns what that was."""
    written = []
    for group in groups:
        plan = dataclasses.replace(group.plan, embedding_dtype=dtype)
        writer.add_group(plan, group.obs, group.var)
        for shard in writer.missing_target_shards(plan):
            a, b = plan.target_shards()[shard]
            writer.write_target_shard(plan, shard, group.matrix.data[a:b], group.matrix.indices[a:b].astype(np.int32))
            written.append(f"{group.path} targets {shard}")
    if projection is not None and not writer.has_projection():
        writer.write_projection(*projection)
        written.append("projection")
    for group in groups:
        plan = dataclasses.replace(group.plan, embedding_dtype=dtype)
        for shard in writer.missing_embedding_shards(plan):
            start, stop = plan.embedding_shards()[shard]
            writer.write_embedding_shard(plan, shard, group.embeddings[start:stop])
            written.append(f"{group.path} embeddings {shard}")
    writer.finish()
    return written


def hashes(cache: Path) -> dict[str, str]:
    """The sha256 of every file of a cache but the lock."""
    files = [file for file in sorted(cache.rglob("*")) if file.is_file() and file.name != schema.LOCK]
    return {file.relative_to(cache).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def reseal(cache: Path) -> Path:
    """Promise a cache as it is now, as whoever gives away a cache of their own making could."""
    journal_file = cache / schema.JOURNAL
    before = {line["file"]: line for line in map(json.loads, journal_file.read_text().splitlines())}
    entries: journal.Entries = {}
    for file in sorted(cache.rglob("*")):
        name = file.relative_to(cache).as_posix()
        if file.is_file() and name not in (schema.JOURNAL, schema.COMPLETE) and schema.is_file_name(name):
            data = file.read_bytes()
            entries[name] = {
                **before.get(name, {}),
                "file": name,
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    journal_file.write_bytes(journal.merged(entries))
    (cache / schema.COMPLETE).write_bytes(journal.complete_line(entries))
    return cache


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 cells and 16 values, shards of 8 and 64, so that small caches have several."""
    monkeypatch.setattr(schema, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(schema, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(schema, "ENTRIES_PER_CHUNK", 16)
    monkeypatch.setattr(schema, "ENTRIES_PER_SHARD", 64)
