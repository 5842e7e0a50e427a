"""The encoders `sest embed` can run: a State Embedding model, or `pca`, the control that needs no weights."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch

from sest.columns import match_genes
from sest.config import EmbedConfig
from sest.devices import DTYPES, choose_device, choose_precision, faster_precision
from sest.encoder import N_DATASET_COLUMNS, KeptGenes, Staged, StateEncoder
from sest.errors import InputError, shown
from sest.inputs import Cells
from sest.progress import Progress
from sest.project import Projection, fit_pca
from sest.weights import find_encoder, load_encoder

PCA = "pca"
PCA_GENES = 2048  # of more genes, those with the largest variance are kept: eigenvectors take seconds, not a minute
PCA_TARGET_SUM = 10_000.0  # counts are normalised to this sum before log1p
# Bytes of activations of one forward pass on a CPU: larger ones are mapped, cleared and unmapped time and again.
# Measured on two cores (width 128, 2048 slots): 12.6 to 15.2 cells/s in batches of 2, 11.3 to 12.2 of 64.
ACTIVATION_BUDGET = 2**25


class CellEncoder(Protocol):
    """What `sest.embed` needs of an encoder. B cells, D = native_dim."""

    name: str
    sha256: str
    precision: str
    native_dim: int
    n_extra: int  # columns after the native ones (SE: 10 dataset columns)
    always_projected: bool
    fitted: Projection | None  # set by `prepare` where fitting needs no encoding
    max_tokens: int | None  # where sentences are cut to fewer tokens than the encoder was trained with

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Fit on the sampled rows of every file, where the encoder is fitted and not loaded."""

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        """(B, genes of the file) CSR and (B,) row numbers -> (B, D + n_extra) float32: `stage`, then `run`."""

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> Any:
        """Prepare a batch for `run`; any thread may do it while another one is in `run`."""

    def run(self, cells: Cells, staged: Any) -> np.ndarray:
        """Encode what `stage` prepared -> (B, D + n_extra) float32."""

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        """How well approximate embeddings of these cells point where exact ones do; None where they are exact."""

    def gene_names(self, cells: Cells) -> list[str]:
        """Names of all genes of a file, as the store keeps them."""

    def gene_table_sha256(self) -> str:
        """Hash of the genes the encoder reads, in its order."""

    def projection_attributes(self) -> dict[str, Any]:
        """What must be kept with the projection to encode new cells."""

    def batch_size(self, asked: int) -> int:
        """Cells a forward pass; `asked` unless it is 0."""


def check_encoder(config: EmbedConfig) -> None:
    """Refuse what can be refused before the inputs are read: an encoder, device or precision that is not there."""
    if not config.encoder:
        raise InputError("No encoder. Pass --encoder with an SE folder, a checkpoint file, or 'pca'.")
    if config.encoder == PCA and config.max_tokens is not None:
        raise InputError("--max-tokens shortens the sentences of an SE encoder; 'pca' has none. Leave it out.")
    if config.encoder != PCA:
        choose_precision(config.precision, choose_device(config.device), training=False)
        find_encoder(Path(config.encoder), config.checkpoint)


def make_encoder(config: EmbedConfig, cells: Sequence[Cells], progress: Progress) -> CellEncoder:
    """Build the encoder that --encoder names and match it with every file's genes.

    Raises:
        InputError: no such encoder, unusable weights, or a file whose genes it does not know.
    """
    check_encoder(config)
    if config.encoder == PCA:
        return PcaEncoder(common_genes(cells, progress))
    return SeEncoder(config, cells, progress)


