"""A splits file for cells that came without one: what is held out, so that something can be learned about it.

Few-shot: some perturbations of one cell type are tested there, others validate, and the rest trains. Only such are held
out as training can say something about: they train in another cell type, or their targets have features, or train as
parts of other perturbations. Where every cell type has one perturbation, cell types are held out whole instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sest.cells.labels import targets_of
from sest.cells.split_file import SPLIT_NAMES, TEST, VAL
from sest.cells.splits import GroupCells
from sest.errors import InputError, shown

FEW_CELLS = 10  # of a pair, below which its pseudobulk is mostly noise
MOST_HELD = 50  # perturbations of a split
ENOUGH = 8  # validation pairs, to fit how much the head counts; and perturbations to draw from

Held = dict[int, tuple[str, ...]]  # TEST, VAL -> perturbations


@dataclass(frozen=True)
class ChosenSplits:
    """What is held out of one file, and why."""

    fewshot: dict[str, Held]  # cell type -> perturbations held out there
    zeroshot: dict[str, int]  # cell type -> TEST or VAL
    why: str  # a sentence
    by_genes: bool = False  # what is held out is known by the genes that it targets alone, which not all targets are

    def toml(self, dataset: str, cells: Path) -> str:
        """The splits file of a dataset that is one file of cells."""
        tables: dict[str, Any] = {"datasets": {dataset: str(cells)}, "training": {dataset: "train"}}
        if self.zeroshot:
            tables["zeroshot"] = {f"{dataset}.{name}": SPLIT_NAMES[bit] for name, bit in self.zeroshot.items()}
        if self.fewshot:
            tables["fewshot"] = {
                f"{dataset}.{name}": {SPLIT_NAMES[bit]: list(names) for bit, names in sorted(held.items())}
                for name, held in self.fewshot.items()
            }
        return f"# {' '.join(self.why.split())}\n{tomli_w.dumps(tables)}"


@dataclass(frozen=True)
class _Pairs:
    """The perturbations of each cell type that has controls."""

    of: Mapping[str, frozenset[str]]  # cell type -> perturbations with enough cells
    known: frozenset[str]  # targets that have features
    everything: bool  # all perturbations have
    targets: Mapping[str, frozenset[str]]  # of each perturbation

    @cached_property
    def parts(self) -> dict[str, Counter[str]]:
        """How many perturbations of a cell type have each target."""
        return {
            cell_type: Counter(target for name in names for target in self.targets[name])
            for cell_type, names in self.of.items()
        }

    @classmethod
    def read(cls, group: GroupCells, genes: Collection[str], everything: bool) -> _Pairs:
        labelled = (group.perturbation >= 0) & (group.cell_type >= 0)
        shape = len(group.cell_types), len(group.perturbations)
        counts = np.zeros(shape, np.int64)
        np.add.at(counts, (group.cell_type[labelled], group.perturbation[labelled]), 1)
        control = group.perturbations.index(group.control)
        rows = [row for row in range(shape[0]) if counts[row, control]]
        for least in (FEW_CELLS, 1):
            found = {
                group.cell_types[row]: frozenset(
                    name
                    for name, n in zip(group.perturbations, counts[row].tolist(), strict=True)
                    if n >= least and name != group.control
                )
                for row in rows
            }
            if sum(map(len, found.values())) >= 3:
                break
        names = frozenset().union(*found.values())
        return cls(found, frozenset(genes), everything, {name: frozenset(targets_of(name)) for name in names})

    def is_elsewhere(self, cell_type: str, name: str) -> bool:
        return any(name in names for other, names in self.of.items() if other != cell_type)

    def by_features(self, name: str) -> bool:
        return self.everything or self.targets[name] <= self.known

    def is_known(self, cell_type: str, name: str, held: Collection[str]) -> bool:
        """Whether what trains says something about a perturbation of a cell type that is held out with `held`."""
        if self.is_elsewhere(cell_type, name) or self.by_features(name):
            return True
        left = self.parts[cell_type].copy()
        for other in {*held, name} & self.of[cell_type]:
            left.subtract(self.targets[other])
        return all(left[target] > 0 for target in self.targets[name])

    def candidates(self, cell_type: str) -> list[str]:
        return sorted(name for name in self.of[cell_type] if self.is_known(cell_type, name, ()))


def choose_splits(
    group: GroupCells, genes: Collection[str], *, everything_known: bool = False, seed: int = 0
) -> ChosenSplits:
    """What to hold out of a file.

    Args:
        group: its labels.
        genes: the names of its genes, which have features from the control cells (`--perturbations genes`).
        everything_known: features are from elsewhere, and say something about every perturbation.
        seed: of what is drawn.

    Raises:
        InputError: too little to train on, validate and test, or nothing that could be predicted where it is held out.
    """
    pairs = _Pairs.read(group, genes, everything_known)
    if not pairs.of:
        raise InputError(f"No cell type has control cells ({group.control!r}), so nothing can be trained.")
    candidates = {cell_type: replace(pairs, known=frozenset()).candidates(cell_type) for cell_type in pairs.of}
    if max(map(len, candidates.values())) < ENOUGH:
        candidates = {cell_type: pairs.candidates(cell_type) for cell_type in pairs.of}
    cell_type = max(sorted(candidates), key=lambda name: (len(candidates[name]), len(pairs.of[name])))
    if len(candidates[cell_type]) < 2 and sum(map(bool, pairs.of.values())) >= 3:
        return _whole_cell_types(pairs)
    if (n := len(set().union(*pairs.of.values()))) < 3 and sum(map(len, pairs.of.values())) < 4:
        raise InputError(
            f"{n} perturbation{'s' * (n != 1)} in {len(pairs.of)} cell type{'s' * (len(pairs.of) != 1)}: too few to "
            "train on some, validate on others and test the rest. It takes three perturbations, or one in three cell "
            "types."
        )
    if len(candidates[cell_type]) < 2:
        targets = sorted(set().union(*(pairs.targets[name] for name in pairs.of[cell_type])) - pairs.known)
        raise InputError(
            f"Of {len(pairs.of[cell_type])} perturbations {len(candidates[cell_type])} could be predicted where they "
            "are held out: no other cell type has them, and their targets are no measured genes "
            f"({shown(targets, 3)}). Pass --perturbations with a file of features of them, or, where a column of var "
            "has these genes, --gene-col."
        )
    held = _draw(pairs, cell_type, candidates[cell_type], seed)
    return ChosenSplits(
        {cell_type: held},
        {},
        _why(pairs, cell_type, held),
        by_genes=not everything_known and _by_genes(pairs, cell_type, held),
    )


def _draw(pairs: _Pairs, cell_type: str, names: list[str], seed: int) -> Held:
    """Draw test, then validation perturbations, such that all of them stay known."""
    n = len(names)
    wanted = {TEST: max(1, min(round(n / 5), MOST_HELD)), VAL: max(1, min(n // 4, max(ENOUGH, n // 10), MOST_HELD))}
    drawn: list[str] = []
    for i in np.random.default_rng([seed]).permutation(n):
        chosen = [*drawn, names[i]]
        alone = len(pairs.of) == 1 and len(chosen) >= len(pairs.of[cell_type])  # something has to train
        if len(drawn) == sum(wanted.values()) or alone:
            break
        if all(pairs.is_known(cell_type, name, chosen) for name in chosen):
            drawn = chosen
    n_test = min(wanted[TEST], max(len(drawn) - 1, 1))
    return {TEST: tuple(sorted(drawn[:n_test])), VAL: tuple(sorted(drawn[n_test:]))}


def _whole_cell_types(pairs: _Pairs) -> ChosenSplits:
    """One cell type tests, another validates: the last two by name, so that nothing is drawn from so few."""
    *train, val, test = sorted(name for name, perturbed in pairs.of.items() if perturbed)
    why = (
        f"Every cell type has about one perturbation, so cell types are held out whole: {test} tests, {val} validates "
        f"and {shown(train)} train{'s' * (len(train) == 1)}."
    )
    return ChosenSplits({}, {test: TEST, val: VAL}, why)


def _by_genes(pairs: _Pairs, cell_type: str, held: Held) -> bool:
    """Whether only the genes that they target say something about what is held out, and some targets are no genes."""
    out = [name for names in held.values() for name in names]
    blind = replace(pairs, known=frozenset())
    needed = not all(blind.is_known(cell_type, name, out) for name in out)
    return needed and not all(targets <= pairs.known for targets in pairs.targets.values())


def _why(pairs: _Pairs, cell_type: str, held: Held) -> str:
    test, val = held[TEST], held[VAL]
    where = f" in {cell_type}" if len(pairs.of) > 1 else ""
    n = len(pairs.of[cell_type])
    said = f"Of {n} perturbations{where} {len(test)} test ({shown(test)}) and {len(val)} validate ({shown(val)})"
    others = any(pairs.is_elsewhere(cell_type, name) for name in test)
    if others:
        return f"{said}; other cell types train these too, or features say what they are like."
    return f"{said}; what is known of them is in their features, or in what trains of their targets."
