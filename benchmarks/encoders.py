"""Random State Embedding folders of any size and cells to embed, for the benchmarks beside this file.

`python benchmarks/encoders.py FOLDER --full-size` writes one of SE-600M's exact shapes (2.9 GB and its gene vectors).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch

LIGHTNING = {"pytorch-lightning_version": "2.5.0", "epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}}


@dataclass(frozen=True)
class Size:
    """Sizes of an SE model; the defaults are the small model of the benchmark."""

    n_layers: int = 4
    d_model: int = 128
    d_hid: int = 128
    output_dim: int = 128
    n_heads: int = 8
    token_dim: int = 5120
    pad_length: int = 2048
    n_genes: int = 18_080
    n_datasets: int = 7

    def flops(self) -> float:
        """FLOPs of one cell in the exact form (docs/design.md), a multiplication and an addition counting two.

        T = pad_length + 1 rows. A layer: qkv and out_proj 8TDD, attention 4TTD, FFN 4TDH. The last one: keys and
        values of all rows 4TDD, and the rest for two rows, which is left out, as is what is linear in T alone.
        """
        t, d, h = self.pad_length + 1, self.d_model, self.d_hid
        layer = 8 * t * d * d + 4 * t * t * d + 4 * t * d * h
        counts = 2 * t * (512 + 10 * 512 + 10 * d)
        return (self.n_layers - 1) * layer + 4 * t * d * d + counts


SE_600M = Size(16, 2048, 2048, 2048, 16, 5120, 2048, 19_790, 14_420)


def gene_names(n: int) -> list[str]:
    """Made-up symbols."""
    return [f"GENE{i}" for i in range(n)]


def random_tensors(size: Size, seed: int = 0, device: str = "cpu") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors of an SE model, as its checkpoints name them, and gene vectors (n_genes, token_dim).

    On the device "meta" they have shapes and no numbers.
    """
    generator = None if device == "meta" else torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    d, h, o, t = size.d_model, size.d_hid, size.output_dim, size.token_dim
    linear = {
        "encoder.0": (d, t),
        "count_encoder.0": (512, 1),
        "count_encoder.2": (10, 512),
        "decoder.0.intermediate_dense": (2 * d, d),
        "decoder.0.dense": (d, 2 * d),
        "decoder.1": (o, d),
        "dataset_embedder": (10, o),
        "dataset_encoder.0": (d, o),
        "dataset_encoder.4": (size.n_datasets, d),
    }
    norms = {"encoder.1": d, "decoder.0.layer_norm": d, "dataset_encoder.2": d}
    for layer in (f"transformer_encoder.layers.{i}." for i in range(size.n_layers)):
        linear |= {layer + "qkv_proj": (3 * d, d), layer + "out_proj": (d, d)}
        linear |= {layer + "linear1": (h, d), layer + "linear2": (d, h)}
        norms |= {layer + "norm1": d, layer + "norm2": d}
    b = d + o + 11  # of a training head, which no embedding needs but every checkpoint has
    for block in ("binary_decoder.0.", "binary_decoder.1."):
        linear |= {block + "intermediate_dense": (2 * b, b), block + "dense": (b, 2 * b)}
        norms |= {block + "layer_norm": b}
    linear["binary_decoder.2"] = (1, b)
    tensors = {name: normal(1, t) for name in ("cls_token", "dataset_token")}
    tensors["bin_encoder.weight"] = normal(10, d)
    for name, (rows, columns) in linear.items():
        tensors[f"{name}.weight"] = normal(rows, columns, scale=columns**-0.5)
        tensors[f"{name}.bias"] = normal(rows, scale=0.1)
    for name, width in norms.items():
        tensors[f"{name}.weight"] = 1 + normal(width, scale=0.1)
        tensors[f"{name}.bias"] = normal(width, scale=0.1)
    for part in ("0.weight", "0.bias", "1.weight", "1.bias"):  # upstream's name for the same layer
        tensors[f"gene_embedding_layer.{part}"] = tensors[f"encoder.{part}"].clone()
    vectors = normal(size.n_genes, t)
    tensors["pe_embedding.weight"] = vectors
    return tensors, vectors


def write_encoder(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write random weights as upstream's trainer does (a Lightning .ckpt), gene vectors beside; returns the .ckpt."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, vectors = random_tensors(size, seed)
    d, h, o, t = size.d_model, size.d_hid, size.output_dim, size.token_dim
    arguments = {
        "token_dim": t,
        "d_model": d,
        "nhead": size.n_heads,
        "d_hid": h,
        "nlayers": size.n_layers,
        "output_dim": o,
        "emb_size": t,
    }
    settings = f"model:\n  nhead: {size.n_heads}\ndataset:\n  pad_length: {size.pad_length}\n  cls_token_idx: 3\n"
    checkpoint = folder / "se.ckpt"
    torch.save({**LIGHTNING, "state_dict": tensors, "hyper_parameters": arguments, "cfg_yaml": settings}, checkpoint)
    names = gene_names(size.n_genes)
    torch.save(
        {name: vector.clone() for name, vector in zip(names, vectors, strict=True)}, folder / "protein_embeddings.pt"
    )
    (folder / "config.yaml").write_text(settings)
    return checkpoint


def random_cells(n: int, n_genes: int, seed: int = 0, *, log1p: bool) -> scipy.sparse.csr_matrix:
    """Cells with 2,100 to 5,000 expressed genes: (n, n_genes) CSR of counts, or of log1p values.

    Of the log1p values hardly any two of a cell are equal, and there are more than slots: upstream's random choice
    among equal values does not matter then.
    """
    rng = np.random.default_rng([seed, int(log1p)])
    rate = rng.lognormal(0.0, 1.5, n_genes)
    rows = []
    for n_expressed in rng.integers(2100, 5001, n):
        order = rng.exponential(1.0, n_genes) / rate
        genes = np.sort(np.argpartition(order, min(n_expressed, n_genes - 1))[:n_expressed])
        values = rng.uniform(0.1, 4.0, len(genes)) if log1p else 1 + rng.poisson(rate[genes])
        row = scipy.sparse.csr_matrix((values.astype(np.float32), genes, [0, len(genes)]), shape=(1, n_genes))
        rows.append(row)
    return scipy.sparse.vstack(rows, format="csr")


def write_cells(path: Path, values: scipy.sparse.csr_matrix) -> Path:
    """Write an .h5ad of cells with the genes of `write_encoder`; every fourth is a control."""
    n = values.shape[0]
    labels = pd.Categorical([("non-targeting", "STAT1", "JAK2", "IRF1")[i % 4] for i in range(n)])
    obs = pd.DataFrame({"target_gene": labels}, index=[f"cell{i}" for i in range(n)])
    obs["cell_type"] = pd.Categorical(["k562"] * n)
    anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=gene_names(values.shape[1]))).write_h5ad(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full-size", action="store_true", help="SE-600M's shapes instead of the small ones")
    options = parser.parse_args()
    print(write_encoder(options.folder, SE_600M if options.full_size else Size()))


if __name__ == "__main__":
    main()
