"""The State Embedding (SE) encoder, inference only, with sizes read from the weights.

Shapes: B cells, L = pad_length (CLS and L - 1 genes), T = L + 1 rows (the dataset token is last), K kept genes,
D model width, O output width. Source: Adduri et al. 2025, checked against arc-state 0.11.1. Steps are numbered as in
docs/design.md, The encoder, exactly.

Exact savings against upstream: the embedding of a gene (step 5) is computed once per file, not once per slot; in the
last layer only the CLS and dataset rows are asked for; nothing of the training heads is run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from sest.errors import InputError
from sest.head.kernels import add_norm, plain_add_norm
from sest.machine.transfer import Sender, Sent
from sest.se.attention import attention, working_kernel
from sest.se.tokenize import cell_keys, tokenize
from sest.se.weights import EncoderWeights

N_DATASET_COLUMNS = 10
LAYER_NORM_EPS = 1e-5
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class KeptGenes:
    """The genes of one file that the encoder knows, ready on the device."""

    place: Tensor  # (genes of the file,) int32 position of a column among the kept genes, or -1
    tokens: Tensor  # (K,) int32 rows of the encoder's gene table
    table: Tensor  # (K + 2, D) step-5 embedding of every kept gene, of CLS and of the dataset token


@dataclass(frozen=True)
class Sentences:
    """A tokenised batch."""

    positions: Tensor  # (B, L - 1) int64 among the kept genes
    counts: Tensor  # (B, L) float32 count features

    def __len__(self) -> int:
        return len(self.positions)

    def part(self, start: int, stop: int) -> Sentences:
        """Cells start to stop, or to the last."""
        return Sentences(self.positions[start:stop], self.counts[start:stop])


@dataclass(frozen=True)
class SparseRows:
    """A batch on its way to a GPU, which tokenises it: CSR of the file's columns."""

    sent: Sent  # genes (nnz,) int32 columns, values (nnz,) float32, lengths (B,) int64, keys (B,) int32 of `cell_keys`
    scale: str
    indptr: np.ndarray  # (B + 1,) int64 of these cells, on the host: where their values are among those sent
    first: int = 0  # of these cells among those sent

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def tensors(self) -> dict[str, Tensor]:
        """What was sent of these cells, on the device."""
        cells, values = slice(self.first, self.first + len(self)), slice(int(self.indptr[0]), int(self.indptr[-1]))
        return {
            name: tensor[cells if name in ("lengths", "keys") else values]
            for name, tensor in self.sent.tensors().items()
        }

    def part(self, start: int, stop: int) -> SparseRows:
        """Cells start to stop, or to the last."""
        return replace(self, indptr=self.indptr[start : min(stop, len(self)) + 1], first=self.first + start)


Staged = Sentences | SparseRows


