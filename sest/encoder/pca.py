"""PCA: the projection of native embeddings to the stored width, and the whole work of the `pca` encoder.

Shapes: N sampled cells, B cells of a batch, D native width, E stored width. Fitted in float64 from a covariance matrix,
so that the result does not depend on the order or size of the blocks beyond rounding; components have a fixed sign.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse

from sest.cells.columns import INDEX, agreeing_names, gene_names, names_as_known, unnamed_genes
from sest.cells.inputs import Cells, named
from sest.cells.scale import factors_to, log1p_rows, total_counts
from sest.errors import InputError, shown

logger = logging.getLogger(__name__)

PCA = "pca"  # as --encoder names it
PCA_GENES = 2048  # of more genes, those with the largest variance are kept: time for eigenvectors grows with the cube
PCA_TARGET_SUM = 10_000.0  # counts are normalised to this sum before log1p
ROWS_PER_BLOCK = 2048  # of the sample, dense at once
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


def name_genes(cells: Sequence[Cells], gene_col: str | None) -> dict[str, list[str]]:
    """Group -> the names of its file's genes, so that the same gene has the same name in all files.

    Args:
        gene_col: the var column with the names; None: see `agreeing_names`.

    Raises:
        InputError: of several files one does not name its genes.
    """
    found = agreeing_names([c.file.var for c in cells], gene_col)
    for c, names in zip(cells, found, strict=True):
        if not names.are_numbers or gene_col is not None:
            continue
        if len(cells) > 1:
            raise unnamed_genes(c.source.path)
        logger.info(f"{c.source.path.name}: its genes have no names, only numbers: no other file can be used with it.")
    return {c.group: named(c, names) for c, names in zip(cells, found, strict=True)}


def name_genes_as(
    cells: Sequence[Cells], known: Sequence[str], whose: str, gene_col: str | None, advice: str = ""
) -> dict[str, list[str]]:
    """As `name_genes`, for files whose genes are to be found among the `known` ones of an earlier file.

    Args:
        whose: genes `known` are; for messages, as is `advice`.

    Raises:
        InputError: they are not, or these are numbers, which say nothing of another file.
    """
    result = {}
    for c in cells:
        names = names_as_known(c.file.var, known, gene_col)
        if names.are_numbers and gene_col is None:
            raise unnamed_genes(c.source.path)
        result[c.group] = named(c, names)
        there = set(result[c.group])
        if missing := [name for name in known if name not in there]:
            tried = shown((INDEX, *map(str, c.file.var.columns)))
            raise InputError(
                f"{c.file.path} lacks {len(missing):,} of the {len(known):,} genes of {whose}: {shown(missing)}."
                f"{advice} Its genes are {shown(names.names[:3])}; tried: {tried}."
            )
    return result


def common_genes(cells: Sequence[Cells], names: Mapping[str, Sequence[str]]) -> list[str]:
    """Genes that every file has, in the order of the first; `names` as of `name_genes`.

    Raises:
        InputError: the files have none in common.
    """
    first = names[cells[0].group]
    shared = set(first).intersection(*(names[c.group] for c in cells[1:]))
    genes = [name for name in first if name in shared]
    if not genes:
        raise InputError(f"The files have no gene in common: {shown(map(_examples, cells))}.")
    if len(genes) < max(c.file.n_genes for c in cells):
        logger.info(f"The PCA uses the {len(genes):,} genes that all files have.")
    return genes


def _examples(cells: Cells) -> str:
    """A file's gene names, and the columns that may name them."""
    own = gene_names(cells.file.var)
    columns = [INDEX, *map(str, cells.file.var.columns)]
    return f"{cells.source.path.name} has {shown(own.names[:3])} (tried: {shown(columns)})"


def hash_names(names: Sequence[str]) -> str:
    """The SHA-256 of names and their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
