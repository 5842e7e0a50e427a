"""Where feature vectors come from: files, the genes of the cells, one-hot columns, drugs, or several side by side.

W: width of one source, P: width of all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sest.cells.labels import targets_of
from sest.cells.treatments import Treatment, treatments_of
from sest.errors import InputError, nearest, shown
from sest.untrusted.tensors import read_vectors

logger = logging.getLogger(__name__)

ONE_HOT, GENES, DRUGS = "onehot", "genes", "drugs"
WORDS = (ONE_HOT, GENES, DRUGS)  # sources that are no files
AUTO, ENCODER = "auto", "encoder"  # words for sources that depend on the cache: see `sest.data.features.with_sources`
COLUMNS = (ONE_HOT, DRUGS)  # those that know a name by its column alone, of which only training says anything
DECADE = 0.25  # what ten times the dose, or the time, adds, so that doses of one drug stay alike (cosine)
DAY = 24.0  # hours, where a label says none
UNITS = {"pM": 1e-6, "nM": 1e-3, "uM": 1.0, "mM": 1e3, "M": 1e6, "ng/ml": 1e-3, "ug/ml": 1.0, "mg/ml": 1e3, "g/ml": 1e6}
PROTEINS = "protein_embeddings.pt"  # in the folder of an SE encoder


def sources_of(text: str) -> list[str]:
    """The sources that `--perturbations` names: one, or several joined by "+".

    Raises:
        InputError: one is named twice, or none at all.
    """
    parts = [text] if Path(text).exists() else [part.strip() for part in text.split("+")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise InputError(f"--perturbations {text!r} must name different sources, joined by +.")
    return parts


def source_files(text: str) -> list[Path]:
    """The files that `--perturbations` names; of an SE folder its protein embeddings."""
    paths = [Path(part) for part in sources_of(text) if part not in (*WORDS, AUTO, ENCODER)]
    return [path / PROTEINS if path.is_dir() else path for path in paths]


def resolved(text: str) -> str:
    """The same sources with absolute paths."""
    return "+".join(part if part in WORDS else str(Path(part).resolve()) for part in sources_of(text))


def label_of(text: str) -> str:
    """What the sources are called where it does not matter in which folder they lie."""
    return "+".join(part if part in WORDS else Path(part).name for part in sources_of(text))


@dataclass(frozen=True, eq=False)
class Source:
    """Vectors of one source by name."""

    name: str  # onehot, genes, or the file's name
    rows: Mapping[str, int]  # name -> row of `matrix`
    matrix: np.ndarray  # (n, W) float32; (0, W) of columns, whose vectors are made from the names

    @property
    def width(self) -> int:
        return int(self.matrix.shape[1])

    @cached_property
    def _by_targets(self) -> dict[frozenset[str], int]:
        """The rows of combinations by their targets, so that B+A is A+B."""
        return {frozenset(targets_of(name)): row for name, row in self.rows.items() if "+" in name}

    def _row(self, name: str) -> int | None:
        return self.rows.get(name, self._by_targets.get(frozenset(targets_of(name))))

    def is_sum(self, name: str) -> bool:
        """Whether a combination has no vector of its own, but all of its targets have one."""
        parts = targets_of(name)
        return self._row(name) is None and parts not in ((), (name,)) and all(part in self.rows for part in parts)

    def _rows(self, name: str) -> list[int] | None:
        """The rows that add up to the vector of a name; None where it has none."""
        if (row := self._row(name)) is not None:
            return [row]
        if self.is_sum(name):
            return [self.rows[part] for part in targets_of(name)]
        if self.is_of_drugs(name):
            return [self.rows[treatment.drug] for treatment in treatments_in(name)]
        return None

    def find(self, name: str) -> np.ndarray | None:
        """(W,): its vector, or of a combination the sum of its targets' vectors; None where there is neither."""
        rows = self._rows(name)
        return None if rows is None else np.asarray(self.matrix[rows].sum(0))

    def is_of_drugs(self, name: str) -> bool:
        """Whether a drug and its dose have no vector of their own, but the drug has one."""
        treatments = treatments_in(name)
        return self._row(name) is None and bool(treatments) and all(t.drug in self.rows for t in treatments)

    def columns_of(self, name: str) -> list[str]:
        """What the columns of a name stand for, of a source of `COLUMNS`."""
        return [name] if name in self.rows else list(targets_of(name))


