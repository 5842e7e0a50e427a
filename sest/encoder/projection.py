"""The PCA that turns native embeddings into vectors of the stored width.

Shapes: N sampled cells, D native width, E stored width. Fitted in float64 from a covariance matrix, so that the result
does not depend on the order or size of the blocks beyond rounding; components have a fixed sign.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from sest.errors import InputError

RANK_TOLERANCE = 1e-10  # eigenvalues below this share of the largest are rounding, not structure
ROUNDING = 1e-12  # a spread below this share of the mean is float64's rounding: every cell is the same


@dataclass(frozen=True)
class Projection:
    """y = (x - mean) @ basis."""

    mean: np.ndarray  # (D,) float32
    basis: np.ndarray  # (D, E) float32, orthonormal columns
    explained_variance: np.ndarray  # (E,) float32, share of the total variance

    def apply(self, native: np.ndarray) -> np.ndarray:
        """(n, D) float32 -> (n, E) float32."""
        return (native - self.mean) @ self.basis

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the names under which caches and checkpoints keep them."""
        return {"mean": self.mean, "basis": self.basis, "explained_variance": self.explained_variance}

    @property
    def sha256(self) -> str:
        """Hash of mean and basis, by which a checkpoint and a cache know they belong together."""
        return hashlib.sha256(self.mean.tobytes() + np.ascontiguousarray(self.basis).tobytes()).hexdigest()


def fit_pca(blocks: Iterable[np.ndarray], dim: int | None, at_most: int = 512) -> Projection:
    """Fit a PCA on blocks of (n, D) rows, read once.

    Args:
        blocks: float arrays with D columns.
        dim: E; None for `at_most`, or the rank of the sample where that is smaller.
        at_most: E where `dim` is None.

    Raises:
        InputError: `dim` is above the rank of the sample, or there are fewer than two cells.
    """
    count, total, cross = 0, None, None
    for block in blocks:
        if not len(block):
            continue
        x = np.asarray(block, dtype=np.float64)
        if total is None or cross is None:
            total, cross = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
            shift = x.mean(0)  # near the mean: the cross product then loses few digits
        x = x - shift
        count += len(x)
        total += x.sum(0)
        cross += x.T @ x
    if total is None or cross is None or count < 2:
        raise InputError("A PCA needs at least two cells to be fitted on.")
    mean = total / count
    covariance = (cross - count * np.outer(mean, mean)) / (count - 1)
    variances, vectors = scipy.linalg.eigh(covariance)
    variances, vectors = variances[::-1], vectors[:, ::-1]
    mean += shift
    if variances[0] <= ROUNDING**2 * (mean @ mean):
        raise InputError("A PCA cannot be fitted: all sampled cells are the same.")
    rank = min(int((variances > variances[0] * RANK_TOLERANCE).sum()), count - 1)
    if dim is None:
        dim = min(at_most, rank)
    if dim > rank:
        raise InputError(
            f"--dim {dim} is above the rank of the data ({rank}, from {count} cells). Use --dim {rank} or less."
        )
    basis = vectors[:, :dim]
    signs = np.sign(basis[np.abs(basis).argmax(0), np.arange(dim)])
    return Projection(
        mean=mean.astype(np.float32),
        basis=np.ascontiguousarray(basis * signs, dtype=np.float32),
        explained_variance=(variances[:dim] / variances.clip(0).sum()).astype(np.float32),
    )
