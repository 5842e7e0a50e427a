"""The encoder `pca`: a PCA of log1p expression, which needs no weights.

Shapes: B cells of a batch, D native width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sest.cells.inputs import Cells
from sest.encoder.base import DEFAULT_DIM
from sest.encoder.genes import GenesEncoder
from sest.encoder.projection import fit_pca

PCA = "pca"  # as --encoder names it
PCA_GENES = 2048  # of more genes, those with the largest variance are kept: time for eigenvectors grows with the cube


class PcaEncoder(GenesEncoder):
    """PCA of log1p expression: what every SE result should be held against.

    Of more than 2,048 genes those with the largest variance in the sample are kept; the PCA is exact, in float64.
    """

    name = PCA
    projection = "pca"
    default_dim = DEFAULT_DIM

    def __init__(self, genes: list[str], names: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(genes, names)
        self.native_dim = min(len(genes), PCA_GENES)

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Fit the PCA: E is `dim`, or `at_most`, or the rank of the sample."""
        if len(self.genes) > PCA_GENES:
            self._keep_most_variable(cells, sample, PCA_GENES)
        self.fitted = fit_pca((rows.toarray() for rows in self._sampled(cells, sample)), dim, at_most)

    def projection_attributes(self) -> dict[str, Any]:
        return {"genes": self.genes}
