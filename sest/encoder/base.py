"""What `sest embed` asks of an encoder; state, pca, genes and obsm have one each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse

from sest.cells.inputs import Cells
from sest.encoder.projection import Projection

DEFAULT_DIM = 512  # columns of a stored embedding


class CellEncoder(Protocol):
    """What `sest.embedding.embed` needs of an encoder. B cells, D = native_dim."""

    name: str
    sha256: str
    precision: str
    native_dim: int
    n_extra: int  # columns after the native ones (SE: 10 dataset columns)
    projection: str  # what stands between it and the cache where it is projected: "pca", or "genes" (a choice)
    default_dim: int  # columns that are stored unless --dim says otherwise
    always_projected: bool
    fitted: Projection | None  # set by `prepare` where fitting needs no encoding
    max_tokens: int | None  # where sentences are cut to fewer tokens than the encoder was trained with

    licence: str | None  # of the embeddings, one line

    def prepare(self, cells: Sequence[Cells], sample: Sequence[np.ndarray], dim: int | None, at_most: int) -> None:
        """Fit on the sampled rows of every file, where the encoder is fitted and not loaded."""

    def encode(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> np.ndarray:
        """(B, genes of the file) CSR and (B,) row numbers -> (B, D + n_extra) float32: `stage`, then `start`."""

    def stage(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> Any:
        """Prepare a batch for `start`; any thread may do it while another one encodes."""

    def start(self, cells: Cells, staged: Any) -> Callable[[], np.ndarray]:
        """Begin to encode what `stage` prepared; what is returned gives (B, D + n_extra) float32.

        A GPU computes meanwhile; on a CPU nothing is computed before the numbers are asked for.
        """

    def fidelity(self, cells: Cells, rows: scipy.sparse.csr_matrix, numbers: np.ndarray) -> dict[str, float] | None:
        """How well approximate embeddings of these cells point where exact ones do; None where they are exact."""

    def gene_names(self, cells: Cells) -> list[str]:
        """Names of all genes of a file, as the cache keeps them."""

    def gene_table_sha256(self) -> str:
        """Hash of the genes the encoder reads, in its order."""

    def projection_attributes(self) -> dict[str, Any]:
        """What must be kept with the projection to encode new cells."""

    def input_identity(self, cells: Cells) -> dict[str, Any]:
        """What else of a file must be the same for a cache to be continued with it."""

    def batch_size(self, asked: int) -> int:
        """Cells a forward pass; `asked` unless it is 0."""
