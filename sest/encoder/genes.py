"""The encoder `genes`: log1p expression of the most variable genes as it is, which needs no weights.

Shapes: B cells of a batch, D genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import scipy.sparse

from sest.cells.inputs import Cells
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.encoder.align import hash_names
from sest.encoder.projection import Projection

GENES = "genes"  # as --encoder names it
DEFAULT_GENES = 2000  # as papers that compare with highly variable genes take
TARGET_SUM = 10_000.0  # counts are normalised to this sum before log1p
ROWS_PER_BLOCK = 2048  # of the sample, at once


class GenesEncoder:
    """Log1p expression of the genes with the largest variance in the sample: the control that papers compare with.

    Counts are normalised to 10,000 a cell and log1p-ed, log1p values are used as they are. The projection is the
    identity, so that caches and checkpoints keep which genes these are as they keep a PCA.

    Args:
        genes: those that all files have.
        names: group -> names of all genes of its file; the var index, where it is not there.
    """

    name: str = GENES
    precision = "fp32"
    n_extra = 0
    projection: str = "genes"
    default_dim: int = DEFAULT_GENES
    always_projected = True
    max_tokens: int | None = None
    licence: str | None = None

    def __init__(self, genes: list[str], names: Mapping[str, list[str]] | None = None) -> None:
        self.genes = genes
        self._names = dict(names or {})
        self.fitted: Projection | None = None
        self.means: np.ndarray | None = None  # (D,) of the sample
        self.native_dim = len(genes)
        self.sha256 = hash_names([self.name, str(TARGET_SUM), *genes])
        self._columns: dict[str, np.ndarray] = {}
        self._fill: np.ndarray | None = None
        self._rule = "error"

    @classmethod
    def from_projection(
        cls,
        genes: list[str],
        projection: Projection,
        names: Mapping[str, list[str]] | None = None,
        means: np.ndarray | None = None,
    ) -> Self:
        """The encoder a cache or checkpoint was made with, for new cells; `means` (D,) where it keeps them."""
        encoder = cls(genes, names)
        encoder.fitted, encoder.means, encoder.native_dim = projection, means, len(genes)
        return encoder

    def fill_missing(self, rule: str) -> None:
        """Let genes that a file lacks be "zero" (not expressed) or the "mean" of the sample this was fitted on."""
        assert self.fitted is not None
        mean = self.fitted.mean if self.means is None else self.means
        self._rule = rule
        self._fill = mean.astype(np.float32) if rule == "mean" else np.zeros(len(self.genes), np.float32)

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Choose the `dim` most variable genes, or `at_most`, or all there are."""
        variance = self._keep_most_variable(cells, sample, dim or at_most)
        self.native_dim = n = len(self.genes)
        share = variance / max(float(variance.sum()), np.finfo(np.float64).tiny)
        self.fitted = Projection(np.zeros(n, np.float32), np.eye(n, dtype=np.float32), share.astype(np.float32))

    def _keep_most_variable(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], n: int) -> np.ndarray:
        """Keep n genes, in their order; returns their variances (n,) and sets their means."""
        count, total, squares = 0, np.zeros(len(self.genes)), np.zeros(len(self.genes))
        for rows in self._sampled(cells, sample):
            count += rows.shape[0]
            total += np.asarray(rows.sum(0), dtype=np.float64).ravel()
            squares += np.asarray(rows.astype(np.float64).power(2).sum(0)).ravel()
        variance = squares / count - (total / count) ** 2
        kept = np.sort(np.argsort(-variance, kind="stable")[:n])
        self.genes = [self.genes[i] for i in kept]
        self.means = (total / count)[kept]
        self._columns.clear()
        return variance[kept]

    def _sampled(self, cells: Sequence[Cells], sample: Sequence[np.ndarray]) -> Iterator[scipy.sparse.csr_matrix]:
        for c, numbers in zip(cells, sample, strict=True):
            for start in range(0, len(numbers), ROWS_PER_BLOCK):
                yield self._values(c, c.read(numbers[start : start + ROWS_PER_BLOCK]))

    def _values(self, cells: Cells, rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        """Log1p values of the genes: (B, genes of the file) -> (B, D) CSR float32; of a gene it lacks, nothing."""
        columns = self._columns_of(cells)
        if cells.scale == "counts":
            rows = log1p_rows(rows, factors_to(TARGET_SUM, total_counts(rows)).astype(np.float32))
        if (columns >= 0).all():
            return rows[:, columns]
        there = scipy.sparse.identity(len(columns), np.float32, format="csr")[columns >= 0]
        return (rows[:, columns[columns >= 0]] @ there).tocsr()

    def _columns_of(self, cells: Cells) -> np.ndarray:
        """(D,) where each gene is in a file; -1: it lacks it, which `fill_missing` allowed."""
        if cells.group not in self._columns:
            place = {name: i for i, name in enumerate(self.gene_names(cells))}
            self._columns[cells.group] = np.array([place.get(name, -1) for name in self.genes])
        columns = self._columns[cells.group]
        assert self._fill is not None or (columns >= 0).all(), cells.group
        return columns

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        return self.start(cells, self.stage(cells, rows, numbers))()

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> scipy.sparse.csr_matrix:
        return self._values(cells, rows)

    def start(self, cells: Cells, staged: scipy.sparse.csr_matrix) -> Callable[[], np.ndarray]:
        return partial(self._dense, cells, staged)

    def _dense(self, cells: Cells, staged: scipy.sparse.csr_matrix) -> np.ndarray:
        values = staged.toarray()
        if self._fill is not None:
            missing = self._columns_of(cells) < 0
            values[:, missing] = self._fill[missing]
        return values

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        return None

    def gene_names(self, cells: Cells) -> list[str]:
        return self._names.get(cells.group) or list(map(str, cells.file.var.index))

    def gene_table_sha256(self) -> str:
        return hash_names(self.genes)

    def projection_attributes(self) -> dict[str, Any]:
        means = {} if self.means is None else {"means": [float(mean) for mean in self.means]}  # older caches have none
        return {"genes": self.genes, **means}

    def input_identity(self, cells: Cells) -> dict[str, Any]:
        if self._fill is None or not (missing := int((self._columns_of(cells) < 0).sum())):
            return {}
        return {"missing_genes": {"taken_for": self._rule, "n": missing}}

    def batch_size(self, asked: int) -> int:
        return asked or 1024
