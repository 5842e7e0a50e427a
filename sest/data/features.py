"""Perturbation features: one vector a perturbation of the data, from the sources that `--perturbations` names."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sest.cache import Cache
from sest.cache.schema import ENCODER_FOLDER
from sest.cells.labels import targets_of
from sest.config import TrainConfig
from sest.data.labels import read_labels
from sest.data.vectors import AUTO, ENCODER, GENES, ONE_HOT, Source, Vectors, absent_hint, sources_of
from sest.errors import InputError, shown

logger = logging.getLogger(__name__)


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
        InputError: unusable labels, or no folder of the encoder.
    """
    parts = sources_of(config.perturbations)
    if AUTO in parts and len(parts) > 1:
        raise InputError(f"--perturbations {AUTO} chooses the sources. Name others without it.")
    if ENCODER in parts:
        parts = [_encoder_of(cache) if part == ENCODER else part for part in parts]
    elif AUTO in parts:
        parts = [_automatic(cache, config.gene_axis)]
    return dataclasses.replace(config, perturbations="+".join(parts))


def _automatic(cache: Cache, gene_axis: str) -> str:
    """Vectors of genes, which say something of new perturbations too, where all targets have one; else columns."""
    labels, groups = read_labels(cache)[0], list(cache.groups.values())
    genes = set(groups[0].genes).intersection(*(group.genes for group in groups[1:]))
    targets = {target for name in labels.perturbations[1:] for target in targets_of(name)}
    if labels.as_is or gene_axis != "common" or not targets <= genes:
        return ONE_HOT
    logger.info(
        f"Perturbation features: {GENES}, their loadings in the control cells, as all {len(targets):,} targets are "
        f"measured genes. --perturbations {ONE_HOT} has a column of each instead."
    )
    return GENES


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
    found = {name: vectors.find(name) for name in names}
    wanted = [name for name in names[1:] if needed is None or name in needed]
    absent = [name for name in wanted if found[name] is None]
    if absent and missing == "error":
        raise InputError(
            f"{vectors.label} has no features for {len(absent)} of {len(wanted)} perturbations: {shown(absent)}."
            f"{absent_hint(absent, vectors.names)} Pass --missing-perturbations drop (leave their cells out) or zero."
        )
    if absent and len(absent) == len(wanted):
        raise InputError(
            f"{vectors.label} has features for none of the {len(absent)} perturbations. "
            f"It has, for example: {shown(vectors.names)}; the data has: {shown(absent)}."
        )
    vectors.say_what_is_made([name for name in wanted if found[name] is not None])
    zero = np.zeros(vectors.width, np.float32)
    rows = [found[name] for name in names]
    matrix = np.stack([zero if row is None else row for row in rows]).astype(np.float32)
    digest = hashlib.sha256("\n".join(names).encode() + matrix.tobytes()).hexdigest()
    return Features(tuple(names), matrix, tuple(absent), digest, vectors)
