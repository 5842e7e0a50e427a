"""The encoder `obsm:KEY`: embeddings that the files have already, of whatever model made them.

Shapes: B cells of a batch, D columns of the entry.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from sest.cells.inputs import ROWS_PER_READ, Cells, chosen_rows
from sest.encoder.align import hash_names
from sest.encoder.base import DEFAULT_DIM
from sest.encoder.projection import Projection
from sest.errors import InputError, shown

logger = logging.getLogger(__name__)

PREFIX = "obsm:"  # of what --encoder takes


class ObsmEncoder:
    """Reads the entry `key` of obsm of every file, in the place of a model.

    The same key and width is all that can be checked of two files: that one model made both is for the user to know,
    which is said.

    Args:
        key: of obsm.
        names: group -> names of all genes of its file, as the cache is to keep them.

    Raises:
        InputError: a file without that key, files with different widths, or values that are not finite.
    """

    precision = "fp32"
    n_extra = 0
    projection = "pca"
    default_dim = DEFAULT_DIM
    always_projected = False
    fitted: Projection | None = None
    max_tokens: int | None = None

    def __init__(self, key: str, cells: Sequence[Cells], names: Mapping[str, list[str]]) -> None:
        self.name = f"{PREFIX}{key}"
        self.licence: str | None = (
            f"The embeddings are those of obsm {key!r}: the licence of the model that made them applies."
        )
        self._names = dict(names)
        self._entries = {c.group: c.file.embedding(key) for c in cells}
        widths = {c.source.path.name: self._entries[c.group].shape[1] for c in cells}
        if len(set(widths.values())) > 1:
            raise InputError(
                f"obsm {key!r} has different widths: {shown(f'{n} {w}' for n, w in widths.items())}. "
                "Embed all files with one model."
            )
        self.native_dim = next(iter(widths.values()))
        self.sha256 = hash_names([self.name, str(self.native_dim)])
        self._hashes = {c.group: self._hash(c) for c in cells}
        logger.info(f"Embeddings are read from obsm {key!r} of the files, {self.native_dim} wide.")
        if len(cells) > 1:
            logger.info("That one model made them in all files cannot be checked.")

    def _hash(self, cells: Cells) -> str:
        """Hash of all embeddings of a file; they are checked on the way."""
        found = hashlib.sha256()
        for start in range(0, cells.file.n_cells, ROWS_PER_READ):
            rows = self._read(cells, np.arange(start, min(start + ROWS_PER_READ, cells.file.n_cells)))
            found.update(rows.tobytes())
        return found.hexdigest()

    def _read(self, cells: Cells, numbers: np.ndarray) -> np.ndarray:
        rows: np.ndarray = np.concatenate(chosen_rows(self._entries[cells.group].dense, numbers))
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(wrong):
            cell = int(numbers[wrong[0]])
            raise InputError(
                f"{cells.file.path}: {self.name} has NaN or an infinite value in cell {cells.file.obs.index[cell]!r} "
                f"(row {cell}). Embed that cell, or take it out."
            )
        return rows

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Nothing to fit: the embeddings are given."""

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self.stage(cells, rows, numbers)

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self._read(cells, numbers)

    def start(self, cells: Cells, staged: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: staged

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        return None

    def gene_names(self, cells: Cells) -> list[str]:
        return self._names[cells.group]

    def gene_table_sha256(self) -> str:
        return hash_names([])

    def projection_attributes(self) -> dict[str, Any]:
        return {}

    def input_identity(self, cells: Cells) -> dict[str, Any]:
        return {"embeddings_sha256": self._hashes[cells.group]}

    def batch_size(self, asked: int) -> int:
        return asked or 1024
