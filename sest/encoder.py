"""The State Embedding (SE) encoder, inference only, with sizes read from the weights.

Shapes: B cells, L = pad_length (CLS and L - 1 genes), T = L + 1 rows (the dataset token is last), K kept genes,
D model width, O output width. Source: DESIGN section 4, checked against arc-state 0.11.1; Adduri et al. 2025.

Exact savings against upstream: the embedding of a gene (step 5) is computed once per file, not once per slot; in the
last layer only the CLS and dataset rows are asked for; nothing of the training heads is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from sest.errors import InputError
from sest.tokenize import cell_keys, tokenize
from sest.weights import EncoderWeights

N_DATASET_COLUMNS = 10
LAYER_NORM_EPS = 1e-5
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class KeptGenes:
    """The genes of one file that the encoder knows, ready on the device."""

    positions: Tensor  # (K,) int64 columns of the file
    tokens: Tensor  # (K,) int64 rows of the encoder's gene table
    table: Tensor  # (K, D) step-5 embedding of every kept gene


class StateEncoder:
    """A frozen State Embedding model.

    Args:
        weights: tensors and sizes of a checked checkpoint.
        device: where it runs.
        dtype: float32, bfloat16 or float16 of the transformer; values, shares and the final norm stay float32.
        seed: of the hash that breaks ties.
    """

    def __init__(self, weights: EncoderWeights, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.name = weights.source
        self.sha256 = weights.sha256
        self.genes: Sequence[str] = weights.genes
        self.pad_length = weights.pad_length
        self.n_heads = weights.n_heads
        self.cls_count_gene = weights.cls_count_gene
        self.device, self.dtype, self.seed = device, dtype, seed
        self._gene_vectors = weights.gene_vectors
        self._w = {name: t.to(device, dtype) for name, t in weights.tensors.items() if _needed(name)}
        self.width = self._w["encoder.0.weight"].shape[0]  # D
        self.native_dim = self._w["decoder.1.weight"].shape[0]  # O
        self.n_layers = 1 + max(int(n.split(".")[2]) for n in self._w if n.startswith("transformer_encoder.layers."))
        self._cls_row, self._dataset_row = (
            self._token_embedding(self._w[name]) for name in ("cls_token", "dataset_token")
        )  # each (1, D)

    @torch.inference_mode()
    def keep(self, positions: np.ndarray, tokens: np.ndarray) -> KeptGenes:
        """Prepare a file's kept genes: (K,) columns of the file and (K,) rows of the encoder's gene table."""
        rows = torch.as_tensor(tokens, dtype=torch.int64)
        if len(rows) <= self.cls_count_gene:
            raise InputError(f"Only {len(rows)} genes are known to the encoder; it needs {self.cls_count_gene + 1}.")
        table = []
        for part in rows.split(4096):  # bounded: a slice of the (n_genes, token_dim) table at a time
            vectors = F.normalize(self._gene_vectors[part].to(self.device, torch.float32), dim=-1)
            table.append(self._token_embedding(vectors.to(self.dtype)))
        return KeptGenes(
            torch.as_tensor(positions, dtype=torch.int64, device=self.device), rows.to(self.device), torch.cat(table)
        )

    @torch.inference_mode()
    def encode(self, rows: scipy.sparse.csr_matrix, cells: np.ndarray, scale: str, kept: KeptGenes) -> Tensor:
        """Embed cells.

        Args:
            rows: (B, genes of the file) float32 CSR.
            cells: (B,) int64 row numbers of the cells in their file; they decide ties, nothing else.
            scale: "counts" (log1p is taken here) or "log1p".
            kept: from `keep`.

        Returns:
            (B, O + 10) float32 on the device: the L2-normalised CLS embedding and the 10 dataset columns.
        """
        values = densify(rows, self.device)[:, kept.positions].clamp_min_(0.0)  # (B, K); negative -> 0, as upstream
        if scale == "counts":
            values = torch.log1p(values)
        keys = cell_keys(self.seed, torch.as_tensor(cells, dtype=torch.int64, device=self.device))
        positions, counts = tokenize(values, kept.tokens, keys, self.pad_length, self.cls_count_gene)
        x = self._rows(kept.table, positions, counts)
        for layer in range(self.n_layers - 1):
            x = self._layer(layer, x, x)
        ends = self._layer(self.n_layers - 1, x[:, [0, -1]], x)  # (B, 2, D): CLS and dataset rows
        out = self._head(ends).float()  # (B, 2, O)
        dataset = F.linear(out[:, 1].to(self.dtype), *self._linear("dataset_embedder")).float()
        return torch.cat([F.normalize(out[:, 0], dim=-1), dataset], dim=1)

    def _linear(self, name: str) -> tuple[Tensor, Tensor]:
        return self._w[f"{name}.weight"], self._w[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._linear(name), eps=LAYER_NORM_EPS)

    def _token_embedding(self, vectors: Tensor) -> Tensor:  # (N, token_dim) -> (N, D)
        x = self._norm("encoder.1", F.linear(vectors, *self._linear("encoder.0")))
        return F.silu(x) * self.width**0.5

    def _rows(self, table: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
        """Assemble the (B, T, D) input: CLS, genes, dataset token; count embeddings on all but the last."""
        n_cells = len(positions)
        genes = F.embedding(positions, table)  # (B, L - 1, D)
        x = torch.cat([self._cls_row.expand(n_cells, 1, -1), genes], dim=1)  # (B, L, D)
        hidden = F.leaky_relu(
            F.linear(counts.unsqueeze(-1).to(self.dtype), *self._linear("count_encoder.0")), LEAKY_SLOPE
        )
        bins = F.softmax(F.linear(hidden, *self._linear("count_encoder.2")), dim=-1)  # (B, L, 10)
        x = x + bins @ self._w["bin_encoder.weight"]
        return torch.cat([x, self._dataset_row.expand(n_cells, 1, -1)], dim=1)

    def _layer(self, number: int, queries: Tensor, x: Tensor) -> Tensor:
        """One post-norm layer for `queries` (B, Q, D), which are rows of `x` (B, T, D) -> (B, Q, D)."""
        name = f"transformer_encoder.layers.{number}"
        weight, bias = self._linear(f"{name}.qkv_proj")
        d = self.width
        if queries is x:
            q, k, v = F.linear(x, weight, bias).split(d, dim=-1)
        else:
            q = F.linear(queries, weight[:d], bias[:d])
            k, v = F.linear(x, weight[d:], bias[d:]).split(d, dim=-1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        y = self._norm(f"{name}.norm1", queries + F.linear(attended, *self._linear(f"{name}.out_proj")))
        hidden = F.gelu(F.linear(y, *self._linear(f"{name}.linear1")))
        return self._norm(f"{name}.norm2", y + F.linear(hidden, *self._linear(f"{name}.linear2")))

    def _head(self, x: Tensor) -> Tensor:  # (B, 2, D) -> (B, 2, O)
        hidden = F.relu(F.linear(x, *self._linear("decoder.0.intermediate_dense")))
        x = self._norm("decoder.0.layer_norm", x + F.linear(hidden, *self._linear("decoder.0.dense")))
        return F.linear(x, *self._linear("decoder.1"))

    def describe(self) -> str:
        """Sizes in words."""
        return f"{self.n_layers} layers, width {self.width}, {self.pad_length} slots, {len(self.genes):,} genes"

    def activation_bytes(self) -> int:
        """A rough upper bound of the memory one cell needs in a forward pass."""
        ffn = self._w["transformer_encoder.layers.0.linear1.weight"].shape[0]
        count_hidden = self._w["count_encoder.0.weight"].shape[0]
        numbers = (self.pad_length + 1) * max(6 * self.width + ffn, 2 * count_hidden) + 4 * len(self.genes)
        return numbers * self._w["encoder.0.weight"].element_size()


def _needed(name: str) -> bool:
    """Whether inference reads this tensor (the training heads are left out)."""
    wanted = ("cls_token", "dataset_token", "encoder.", "transformer_encoder.", "decoder.", "bin_encoder.")
    return name.startswith((*wanted, "count_encoder.", "dataset_embedder."))


def densify(rows: scipy.sparse.csr_matrix, device: torch.device) -> Tensor:
    """CSR rows (B, genes) to a dense float32 tensor on the device, moving only the stored values."""
    n_cells, n_genes = rows.shape
    cell = torch.repeat_interleave(torch.arange(n_cells), torch.as_tensor(np.diff(rows.indptr)))
    flat = (cell * n_genes + torch.as_tensor(rows.indices)).to(device)
    dense = torch.zeros(n_cells * n_genes, device=device)
    dense[flat] = torch.as_tensor(rows.data).to(device, torch.float32)
    return dense.view(n_cells, n_genes)


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that a checkpoint's tensors have, for `sest info` and batch sizing."""
    return {
        "token_dim": tensors["encoder.0.weight"].shape[1],
        "d_model": tensors["encoder.0.weight"].shape[0],
        "d_hid": tensors["transformer_encoder.layers.0.linear1.weight"].shape[0],
        "n_layers": 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("transformer_encoder.layers.")),
        "output_dim": tensors["decoder.1.weight"].shape[0],
    }
