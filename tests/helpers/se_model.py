"""A small State Embedding model with random weights, as a folder that `--encoder` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKEN_DIM, WIDTH, HIDDEN, INNER, OUT, HEADS = 8, 16, 24, 20, 12, 4


def se_tensors(n_layers: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model's state_dict, by upstream's names, scaled so that activations stay near 1."""
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