class StateEncoder:
    """A frozen State Embedding model.

    Args:
        weights: tensors and sizes of a checked file.
        device: where it runs.
        dtype: float32, bfloat16 or float16 of the transformer; values, shares and the final norm stay float32.
        seed: of the hash that breaks ties.
        max_tokens: slots of a sentence at most, CLS included; fewer than pad_length is an approximation.
    """

    def __init__(
        self,
        weights: EncoderWeights,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        *,
        max_tokens: int | None = None,
    ) -> None:
        self.name = weights.source
        self.sha256 = weights.sha256
        self.genes: Sequence[str] = weights.genes
        self.pad_length = min(weights.pad_length, max_tokens or weights.pad_length)  # L
        self.n_heads = weights.n_heads
        self.cls_count_gene = weights.cls_count_gene
        self.device, self.dtype, self.seed = device, dtype, seed
        if device.type == "cpu":
            self._n_threads = torch.get_num_threads()
            self._tokenizers = ThreadPoolExecutor(self._n_threads, "tokenize")
        else:
            self._sender = Sender(device)
        self._gene_vectors = weights.gene_vectors
        self._w = {name: t.to(device, dtype) for name, t in weights.tensors.items() if _needed(name)}
        self.width = self._w["encoder.0.weight"].shape[0]  # D
        self.native_dim = self._w["decoder.1.weight"].shape[0]  # O
        self.n_layers = 1 + max(int(n.split(".")[2]) for n in self._w if n.startswith("transformer_encoder.layers."))
        self._cls_row, self._dataset_row = (
            self._token_embedding(self._w[name]) for name in ("cls_token", "dataset_token")
        )  # each (1, D)
        self.attention_kernel = ""  # on a GPU, in words
        self._attending: Callable[[], AbstractContextManager[None]] = nullcontext
        if device.type == "cuda":
            self.attention_kernel, self._attending = working_kernel(
                self.pad_length + 1, self.width, self.n_heads, dtype, device
            )

    @torch.inference_mode()
    def keep(self, positions: np.ndarray, tokens: np.ndarray, n_genes: int) -> KeptGenes:
        """Prepare the kept genes of a file.

        Args:
            positions: (K,) columns of the file.
            tokens: (K,) rows of the encoder's gene table.
            n_genes: columns of the file.

        Raises:
            InputError: fewer genes than the encoder needs.
        """
        rows = torch.as_tensor(tokens, dtype=torch.int64)
        if len(rows) <= self.cls_count_gene:
            raise InputError(f"Only {len(rows)} genes are known to the encoder; it needs {self.cls_count_gene + 1}.")
        table = []
        for part in rows.split(4096):  # bounded: a slice of the (n_genes, token_dim) table at a time
            vectors = F.normalize(self._gene_vectors[part].to(self.device, torch.float32), dim=-1)
            table.append(self._token_embedding(vectors.to(self.dtype)))
        place = torch.full((n_genes,), -1, dtype=torch.int32)
        place[torch.as_tensor(positions, dtype=torch.int64)] = torch.arange(len(rows), dtype=torch.int32)
        return KeptGenes(
            place.to(self.device),
            rows.to(self.device, torch.int32),
            torch.cat([*table, self._cls_row, self._dataset_row]),
        )

    def encode(self, rows: scipy.sparse.csr_matrix, cells: np.ndarray, scale: str, kept: KeptGenes) -> Tensor:
        """Embed cells: `stage`, then `run`."""
        return self.run(self.stage(rows, cells, scale, kept), kept)

    @torch.inference_mode()
    def stage(self, rows: scipy.sparse.csr_matrix, cells: np.ndarray, scale: str, kept: KeptGenes) -> Staged:
        """Prepare a batch; any thread may do it while another one is in `run`.

        On a CPU the cells are tokenised. For a GPU, which tokenises itself, copying their stored values is started.

        Args:
            rows: (B, genes of the file) float32 CSR.
            cells: (B,) int64 row numbers of the cells in their file; they decide ties, nothing else.
            scale: "counts" (log1p is taken here) or "log1p".
            kept: from `keep`.
        """
        keys = cell_keys(self.seed, torch.as_tensor(cells, dtype=torch.int64))
        indptr = rows.indptr.astype(np.int64)
        genes = torch.as_tensor(rows.indices.astype(np.int32, copy=False))
        values = torch.as_tensor(rows.data.astype(np.float32, copy=False))
        if self.device.type == "cpu":
            return self._tokenized(indptr, genes, values, keys, scale, kept)
        arrays = {"genes": genes.numpy(), "values": values.numpy(), "lengths": np.diff(indptr), "keys": keys.numpy()}
        return SparseRows(self._sender.send(arrays), scale, indptr)

    def _tokenized(
        self, indptr: np.ndarray, genes: Tensor, values: Tensor, keys: Tensor, scale: str, kept: KeptGenes
    ) -> Sentences:
        """CSR arrays to sentences, on a CPU."""
        from sest.se import tokenize_cpu  # imports numba, which nothing else needs

        # NumPy's log1p, a float32 step from torch's at most, since torch's would wait for the cores that are in `run`
        logs = np.log1p(np.maximum(values.numpy(), 0.0)) if scale == "counts" else values.numpy()
        positions, counts = tokenize_cpu.tokenize(
            indptr,
            genes.numpy(),
            values.numpy(),
            logs,
            kept.place.numpy(),
            kept.tokens.numpy().view(np.uint32),
            keys.numpy().view(np.uint32),
            self.pad_length,
            self.cls_count_gene,
            self._tokenizers,
            self._n_threads,
        )
        return Sentences(torch.from_numpy(positions), torch.from_numpy(counts))

    @torch.inference_mode()
    def run(self, staged: Staged, kept: KeptGenes) -> Tensor:
        """Embed a staged batch.

        Returns:
            (B, O + 10) float32 on the device: the L2-normalised CLS embedding and the 10 dataset columns.
        """
        if isinstance(staged, SparseRows):
            there = staged.tensors()
            values = densify(there["lengths"], there["genes"], there["values"], kept.place, len(kept.tokens))
            staged = Sentences(
                *tokenize(values, kept.tokens, there["keys"], self.pad_length, self.cls_count_gene, scale=staged.scale)
            )
        x = self._rows(kept.table, staged.positions, staged.counts)
        with self._attending():
            for layer in range(self.n_layers - 1):
                x = self._layer(layer, x, x)
            ends = x[:, :: self.pad_length].contiguous()  # (B, 2, D): CLS and dataset rows; a list of them would wait
            ends = self._layer(self.n_layers - 1, ends, x)
        out = self._head(ends).float()  # (B, 2, O)
        dataset = F.linear(out[:, 1].to(self.dtype), *self._linear("dataset_embedder")).float()
        return torch.cat([F.normalize(out[:, 0], dim=-1), dataset], dim=1)

    def with_slots(self, pad_length: int) -> StateEncoder:
        """The same encoder, sharing its weights, with sentences of another length."""
        other = copy.copy(self)
        other.pad_length = pad_length
        return other

    def _large(self, name: str, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """One of a layer's four linear maps, or some of its output columns."""
        return F.linear(x, self._w[f"{name}.weight"][rows], self._w[f"{name}.bias"][rows])

    def _linear(self, name: str) -> tuple[Tensor, Tensor]:
        return self._w[f"{name}.weight"], self._w[f"{name}.bias"]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._linear(name), eps=LAYER_NORM_EPS)

    def _add_norm(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The norm of x + y; x is used up."""
        run = plain_add_norm if self.device.type == "cpu" else add_norm  # an operator costs a CPU more than its kernel
        normed: Tensor = run(x, y, *self._linear(name), LAYER_NORM_EPS)
        return normed

    def _token_embedding(self, vectors: Tensor) -> Tensor:  # (N, token_dim) -> (N, D)
        x = self._norm("encoder.1", F.linear(vectors, *self._linear("encoder.0")))
        return F.silu(x) * self.width**0.5

    def _rows(self, table: Tensor, positions: Tensor, counts: Tensor) -> Tensor:
        """Assemble the (B, T, D) input: CLS, genes, dataset token; count embeddings on all but the last."""
        n_kept = len(table) - 2
        rows = F.pad(F.pad(positions, (1, 0), value=n_kept), (0, 1), value=n_kept + 1)  # (B, T)
        x = F.embedding(rows, table)
        hidden = F.linear(counts.unsqueeze(-1).to(self.dtype), *self._linear("count_encoder.0"))
        hidden = F.leaky_relu(hidden, LEAKY_SLOPE, inplace=True)
        bins = F.softmax(F.linear(hidden, *self._linear("count_encoder.2")), dim=-1)  # (B, L, 10)
        x[:, :-1].add_(bins @ self._w["bin_encoder.weight"])  # `+=` would copy the sum to its own place
        return x

    def _layer(self, number: int, queries: Tensor, x: Tensor) -> Tensor:
        """One post-norm layer for `queries` (B, Q, D), which are rows of `x` (B, T, D) -> (B, Q, D)."""
        name = f"transformer_encoder.layers.{number}"
        y = self._add_norm(f"{name}.norm1", self._large(f"{name}.out_proj", self._attended(name, queries, x)), queries)
        hidden = F.gelu(self._large(f"{name}.linear1", y))
        return self._add_norm(f"{name}.norm2", self._large(f"{name}.linear2", hidden), y)

    def _attended(self, name: str, queries: Tensor, x: Tensor) -> Tensor:  # (B, Q, D), (B, T, D) -> (B, Q, D)
        d = self.width
        if queries is x:
            q, k, v = self._large(f"{name}.qkv_proj", x).split(d, dim=-1)
        else:
            q = self._large(f"{name}.qkv_proj", queries, slice(d))
            k, v = self._large(f"{name}.qkv_proj", x, slice(d, None)).split(d, dim=-1)
        return attention(q, k, v, self.n_heads)

    def _head(self, x: Tensor) -> Tensor:  # (B, 2, D) -> (B, 2, O)
        hidden = F.relu(F.linear(x, *self._linear("decoder.0.intermediate_dense")))
        x = self._norm("decoder.0.layer_norm", x + F.linear(hidden, *self._linear("decoder.0.dense")))
        return F.linear(x, *self._linear("decoder.1"))

    def describe(self) -> str:
        """Sizes in words."""
        return f"{self.n_layers} layers, width {self.width}, {self.pad_length} slots, {len(self.genes):,} genes"

    def largest_pass(self) -> int:
        """Cells of a forward pass that has no tensor of 2^31 numbers: some kernels count in 32 bits."""
        ffn, counts = (
            len(self._w[f"{name}.bias"]) for name in ("transformer_encoder.layers.0.linear1", "count_encoder.0")
        )
        a_cell = max((self.pad_length + 1) * max(3 * self.width, ffn, counts), len(self.genes) + 1)
        return max((2**31 - 1) // a_cell, 1)

    def activation_bytes(self) -> int:
        """The memory a cell of a large batch needs in a forward pass; small ones have what the allocator keeps."""
        ffn = len(self._w["transformer_encoder.layers.0.linear1.bias"])
        count_hidden = len(self._w["count_encoder.0.bias"])
        # numbers a row that live at once: in attention; in the feed-forward part; in the count embedding
        numbers = max(6 * self.width, 3 * self.width + 2 * ffn, 2 * (self.width + count_hidden))
        tokenizing = 32 * len(self.genes) if self.device.type != "cpu" else 0  # dense values, hashes and their order
        return max((self.pad_length + 1) * numbers * self._cls_row.element_size(), tokenizing)


def _needed(name: str) -> bool:
    """Whether inference reads this tensor (the training heads are left out)."""
    wanted = ("cls_token", "dataset_token", "encoder.", "transformer_encoder.", "decoder.", "bin_encoder.")
    return name.startswith((*wanted, "count_encoder.", "dataset_embedder."))


def densify(lengths: Tensor, genes: Tensor, values: Tensor, place: Tensor, n_kept: int) -> Tensor:
    """The kept genes of CSR rows, dense; all tensors are on one device.

    Args:
        lengths: (B,) int64 values of every row.
        genes: (nnz,) int32 columns of the file.
        values: (nnz,) float32.
        place: (genes of the file,) int32 position of a column among the kept genes, or -1.
        n_kept: K.

    Returns:
        (B, K) float32, a part of a wider tensor.
    """
    device, n_cells = values.device, len(lengths)
    ends = torch.arange(1, n_cells + 1, device=device) * (n_kept + 1)  # a row's column -1 is the spare one at its end
    dense = torch.zeros(n_cells * (n_kept + 1), device=device)
    columns = torch.where(place < 0, -1, place - (n_kept + 1))[genes]
    dense[torch.repeat_interleave(ends, lengths, output_size=len(values)) + columns] = values
    return dense.view(n_cells, n_kept + 1)[:, :n_kept]


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that an encoder's tensors have, for `sest info` and batch sizing."""
    return {
        "token_dim": tensors["encoder.0.weight"].shape[1],
        "d_model": tensors["encoder.0.weight"].shape[0],
        "d_hid": tensors["transformer_encoder.layers.0.linear1.weight"].shape[0],
        "n_layers": 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("transformer_encoder.layers.")),
        "output_dim": tensors["decoder.1.weight"].shape[0],
    }
