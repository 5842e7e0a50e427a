"""PCA encoders fitted on all cells of open files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sest.cells.inputs import Cells
from sest.encoder.align import common_genes, name_genes
from sest.encoder.pca import PcaEncoder


def shared(cells: Sequence[Cells]) -> list[str]:
    return common_genes(cells, name_genes(cells, None))


def everything(cells: Sequence[Cells]) -> list[np.ndarray]:
    return [np.arange(c.file.n_cells) for c in cells]


def fitted(cells: Sequence[Cells], dim: int) -> PcaEncoder:
    """An encoder of the files' common genes, fitted on all their cells."""
    names = name_genes(cells, None)
    encoder = PcaEncoder(common_genes(cells, names), names)
    encoder.prepare(cells, everything(cells), dim, dim)
    return encoder
