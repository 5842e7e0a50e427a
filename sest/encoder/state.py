"""The State Embedding model as an encoder of files: the genes each shares with it, batches that fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse
import torch

from sest.cache.schema import LICENCE_NOTE
from sest.cells.genes import GeneMatch, match_genes
from sest.cells.inputs import Cells, unique_names
from sest.encoder.align import hash_names
from sest.encoder.base import DEFAULT_DIM
from sest.encoder.projection import Projection
from sest.errors import InputError
from sest.machine.devices import DTYPES, float32_products
from sest.machine.transfer import Arriving, fetch
from sest.se.model import N_DATASET_COLUMNS, KeptGenes, Staged, StateEncoder
from sest.se.weights import EncoderWeights

logger = logging.getLogger(__name__)

# Bytes of activations of one forward pass on a CPU: larger ones are mapped, cleared and unmapped time and again.
ACTIVATION_BUDGET = 2**25


class SeEncoder:
    """A State Embedding model (sest.se.model) and the genes each file shares with it.

    Raises:
        InputError: a file whose genes the model does not know, or cannot tell apart.
    """

    projection = "pca"
    default_dim = DEFAULT_DIM
    always_projected = False
    licence: str | None = LICENCE_NOTE
    n_extra = N_DATASET_COLUMNS
    fitted: Projection | None = None

    def __init__(
        self,
        weights: EncoderWeights,
        cells: Sequence[Cells],
        device: torch.device,
        precision: str,
        *,
        seed: int,
        max_tokens: int | None,
        gene_col: str | None = None,
    ) -> None:
        matches = {c.group: _match(c, weights.genes, gene_col) for c in cells}
        self.precision = precision
        self._model = StateEncoder(weights, device, DTYPES[precision], seed, max_tokens=max_tokens)
        self.max_tokens = self._model.pad_length if self._model.pad_length < weights.pad_length else None
        self._weights = weights
        self._most = self._model.largest_pass()  # cells a forward pass; fewer once the memory did not hold them
        self.name, self.sha256, self.native_dim = self._model.name, self._model.sha256, self._model.native_dim
        self._genes = {c.group: unique_names(c, matches[c.group].names) for c in cells}
        self._kept: dict[str, KeptGenes] = {
            c.group: self._model.keep(matches[c.group].positions, matches[c.group].tokens, c.file.n_genes)
            for c in cells
        }
        by = f", attention by {self._model.attention_kernel}" if self._model.attention_kernel else ""
        logger.info(f"Encoder {self.name} ({self._model.describe()}) on {device}, {precision}{by}.")
        if self.max_tokens is not None:
            logger.info(
                f"Sentences are cut to {self.max_tokens} of {weights.pad_length} tokens: embeddings are approximate."
            )

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Nothing to fit: the weights are given."""

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self.start(cells, self.stage(cells, rows, numbers))()

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> Staged:
        return self._model.stage(rows, numbers, cells.scale, self._kept[cells.group])

    def start(self, cells: Cells, staged: Staged) -> Callable[[], np.ndarray]:
        kept = self._kept[cells.group]
        if self._model.device.type == "cpu":
            return lambda: _numbers(self._begun(staged, kept))
        return partial(_numbers, self._begun(staged, kept))

    def _begun(self, staged: Staged, kept: KeptGenes) -> list[Arriving]:
        """A batch's results, in parts that fit the memory."""
        with float32_products(self.precision):
            parts, most = _run_in_parts(self._model, staged, kept, self._most)
        if most < self._most:
            self._most = most
            logger.info(f"{len(staged)} cells at once do not fit the memory: going on with {most}.")
        return parts

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        """Cosine between the CLS embeddings of these cells and those of whole sentences.

        Returns:
            n_cells, cosine_mean and cosine_min; None where nothing is approximate.
        """
        if self.max_tokens is None:
            return None
        exact, kept = self._model.with_slots(self._weights.pad_length), self._kept[cells.group]
        most = min(self._most, exact.largest_pass())
        with float32_products(self.precision):
            expected, _ = _run_in_parts(exact, exact.stage(rows, numbers, cells.scale, kept), kept, most)
        found = self.encode(cells, rows, numbers), _numbers(expected)
        a, b = (x[:, : self.native_dim].astype(np.float64) for x in found)
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

    def input_identity(self, cells: Cells) -> dict[str, Any]:
        return {}

    def batch_size(self, asked: int) -> int:
        if asked:
            return asked
        device, a_cell = self._model.device, self._model.activation_bytes()
        budget = int(torch.cuda.mem_get_info(device)[0] * 0.5) if device.type == "cuda" else ACTIVATION_BUDGET
        return int(np.clip(budget // a_cell, 1, min(256, self._model.largest_pass())))


def _numbers(parts: Sequence[Arriving]) -> np.ndarray:
    return np.concatenate([part.array() for part in parts])


def _run_in_parts(model: StateEncoder, staged: Staged, kept: KeptGenes, most: int) -> tuple[list[Arriving], int]:
    """Run a batch in parts of at most `most` cells; where memory runs out, halve them.

    Returns:
        Parts of (B, O + 10) float32, and the number of cells that fitted (`most`, where all did).

    Raises:
        InputError: one cell alone does not fit.
    """
    parts: list[Arriving] = []
    start = 0
    while start < len(staged):
        part = staged.part(start, start + most)
        try:
            parts.append(fetch(model.run(part, kept)))
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
    return parts, most


def _match(cells: Cells, known: Sequence[str], gene_col: str | None) -> GeneMatch:
    """Which of a file's genes the encoder knows, and by which column (which is said)."""
    try:
        match = match_genes(cells.file.var, known, given=gene_col)
    except InputError as error:
        raise InputError(f"{cells.file.path.name}: {error}") from error
    logger.info(
        f"{cells.source.path.name}: {len(match.tokens):,} of {cells.file.n_genes:,} genes are known to the encoder "
        f"({match.column})."
    )
    return match
