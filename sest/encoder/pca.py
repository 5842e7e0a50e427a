"""The encoder `pca`: a PCA of log1p expression, which needs no weights.

Shapes: B cells of a batch, D native width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse

from sest.cells.inputs import Cells
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.encoder.align import hash_names
from sest.encoder.projection import Projection, fit_pca

logger = logging.getLogger(__name__)

PCA = "pca"  # as --encoder names it
PCA_GENES = 2048  # of more genes, those with the largest variance are kept: time for eigenvectors grows with the cube
PCA_TARGET_SUM = 10_000.0  # counts are normalised to this sum before log1p
ROWS_PER_BLOCK = 2048  # of the sample, dense at once


class PcaEncoder:
    """PCA of log1p expression: what every SE result should be held against.

    Counts are normalised to 10,000 a cell and log1p-ed, log1p values are used as they are; of more than 2,048 genes
    those with the largest variance in the sample are kept; the PCA is exact, in float64.

    Args:
        genes: those that all files have.
        names: group -> names of all genes of its file; the var index, where it is not there.
    """

    name = PCA
    precision = "fp32"
    n_extra = 0
    always_projected = True
    max_tokens: int | None = None

    def __init__(self, genes: list[str], names: Mapping[str, list[str]] | None = None) -> None:
        self.genes = genes
        self._names = dict(names or {})
        self.fitted: Projection | None = None
        self.native_dim = min(len(genes), PCA_GENES)
        self.sha256 = hash_names([PCA, str(PCA_TARGET_SUM), *genes])
        self._columns: dict[str, np.ndarray] = {}

    @classmethod
    def from_projection(
        cls, genes: list[str], projection: Projection, names: Mapping[str, list[str]] | None = None
    ) -> PcaEncoder:
        """The encoder a cache or checkpoint was made with, for new cells."""
        encoder = cls(genes, names)
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
            for start in range(0, len(numbers), ROWS_PER_BLOCK):
                yield self._values(c, c.read(numbers[start : start + ROWS_PER_BLOCK]))

    def _values(self, cells: Cells, rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Log1p values of the PCA's genes: (B, genes of the file) -> (B, D) CSR float32."""
        if cells.group not in self._columns:
            place = {name: i for i, name in enumerate(self.gene_names(cells))}
            self._columns[cells.group] = np.array([place[name] for name in self.genes])
        if cells.scale == "counts":
            rows = log1p_rows(rows, factors_to(PCA_TARGET_SUM, total_counts(rows)).astype(np.float32))
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
        return self._names.get(cells.group) or list(map(str, cells.file.var.index))

    def gene_table_sha256(self) -> str:
        return hash_names(self.genes)

    def projection_attributes(self) -> dict[str, Any]:
        return {"genes": self.genes}

    def batch_size(self, asked: int) -> int:
        return asked or 1024
