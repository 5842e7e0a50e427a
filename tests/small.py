"""What the tests of `sest embed` share: a small State Embedding model, small .h5ad files and small stores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from safetensors.torch import save_file

from sest.cache import StoreWriter, schema
from sest.cache.writer import GroupPlan

TOKEN_DIM, WIDTH, HIDDEN, INNER, OUT, HEADS = 8, 16, 24, 20, 12, 4
FORMS: dict[str, Callable[[np.ndarray], object]] = {
    "csr": scipy.sparse.csr_matrix,
    "csc": scipy.sparse.csc_matrix,
    "dense": np.asarray,
}


def se_tensors(n_layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """The state_dict of a small SE model (names of DESIGN section 4), scaled so that activations stay near 1."""
    linear = {
        "encoder.0": (WIDTH, TOKEN_DIM),
        "count_encoder.0": (32, 1),
        "count_encoder.2": (10, 32),
        "decoder.0.intermediate_dense": (INNER, WIDTH),
        "decoder.0.dense": (WIDTH, INNER),
        "decoder.1": (OUT, WIDTH),
        "dataset_embedder": (10, OUT),
    }
    norms = ["encoder.1", "decoder.0.layer_norm"]
    for layer in (f"transformer_encoder.layers.{i}." for i in range(n_layers)):
        linear |= {layer + "qkv_proj": (3 * WIDTH, WIDTH), layer + "out_proj": (WIDTH, WIDTH)}
        linear |= {layer + "linear1": (HIDDEN, WIDTH), layer + "linear2": (WIDTH, HIDDEN)}
        norms += [layer + "norm1", layer + "norm2"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {name: normal(1, TOKEN_DIM) for name in ("cls_token", "dataset_token")}
    tensors["bin_encoder.weight"] = normal(10, WIDTH)
    for name, (rows, columns) in linear.items():
        tensors[f"{name}.weight"] = normal(rows, columns) / columns**0.5
        tensors[f"{name}.bias"] = 0.1 * normal(rows)
    for name in norms:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.1 * normal(WIDTH), 0.1 * normal(WIDTH)
    return tensors


def write_se(folder: Path, genes: Sequence[str], pad_length: int = 16, seed: int = 0) -> Path:
    """Write an SE folder that knows `genes`, in that order."""
    folder.mkdir(parents=True)
    save_file(se_tensors(seed=seed), folder / "model.safetensors")
    vectors = torch.randn((len(genes), TOKEN_DIM), generator=torch.Generator().manual_seed(seed + 1))
    torch.save(dict(zip(genes, vectors, strict=True)), folder / "protein_embeddings.pt")
    settings = f"model:\n  nhead: {HEADS}\ndataset:\n  pad_length: {pad_length}\n  cls_token_idx: 3\n"
    (folder / "config.yaml").write_text(settings)
    return folder


def gene_names(n: int) -> list[str]:
    return [f"G{i}" for i in range(n)]


def counts(n_cells: int = 40, n_genes: int = 30, seed: int = 0) -> np.ndarray:
    """Poisson counts (n_cells, n_genes) with many ties; cell 1 is empty."""
    values = np.random.default_rng([seed, 7]).poisson(1.2, (n_cells, n_genes)).astype(np.float32)
    values[1] = 0
    return values


def write_cells(path: Path, values: np.ndarray, form: str = "csr", **options: object) -> Path:
    """Write an .h5ad: a third of the cells are controls, three perturbations, two cell types, two batches.

    Options: obs, var (tables instead of these), layers, and what AnnData.write_h5ad takes.
    """
    n_cells, n_genes = values.shape
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
    obs = options.pop("obs", obs)
    var = options.pop("var", pd.DataFrame(index=gene_names(n_genes)))
    path.parent.mkdir(parents=True, exist_ok=True)
    anndata.AnnData(FORMS[form](values), obs=obs, var=var, layers=options.pop("layers", None)).write_h5ad(path)
    assert not options, options
    return path


class Notes:
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []  # task, total, done before

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: object = None) -> None:
        self.steps.append((task, total, done))

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- stores


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 cells and 16 values, shards of 8 and 64, so that small stores have several."""
    monkeypatch.setattr(schema, "ROWS_PER_CHUNK", 4)
    monkeypatch.setattr(schema, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(schema, "ENTRIES_PER_CHUNK", 16)
    monkeypatch.setattr(schema, "ENTRIES_PER_SHARD", 64)


@dataclass(frozen=True)
class MadeGroup:
    """A group of a made-up store: what is written is what must be read."""

    path: str
    x: scipy.sparse.csr_matrix  # (n_cells, n_genes) in the stored type
    embeddings: np.ndarray  # (n_cells, 3)

    @property
    def plan(self) -> GroupPlan:
        attributes = {"dataset": self.path.split("/")[0], "n_cells": self.x.shape[0], "n_genes": self.x.shape[1]}
        return GroupPlan(
            path=self.path,
            indptr=self.x.indptr.astype(np.int64),
            n_genes=self.x.shape[1],
            target_dtype=self.x.dtype.name,
            dim=3,
            embedding_dtype=self.embeddings.dtype.name,
            attributes=attributes,
        )

    @property
    def obs(self) -> pd.DataFrame:
        labels = pd.Categorical([("ctrl", "A", "B")[i % 3] for i in range(self.x.shape[0])])
        return pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(len(labels))])

    @property
    def var(self) -> pd.DataFrame:
        return pd.DataFrame(index=gene_names(self.x.shape[1]))


