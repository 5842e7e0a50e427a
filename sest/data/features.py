"""Perturbation features: one vector a perturbation, from a file or one-hot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sest.errors import InputError, nearest, shown
from sest.untrusted.tensors import read_vectors

ONE_HOT = "onehot"


@dataclass(frozen=True, eq=False)
class Features:
    """Feature vectors of the perturbations of a run; row 0 is the control."""

    names: tuple[str, ...]  # (R,) names[0] is the control
    matrix: np.ndarray  # (R, P) float32; the control's row is zero unless the file has one for it
    missing: tuple[str, ...]  # perturbations of the data without a vector (dropped, or zero)
    sha256: str  # of names and vectors
    source: str  # "onehot" or the file's name

    @property
    def width(self) -> int:
        return int(self.matrix.shape[1])

    def as_mapping(self) -> dict[str, np.ndarray]:
        """Name -> (P,), without the control."""
        return dict(zip(self.names[1:], self.matrix[1:], strict=True))


def load_features(path: Path) -> dict[str, np.ndarray]:
    """Read vectors by name, each (P,) float32, from `.pt` (a dict), `.npz` or `.safetensors`, in the file's order.

    Raises InputError unless all are one-dimensional, equally long and finite.
    """
    names, vectors = read_vectors(path)
    return dict(zip(names, vectors.numpy(), strict=True))


def absent_hint(absent: Sequence[str], vectors: Mapping[str, object]) -> str:
    """What to do about perturbations that `vectors` lacks: a sentence with a space before it, or nothing.

    Combinations such as A+B of perturbations that it has could be built from these; else the nearest names.
    """
    parts = {name: [part.strip() for part in name.split("+")] for name in absent}
    built = [name for name in absent if len(parts[name]) > 1 and all(part in vectors for part in parts[name])]
    if not built:
        return nearest(absent[0], vectors)
    first = built[0]
    return (
        f" {len(built)} of them {'is a combination' if len(built) == 1 else 'are combinations'} of perturbations that "
        f"have vectors: {first} could be built from {' and '.join(parts[first])}, for example as their sum, and added "
        "to the file."
    )


def equal_vectors(names: Iterable[str], vectors: Iterable[np.ndarray]) -> list[list[str]]:
    """Names whose vectors (P,) are the same numbers, at least two a list, in the given order."""
    alike: dict[bytes, list[str]] = {}
    for name, vector in zip(names, vectors, strict=True):
        alike.setdefault((vector + 0.0).tobytes(), []).append(name)  # -0.0 is 0.0
    return [group for group in alike.values() if len(group) > 1]


def make_features(source: str, names: Sequence[str], missing: str, *, needed: Set[str] | None = None) -> Features:
    """Features for `names` (the first is the control).

    Args:
        source: "onehot" (one column a perturbation, in the given order), or a .pt, .npz or .safetensors file.
        names: control and perturbations, as the data names them.
        missing: "error", "drop" or "zero": what to do with perturbations the file does not have.
        needed: the perturbations that must have a vector; all of `names` without it.

    Raises:
        InputError: vectors missing (listed, with the nearest names).
    """
    if source == ONE_HOT:
        matrix = np.zeros((len(names), len(names) - 1), np.float32)
        matrix[np.arange(1, len(names)), np.arange(len(names) - 1)] = 1.0
        absent: list[str] = []
    else:
        vectors = load_features(Path(source))
        wanted = names[1:] if needed is None else [name for name in names[1:] if name in needed]
        absent = [name for name in wanted if name not in vectors]
        if absent and missing == "error":
            raise InputError(
                f"{source} has no features for {len(absent)} of {len(wanted)} perturbations: {shown(absent)}."
                f"{absent_hint(absent, vectors)} Pass --missing-perturbations drop (leave their cells out) or zero."
            )
        if absent and len(absent) == len(wanted):
            raise InputError(
                f"{source} has features for none of the {len(absent)} perturbations. "
                f"It has, for example: {shown(vectors)}; the data has: {shown(absent)}."
            )
        zero = np.zeros_like(next(iter(vectors.values())))
        matrix = np.stack([vectors.get(name, zero) for name in names]).astype(np.float32)
    digest = hashlib.sha256("\n".join(names).encode() + matrix.tobytes()).hexdigest()
    return Features(tuple(names), matrix, tuple(absent), digest, source if source == ONE_HOT else Path(source).name)
