"""Perturbation features: one vector a perturbation of the data, from the sources that `--perturbations` names."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import mmap
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from sest.cache import Cache
from sest.cache.schema import ENCODER_FOLDER
from sest.cells.labels import targets_of
from sest.config import TrainConfig
from sest.data.labels import read_labels
from sest.data.targets import Targets
from sest.data.vectors import AUTO, ENCODER, GENES, ONE_HOT, WORDS, Source, Vectors, absent_hint, sources_of
from sest.errors import InputError, nearest, nearest_file, shown

logger = logging.getLogger(__name__)

WIDTH = 64  # components of the genes' vectors, fewer where the cells have fewer
MOST_CELLS = 8192
_STREAM = 11  # what a random stream is for


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of the perturbations of a run; row 0 is the control."""

    names: tuple[str, ...]  # (R,) names[0] is the control
    matrix: np.ndarray  # (R, P) float32; the control's row is zero unless a file has one for it
    missing: tuple[str, ...]  # perturbations of the data without a vector (dropped, or zero)
    sha256: str  # of names and vectors
    vectors: Vectors  # where they are from, which may have more

    @property
    def source(self) -> str:
        """What the sources are called: "onehot", "genes", the file's name, or several joined by "+"."""
        return self.vectors.label

    @property
    def width(self) -> int:
        return int(self.matrix.shape[1])

    def as_mapping(self) -> dict[str, np.ndarray]:
        """Name -> (P,), without the control."""
        return dict(zip(self.names[1:], self.matrix[1:], strict=True))

    def never_learned(self, trained: Sequence[str]) -> list[str]:
        """Perturbations that training on those in `trained` can say nothing about.

        Those for which a vector of zeros stands in, and those of which only one-hot columns are known, some of which no
        trained perturbation has: these get no gradient.
        """
        seen = {column for name in trained for column in self.vectors.columns_of(name)}
        return [
            name
            for name in self.names[1:]
            if name in self.missing
            or (self.vectors.has_only_a_column(name) and not seen.issuperset(self.vectors.columns_of(name)))
        ]


@dataclass(frozen=True)
class StoredFeatures:
    """What a checkpoint keeps of its features, as it cannot be had again from a file."""

    names: tuple[str, ...] | None  # of a run with one-hot columns: its perturbations, the control first
    columns: tuple[str, ...] | None  # what these columns stand for, where that is not one perturbation each
    loadings: Source | None  # vectors of the genes


def with_sources(config: TrainConfig, cache: Cache) -> TrainConfig:
    """The configuration with sources that can be read, where it has words that depend on the cache; says which.

    Raises:
        InputError: unusable labels, a source that is neither a word nor a file, or no folder of the encoder.
    """
    parts = sources_of(config.perturbations)
    for part in parts:
        if part not in (words := (AUTO, *WORDS, ENCODER)) and not Path(part).exists():
            raise InputError(
                f"No perturbation features {part!r}: no file has that name, and without a file there are "
                f"{', '.join(words)}.{nearest(part, words) or nearest_file(part)}"
            )
    if AUTO in parts and len(parts) > 1:
        raise InputError(f"--perturbations {AUTO} chooses the sources. Name others without it.")
    if ENCODER in parts:
        parts = [_encoder_of(cache) if part == ENCODER else part for part in parts]
    elif AUTO in parts:
        parts = [_automatic(cache, config.gene_axis)]
    return dataclasses.replace(config, perturbations="+".join(parts))


def _automatic(cache: Cache, gene_axis: str) -> str:
    """The source that `auto` stands for, which is said."""
    labels, groups = read_labels(cache)[0], list(cache.groups.values())
    genes = set(groups[0].genes).intersection(*(group.genes for group in groups[1:]))
    source, why = automatic_source(labels.perturbations[1:], genes, as_is=labels.as_is, gene_axis=gene_axis)
    logger.info(why)
    return source


def automatic_source(
    perturbations: Iterable[str], genes: Set[str], *, as_is: bool = False, gene_axis: str = "common"
) -> tuple[str, str]:
    """What `auto` stands for, and why: vectors of genes where all targets have one, as they speak of new ones too.

    Args:
        perturbations: their names, without the control.
        genes: those that all files measure.
        as_is: labels stand for themselves, and name no targets.
        gene_axis: as in TrainConfig.
    """
    targets = {target for name in perturbations for target in targets_of(name)}
    if as_is:
        why = "labels are taken as they are"
    elif gene_axis != "common":
        why = "files have genes of their own"
    elif others := sorted(targets - genes):
        why = f"{len(others):,} of {len(targets):,} targets are no measured genes ({shown(others, 3)})"
    else:
        return GENES, (
            f"Perturbation features: {GENES}, their loadings in the control cells, as all {len(targets):,} targets are "
            f"measured genes. --perturbations {ONE_HOT} has a column of each instead."
        )
    return ONE_HOT, (
        f"Perturbation features: {ONE_HOT}, a column of each, as {why}. That says nothing of perturbations that do not "
        "train; --perturbations takes a file that does."
    )


def _encoder_of(cache: Cache) -> str:
    """The folder of the SE encoder that made a cache."""
    folder = cache.attributes.get(ENCODER_FOLDER)
    if folder is None:
        raise InputError(f"{cache.path} does not say where an SE encoder is. Pass its folder as --perturbations.")
    if not Path(folder).is_dir():
        raise InputError(f"The encoder of {cache.path} was in {folder}, which is not there. Pass --perturbations.")
    return str(folder)