class SeEncoder:
    """A State Embedding model (sest.encoder) and the genes each file shares with it."""

    always_projected = False
    n_extra = N_DATASET_COLUMNS
    fitted: Projection | None = None

    def __init__(self, config: EmbedConfig, cells: Sequence[Cells], progress: Progress) -> None:
        device = choose_device(config.device)
        self.precision = choose_precision(config.precision, device, training=False)
        if hint := faster_precision(self.precision, device):
            progress.note(hint)
        weights = load_encoder(Path(config.encoder), config.checkpoint)
        matches = {}
        for c in cells:
            try:
                match = matches[c.group] = match_genes(c.file.var, weights.genes)
            except InputError as error:
                raise InputError(f"{c.file.path.name}: {error}") from error
            progress.note(
                f"{c.source.path.name}: {len(match.tokens):,} of {c.file.n_genes:,} genes are known to the encoder "
                f"({match.column})."
            )
        self._model = StateEncoder(
            weights,
            device,
            DTYPES[self.precision],
            config.seed,
            max_tokens=config.max_tokens,
            eight_bits=self.precision == "fp8",
        )
        self.max_tokens = self._model.pad_length if self._model.pad_length < weights.pad_length else None
        self._weights, self._progress = weights, progress
        self._most = sys.maxsize  # cells a forward pass that the memory has held
        self.name, self.sha256, self.native_dim = self._model.name, self._model.sha256, self._model.native_dim
        self._genes = {c.group: _unique_names(c, matches[c.group].names, progress) for c in cells}
        self._kept: dict[str, KeptGenes] = {
            c.group: self._model.keep(matches[c.group].positions, matches[c.group].tokens, c.file.n_genes)
            for c in cells
        }
        progress.note(f"Encoder {self.name} ({self._model.describe()}) on {device}, {self.precision}.")
        if self.max_tokens is not None:
            progress.note(
                f"Sentences are cut to {self.max_tokens} of {weights.pad_length} tokens: embeddings are approximate."
            )

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Nothing to fit: the weights are given."""

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self.run(cells, self.stage(cells, rows, numbers))

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> Staged:
        return self._model.stage(rows, numbers, cells.scale, self._kept[cells.group])

    def run(self, cells: Cells, staged: Staged) -> np.ndarray:
        out, most = _run_in_parts(self._model, staged, self._kept[cells.group], self._most)
        if most < self._most:
            self._most = most
            self._progress.note(f"{len(staged)} cells at once do not fit the memory: going on with {most}.")
        return out

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        """Cosine between the CLS embeddings of these cells and those of whole sentences, of bf16 instead of fp8.

        Returns:
            n_cells, cosine_mean and cosine_min; None where nothing is approximate.
        """
        if self.max_tokens is None and self.precision != "fp8":
            return None
        exact, kept = self._model.with_slots(self._weights.pad_length), self._kept[cells.group]
        if self.precision == "fp8":
            exact = StateEncoder(self._weights, exact.device, exact.dtype, exact.seed)
        expected, _ = _run_in_parts(exact, exact.stage(rows, numbers, cells.scale, kept), kept, self._most)
        a, b = (x[:, : self.native_dim].astype(np.float64) for x in (self.encode(cells, rows, numbers), expected))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return {
            "n_cells": len(numbers),
            "cosine_mean": round(float(cosine.mean()), 5),
            "cosine_min": round(float(cosine.min()), 5),
        }

    def gene_names(self, cells: Cells) -> list[str]:
        return self._genes[cells.group]

    def gene_table_sha256(self) -> str:
        return hash_names(self._model.genes)

    def projection_attributes(self) -> dict[str, Any]:
        return {}

    def batch_size(self, asked: int) -> int:
        if asked:
            return asked
        device, a_cell = self._model.device, self._model.activation_bytes()
        budget = int(torch.cuda.mem_get_info(device)[0] * 0.5) if device.type == "cuda" else ACTIVATION_BUDGET
        return int(np.clip(budget // a_cell, 1, 256))


class PcaEncoder:
    """PCA of log1p expression: what every SE result should be held against.

    Counts are normalised to 10,000 a cell and log1p-ed, log1p values are used as they are; of more than 2,048 genes
    those with the largest variance in the sample are kept; the PCA is exact, in float64.
    """

    name = PCA
    precision = "fp32"
    n_extra = 0
    always_projected = True
    max_tokens: int | None = None

    def __init__(self, genes: list[str]) -> None:
        self.genes = genes
        self.fitted: Projection | None = None
        self.native_dim = min(len(genes), PCA_GENES)
        self.sha256 = hash_names([PCA, str(PCA_TARGET_SUM), *genes])
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def from_projection(cls, genes: list[str], projection: Projection) -> PcaEncoder:
        """The encoder a store or checkpoint was made with, for new cells."""
        encoder = cls(genes)
        encoder.fitted = projection
        return encoder

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        if len(self.genes) > PCA_GENES:
            self._keep_most_variable(cells, sample)
        native = (rows.toarray() for rows in self._sampled(cells, sample))
        self.fitted = fit_pca(native, dim, at_most)

    def _keep_most_variable(self, cells: Sequence[Cells], sample: Sequence[np.ndarray]) -> None:
        count, total, squares = 0, np.zeros(len(self.genes)), np.zeros(len(self.genes))
        for rows in self._sampled(cells, sample):
            count += rows.shape[0]
            total += np.asarray(rows.sum(0), dtype=np.float64).ravel()
            squares += np.asarray(rows.astype(np.float64).power(2).sum(0)).ravel()
        variance = squares / count - (total / count) ** 2
        kept = np.sort(np.argsort(-variance, kind="stable")[:PCA_GENES])
        self.genes = [self.genes[i] for i in kept]
        self._columns.clear()

    def _sampled(self, cells: Sequence[Cells], sample: Sequence[np.ndarray]) -> Iterator[scipy.sparse.csr_matrix]:
        for c, numbers in zip(cells, sample, strict=True):
            for start in range(0, len(numbers), 2048):
                yield self._values(c, c.read(numbers[start : start + 2048]))

    def _values(self, cells: Cells, rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Log1p values of the PCA's genes: (B, genes of the file) -> (B, D) CSR float32."""
        if cells.group not in self._columns:
            place = {name: i for i, name in enumerate(self.gene_names(cells))}
            self._columns[cells.group] = np.array([place[name] for name in self.genes])
        if cells.scale == "counts":
            total = np.asarray(rows.sum(1), dtype=np.float64).ravel()
            factor = np.divide(PCA_TARGET_SUM, total, out=np.zeros_like(total), where=total > 0).astype(np.float32)
            rows = rows.copy()
            rows.data = np.log1p(rows.data * np.repeat(factor, np.diff(rows.indptr)))
        return rows[:, self._columns[cells.group]]

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self.run(cells, self.stage(cells, rows, numbers))

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> scipy.sparse.csr_matrix:
        return self._values(cells, rows)

    def run(self, cells: Cells, staged: scipy.sparse.csr_matrix) -> np.ndarray:
        return staged.toarray()

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        return None

    def gene_names(self, cells: Cells) -> list[str]:
        return list(map(str, cells.file.var.index))

    def gene_table_sha256(self) -> str:
        return hash_names(self.genes)

    def projection_attributes(self) -> dict[str, Any]:
        return {"genes": self.genes}

    def batch_size(self, asked: int) -> int:
        return asked or 1024