class OneHot(Source):
    """A column each, whose vectors of ones and zeros are made when they are asked for."""

    def find(self, name: str) -> np.ndarray | None:
        """(W,), see `Source.find`."""
        if (rows := self._rows(name)) is None:
            return None
        vector = np.zeros(self.width, np.float32)
        np.add.at(vector, rows, 1.0)
        return vector


@dataclass(frozen=True, eq=False)
class Drugs(Source):
    """Columns a drug: that it is there, the logarithm of its dose, and perhaps that of its time. See `drugs_of`."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What the columns say, one block of all drugs after another."""
        return ("given", "dose", "time")[: self.width // max(len(self.rows), 1)]

    def find(self, name: str) -> np.ndarray | None:
        """(W,): the sum over the drugs of a label; without a dose as at 1 uM, without a time as after a day.

        None where one is another drug, or the label says a time and those that made the columns did not.
        """
        found = treatments_in(name) or tuple(Treatment(part, 1.0, "uM") for part in targets_of(name))
        if not found or any(treatment.drug not in self.rows for treatment in found):
            return None
        if "time" not in self.parts and any(treatment.hours is not None for treatment in found):
            return None
        vector = np.zeros(self.width, np.float32)
        for treatment in found:
            place = self.rows[treatment.drug]
            vector[place] += 1.0
            if treatment.dose > 0:
                vector[len(self.rows) + place] += DECADE * np.log10(treatment.dose * UNITS[_unit(treatment)])
            if treatment.hours:
                vector[2 * len(self.rows) + place] += DECADE * np.log10(treatment.hours / DAY)
        return vector

    def is_sum(self, name: str) -> bool:
        return False

    def columns_of(self, name: str) -> list[str]:
        return [treatment.drug for treatment in treatments_in(name)] or list(targets_of(name))


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of all sources, side by side."""

    label: str  # see `label_of`
    sources: tuple[Source, ...]

    @property
    def width(self) -> int:
        return sum(source.width for source in self.sources)

    @property
    def names(self) -> list[str]:
        """All names that have a vector of their own in a source."""
        return list(dict.fromkeys(name for source in self.sources for name in source.rows))

    def of(self, name: str) -> Source | None:
        """The source of this name; None where there is none."""
        return next((source for source in self.sources if source.name == name), None)

    @property
    def one_hot(self) -> slice | None:
        """Which of the P columns are one-hot, or of drugs."""
        at = 0
        for source in self.sources:
            if source.name in COLUMNS:
                return slice(at, at + source.width)
            at += source.width
        return None

    def find(self, name: str) -> np.ndarray | None:
        """(P,) with zeros for the sources that do not have the name; None where none has it."""
        found = [source.find(name) for source in self.sources]
        if all(vector is None for vector in found):
            return None
        pairs = zip(found, self.sources, strict=True)
        return np.concatenate([np.zeros(s.width, np.float32) if v is None else v for v, s in pairs])

    def columns_of(self, name: str) -> list[str]:
        """What the columns of a perturbation stand for, where a source knows it by these alone."""
        return [column for source in self.sources if source.name in COLUMNS for column in source.columns_of(name)]

    def say_what_is_made(self, names: Sequence[str]) -> None:
        """Say which of the names, all found, get a sum or zeros in a source."""
        for source in self.sources:
            sums = [name for name in names if source.is_sum(name)]
            if sums and source.name != ONE_HOT:
                logger.info(
                    f"{len(sums)} combinations get the sum of their targets' vectors in {source.name}: {shown(sums)}."
                )
            if drugs := [name for name in names if source.name not in WORDS and source.is_of_drugs(name)]:
                logger.info(f"{len(drugs)} doses get the vector of their drug in {source.name}: {shown(drugs)}.")
            if lacks := [name for name in names if source.find(name) is None]:
                logger.info(f"{source.name} has no vector for {len(lacks)} perturbations, zeros there: {shown(lacks)}.")

    def has_only_a_column(self, name: str) -> bool:
        """Whether nothing is known of a name but which one it is."""
        return all(source.name in COLUMNS or source.find(name) is None for source in self.sources)


def one_hot(names: Sequence[str], columns: Sequence[str] | None = None) -> Source:
    """One column a target of the perturbations `names`, so that a combination has those of its targets.

    Args:
        columns: what the columns stand for instead, in their order.
    """
    if columns is None:
        columns = list(dict.fromkeys(target for name in names for target in targets_of(name)))
    return OneHot(ONE_HOT, {name: i for i, name in enumerate(columns)}, np.empty((0, len(columns)), np.float32))


def treatments_in(name: str) -> tuple[Treatment, ...]:
    """The drugs and doses of a label, or of all parts of a combination; () where one has none."""
    parts = [treatments_of(part) for part in targets_of(name)]
    if len(parts) > 1 and all(parts):
        return tuple(treatment for part in parts for treatment in part)
    return treatments_of(name)


def drugs_of(names: Sequence[str]) -> Drugs:
    """Columns for the drugs of labels such as [('Trametinib', 0.05, 'uM')], Nutlin-3a_0.5uM or Nutlin-3a_0.5uM_48h.

    Columns of times are there where a label says one.

    Raises:
        InputError: no label names a dose, or one has a unit that is not known.
    """
    found = [treatment for name in names for treatment in treatments_in(name)]
    if not found:
        raise InputError(
            "--perturbations drugs reads labels such as [('Trametinib', 0.05, 'uM')] or Nutlin-3a_0.5uM; the data has: "
            f"{shown(names)}."
        )
    for treatment in found:
        if _unit(treatment) not in UNITS:
            raise InputError(
                f"{treatment.drug}: {treatment.unit!r} is no unit of a dose. Known: {', '.join(UNITS)}. Rename labels."
            )
    drugs = list(dict.fromkeys(treatment.drug for treatment in found))
    n_columns = (3 if any(treatment.hours is not None for treatment in found) else 2) * len(drugs)
    return Drugs(DRUGS, {drug: i for i, drug in enumerate(drugs)}, np.empty((0, n_columns), np.float32))


def _unit(treatment: Treatment) -> str:
    """Its unit as `UNITS` spells it: M is molar and m milli, whatever the case of the rest."""
    unit = treatment.unit.strip().replace("µ", "u").replace("μ", "u")
    return unit.lower() if unit.lower().endswith("g/ml") else f"{unit[:-1].lower()}M"


def read_source(path: Path) -> Source:
    """The vectors in a file: see `sest.untrusted.tensors.read_vectors`."""
    names, matrix = read_vectors(path)
    return Source(path.name, {name: i for i, name in enumerate(names)}, matrix.numpy())


def read_sources(
    text: str, names: Sequence[str], *, columns: Sequence[str] | None = None, loadings: Source | None = None
) -> Vectors:
    """The vectors of everything that `--perturbations` names.

    Of several sources the vectors of each file are divided by the root mean square of their entries, so that none
    drowns another; a single file is used as it is.

    Args:
        text: see `sources_of`.
        names: the perturbations, for one-hot columns and drugs.
        columns: the columns of a run that has them already.
        loadings: what `genes` stands for.
    """
    parts, files = sources_of(text), iter(source_files(text))
    made = []
    for part in parts:
        if part == ONE_HOT:
            made.append(one_hot(names, columns))
        elif part == DRUGS:
            made.append(drugs_of(names))
        elif part == GENES:
            assert loadings is not None
            made.append(loadings)
        else:
            made.append(read_source(next(files)))
    if len(made) > 1:
        made = [source if source.name in WORDS else _scaled(source) for source in made]
    return Vectors(label_of(text), tuple(made))


def _scaled(source: Source) -> Source:
    """Entries of root mean square 1; the factor has four digits, so that it is the same on every machine."""
    size = float(np.sqrt(np.mean(np.square(source.matrix, dtype=np.float64))))
    return Source(source.name, source.rows, source.matrix / np.float32(f"{size:.3e}") if size else source.matrix)


def absent_hint(absent: Sequence[str], names: Mapping[str, object] | Sequence[str]) -> str:
    """The nearest names to the first of the absent ones: a sentence with a space before it, or nothing.

    Of a combination, the targets that have no vector.
    """
    lost = [part for part in targets_of(absent[0]) if part not in names]
    if 0 < len(lost) < len(targets_of(absent[0])):
        return f" Of {absent[0]} it lacks {shown(lost)}.{nearest(lost[0], names)}"
    return nearest(absent[0], names)