def made_group(path: str, n_cells: int, dtype: str, seed: int) -> MadeGroup:
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.8, (n_cells, 11)) * (1 if dtype.startswith("int") else 0.37)
    return MadeGroup(path, scipy.sparse.csr_matrix(x.astype(dtype)), rng.normal(size=(n_cells, 3)).astype(np.float16))


GROUPS = (made_group("a", 19, "int16", 0), made_group("ds/b", 13, "float32", 1))
ATTRIBUTES = {
    "schema_version": schema.SCHEMA_VERSION,
    "sest_version": "0.0",
    "dim": 3,
    "dtype": "float16",
    "groups": [group.path for group in GROUPS],
    "inputs": {group.path: {"sha256": f"of {group.path}", "scale": "counts"} for group in GROUPS},
}
PROJECTION = {"mean": np.arange(5, dtype=np.float32), "basis": np.arange(15, dtype=np.float32).reshape(5, 3)}


def write_store(path: Path, attributes: Mapping[str, Any] = ATTRIBUTES) -> list[str]:
    """Write or continue the store of GROUPS; returns what had to be written."""
    written = []
    with StoreWriter(path, attributes) as writer:
        if writer.complete:
            return []
        for group in GROUPS:
            plan = group.plan
            writer.add_group(plan, group.obs, group.var)
            for shard in writer.missing_target_shards(plan):
                a, b = plan.target_shards()[shard]
                writer.write_target_shard(plan, shard, group.x.data[a:b], group.x.indices[a:b])
                written.append(f"{group.path} targets {shard}")
        if not writer.has_projection():
            writer.write_projection(PROJECTION, {"genes": ["G1"]})
            written.append("projection")
        for group in GROUPS:
            for shard in writer.missing_embedding_shards(group.plan):
                start, stop = group.plan.embedding_shards()[shard]
                writer.write_embedding_shard(group.plan, shard, group.embeddings[start:stop])
                written.append(f"{group.path} embeddings {shard}")
        writer.finish()
    return written


def hashes(store: Path) -> dict[str, str]:
    """The sha256 of every file of a store but the lock."""
    files = [file for file in sorted(store.rglob("*")) if file.is_file() and file.name != schema.LOCK]
    return {file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- a second implementation of sest/tokenize.py, one cell at a time, in plain Python


def plain_mix(x: int) -> int:
    """Lowbias32 of C. Wellons' hash-prospector, on unbounded integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def plain_key(seed: int, cell: int) -> int:
    """The key of one cell."""
    key = plain_mix(seed % 2**32 ^ 0x5E57)
    for word in (cell % 2**32, cell // 2**32):
        key = plain_mix(key ^ word)
    return key


def plain_sentence(values: Sequence[float], tokens: Sequence[int], seed: int, cell: int, pad_length: int) -> list[int]:
    """The sentence of one cell: positions among its kept genes."""
    key = plain_key(seed, cell)
    ranked = sorted(range(len(tokens)), key=lambda i: (values[i], plain_mix(key ^ int(tokens[i]))), reverse=True)
    if len(ranked) >= pad_length - 1:
        return ranked[: pad_length - 1]
    expressed = [i for i in ranked if values[i] > 0]
    pool = ranked[len(expressed) :] or ranked
    stream = plain_mix(key ^ 0xD2A3)
    drawn = [pool[plain_mix(stream ^ slot) % len(pool)] for slot in range(len(expressed), pad_length - 1)]
    return expressed + drawn


def plain_counts(values: np.ndarray, sentence: Sequence[int]) -> np.ndarray:
    """The count features of one cell: kept gene number 3 in slot 0, then its sentence."""
    total = float(np.sum(values, dtype=np.float64))
    shares = [float(v) / total if total > 0 else 1 / len(values) for v in values]
    return np.array([100 * shares[i] for i in (3, *sentence)])