def _run_in_parts(model: StateEncoder, staged: Staged, kept: KeptGenes, most: int) -> tuple[np.ndarray, int]:
    """Run a batch in parts of at most `most` cells; where memory runs out, halve them.

    Returns:
        (B, O + 10) float32, and the number of cells that fitted (`most`, where all did).

    Raises:
        InputError: one cell alone does not fit.
    """
    parts: list[np.ndarray] = []
    start = 0
    while start < len(staged):
        part = staged.part(start, start + most)
        try:
            parts.append(model.run(part, kept).cpu().numpy())
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise InputError(
                    f"A single cell does not fit the memory of {model.device}: its {model.pad_length} tokens need "
                    f"about {model.activation_bytes() / 1e6:.0f} MB beside the weights. Stop what else uses the "
                    "device, or pass --max-tokens, another --device or a lower --precision."
                ) from error
            most = len(part) // 2
        else:
            start += len(part)
    return np.concatenate(parts), most


def common_genes(cells: Sequence[Cells], progress: Progress) -> list[str]:
    """Genes that every file has, in the order of the first.

    Raises:
        InputError: the files have none in common.
    """
    first = list(map(str, cells[0].file.var.index))
    shared = set(first).intersection(*(map(str, c.file.var.index) for c in cells[1:]))
    genes = [name for name in first if name in shared]
    if not genes:
        raise InputError(f"The files have no gene in common ({shown(c.source.path.name for c in cells)}).")
    if len(genes) < max(c.file.n_genes for c in cells):
        progress.note(f"The PCA uses the {len(genes):,} genes that all files have.")
    return genes


def _unique_names(cells: Cells, names: Sequence[str], progress: Progress) -> list[str]:
    """The matched names; a gene without one, or whose name repeats, keeps its name in the var index (which is said)."""
    often = Counter(names)
    index = list(map(str, cells.file.var.index))
    result = [name if name and often[name] == 1 else i for name, i in zip(names, index, strict=True)]
    changed = sum(a != b for a, b in zip(result, names, strict=True))
    if changed:
        progress.note(f"{cells.source.path.name}: {changed:,} genes without a name of their own keep their var index.")
    if len(set(result)) < len(result):
        twice = [name for name, n in Counter(result).items() if n > 1]
        raise InputError(f"{cells.source.path.name} names {len(twice)} genes twice: {shown(twice)}. Rename them.")
    return result


def hash_names(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