def equal_vectors(names: Iterable[str], vectors: Iterable[np.ndarray]) -> list[list[str]]:
    """Names whose vectors (P,) are the same numbers, at least two a list, in the given order."""
    alike: dict[bytes, list[str]] = {}
    for name, vector in zip(names, vectors, strict=True):
        alike.setdefault((vector + 0.0).tobytes(), []).append(name)  # -0.0 is 0.0
    return [group for group in alike.values() if len(group) > 1]


def make_features(vectors: Vectors, names: Sequence[str], missing: str, *, needed: Set[str] | None = None) -> Features:
    """Features for `names` (the first is the control).

    Args:
        vectors: where they are from.
        names: control and perturbations, as the data names them.
        missing: "error", "drop" or "zero": what to do with perturbations no source has.
        needed: the perturbations that must have a vector; all of `names` without it.

    Raises:
        InputError: vectors missing (listed, with the nearest names).
    """
    matrix, has = _zeros(len(names), vectors.width), set()
    for row, name in enumerate(names):
        if (vector := vectors.find(name)) is not None:
            np.copyto(matrix[row], vector, where=vector != 0)
            has.add(name)
    wanted = [name for name in names[1:] if needed is None or name in needed]
    absent = [name for name in wanted if name not in has]
    if absent and missing == "error":
        near = absent_hint(absent, vectors.names) if len(absent) < len(wanted) else ""  # names of one kind
        sides = f" It has, for example: {shown(vectors.names, 3)}; the data has: {shown(wanted, 3)}."
        raise InputError(
            f"{vectors.label} has no features for {len(absent)} of {len(wanted)} perturbations: {shown(absent)}."
            f"{near or sides} "
            "Pass --missing-perturbations drop (leave their cells out) or zero."
        )
    if absent and len(absent) == len(wanted):
        raise InputError(
            f"{vectors.label} has features for none of the {len(absent)} perturbations. "
            f"It has, for example: {shown(vectors.names)}; the data has: {shown(absent)}."
        )
    vectors.say_what_is_made([name for name in wanted if name in has])
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(matrix.data)
    return Features(tuple(names), matrix, tuple(absent), digest.hexdigest(), vectors)


def _zeros(n: int, width: int) -> np.ndarray:
    """(n, width) float32 zeros that take memory where another number is written: one-hot rows are nearly all zeros.

    In small pages, each of which is there once it is written to; NumPy asks for pages of 2 MB.
    """
    if not n * width:
        return np.zeros((n, width), np.float32)
    pages = mmap.mmap(-1, n * width * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.float32).reshape(n, width)


def gene_loadings(targets: Targets, rows: np.ndarray, context: np.ndarray, seed: int) -> Source:
    """Vectors for genes from the cells themselves: which genes vary together in the controls.

    A gene's vector are its loadings in the principal components of the controls' log1p expression, so that a
    perturbation of a measured gene has features without any file. As in Ahlmann-Eltze et al. 2025 ("Deep-learning-based
    gene perturbation effect prediction does not yet outperform simple linear baselines"), whose linear model reads such
    vectors. n control cells, G genes, W components.

    Args:
        rows: (n,) the control cells of the training split; a seeded sample of 8,192 of more.
        context: (n,) codes; every context is centred by itself, as differences between contexts are no co-variation.

    Returns:
        (G, W): the components (columns of length 1) times the square root of G, so that an entry is about 1. Signs: the
        largest entry of each component is positive.

    Raises:
        InputError: fewer than three control cells, or all the same.
    """
    if len(rows) > MOST_CELLS:
        chosen = np.sort(np.random.default_rng([seed, _STREAM]).choice(len(rows), MOST_CELLS, replace=False))
        rows, context = rows[chosen], context[chosen]
    x = targets.log1p(rows).astype(np.float64)
    contexts, code = np.unique(context, return_inverse=True)
    member = scipy.sparse.csr_matrix((np.ones(len(rows)), (code, np.arange(len(rows)))))
    means = np.asarray((member @ x).todense()) / np.bincount(code)[:, None]
    width = min(WIDTH, len(rows) - len(contexts), x.shape[1] - 1)
    if width < 1:
        raise InputError(f"--perturbations genes needs more than {len(rows)} control cells and {x.shape[1]} genes.")
    centred = scipy.sparse.linalg.LinearOperator(
        x.shape,
        dtype=np.float64,
        matvec=lambda v: x @ v.ravel() - (means @ v.ravel())[code],
        rmatvec=lambda u: x.T @ u.ravel() - means.T @ (member @ u.ravel()),
    )
    if x.multiply(x).sum() - (np.bincount(code)[:, None] * means**2).sum() <= 1e-12 * x.multiply(x).sum():
        raise InputError("--perturbations genes: the control cells of each cell type are all the same.")
    start = np.random.default_rng([seed, _STREAM]).normal(size=min(x.shape))
    _, sizes, components = scipy.sparse.linalg.svds(centred, width, v0=start)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 1e-6 * sizes.max()]
    basis = components[order].T
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(len(order))])
    matrix = (basis * np.sqrt(len(basis))).astype(np.float32)
    return Source(GENES, {name: i for i, name in enumerate(targets.genes)}, matrix)
