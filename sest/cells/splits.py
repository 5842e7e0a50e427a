"""Which cells train, validate and test: a splits file (`sest.cells.split_file`) applied to the groups of a cache.

A context is a (dataset, cell type). The rules stand in docs/design.md, The cells that training reads; whatever a file
names and the cache does not have is an error, never ignored. C: cell types, P: perturbations (the control among them),
n: cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from sest.cells.labels import same_targets
from sest.cells.split_file import SPLIT_NAMES, TEST, TRAIN, VAL, SplitFile
from sest.errors import InputError, nearest, shown

CELLS_AT_ONCE = 2**20


@dataclass(frozen=True)
class GroupCells:
    """The labels of one group (one file) of the cache; a negative code is a missing label."""

    path: str  # in the cache, e.g. "replogle/rpe1"
    dataset: str
    perturbation: np.ndarray  # (n,) int codes
    perturbations: tuple[str, ...]  # code -> name
    cell_type: np.ndarray  # (n,) int codes
    cell_types: tuple[str, ...]  # code -> name
    control: str  # label of control cells


@dataclass(frozen=True)
class Splits:
    """What `assign_splits` decided."""

    masks: dict[str, np.ndarray]  # group path -> (n,) uint8; perturbed cells <= 1 bit, controls any, 0 is unused
    notes: tuple[str, ...]  # sentences to show the user


@dataclass(frozen=True)
class SplitRow:
    """One line of the table printed before training."""

    dataset: str
    cell_type: str
    split: str  # "train", "val" or "test"
    n_perturbations: int
    n_perturbed_cells: int
    n_controls: int


def group_cells(path: str, dataset: str, obs: pd.DataFrame, control: str) -> GroupCells:
    """The labels of one group from its obs table."""
    perturbation, cell_type = obs["perturbation"].cat, obs["cell_type"].cat
    return GroupCells(
        path,
        dataset,
        perturbation.codes.to_numpy(),
        tuple(map(str, perturbation.categories)),
        cell_type.codes.to_numpy(),
        tuple(map(str, cell_type.categories)),
        control,
    )


@dataclass(frozen=True)
class _Table:
    """A group's cells counted by context; the rules write `bits`, never single cells."""

    group: GroupCells
    counts: np.ndarray  # (C, P) int64, cells
    bits: np.ndarray  # (C, P) uint8, written in place
    is_control: np.ndarray  # (P,) bool
    n_unlabelled: int  # cells without a perturbation or a cell type

    @classmethod
    def of(cls, group: GroupCells) -> _Table:
        shape = C, P = len(group.cell_types), len(group.perturbations)
        assert len(set(group.cell_types)) == C and len(set(group.perturbations)) == P, "names of codes are unique"
        assert group.perturbation.shape == group.cell_type.shape, "one code a cell"
        counts, labelled = np.zeros(C * P, np.int64), 0
        for part in _parts(len(group.perturbation)):
            pert, row = group.perturbation[part].astype(np.int64), group.cell_type[part].astype(np.int64)
            assert not pert.size or (pert.max() < P and row.max() < C), "codes are below the number of names"
            known = (pert >= 0) & (row >= 0)
            counts += np.bincount((row * P + pert)[known], minlength=C * P)
            labelled += int(known.sum())
        is_control = np.array([name == group.control for name in group.perturbations], dtype=bool)
        bits = np.zeros(shape, dtype=np.uint8)
        return cls(group, counts.reshape(shape), bits, is_control, len(group.perturbation) - labelled)

    def perturbed(self, bit: int) -> np.ndarray:
        """Return (C, P) bool: contexts and perturbations, not controls, with cells in split `bit`."""
        chosen: np.ndarray = (self.counts > 0) & ((self.bits & bit) > 0) & ~self.is_control
        return chosen

    def masks(self) -> np.ndarray:
        """Return (n,) uint8."""
        codes = self.group.cell_type, self.group.perturbation
        out = np.empty(len(codes[0]), dtype=np.uint8)
        for part in _parts(len(out)):
            row, pert = (code[part] for code in codes)
            out[part] = np.where((row >= 0) & (pert >= 0), self.bits[row, pert], 0)
        return out


def _parts(n: int) -> Iterator[slice]:
    """All of n cells, some at a time: indices take eight bytes each."""
    for start in range(0, n, CELLS_AT_ONCE):
        yield slice(start, start + CELLS_AT_ONCE)


def assign_splits(
    groups: Sequence[GroupCells],
    file: SplitFile | None,
    *,
    seed: int,
    val_fraction: float = 0.05,
    one_context: bool = False,
) -> Splits:
    """Give every cell of the cache its split; without a file every dataset is training.

    Where no perturbed cell is in val, `max(1, round(val_fraction * N))` of the N training perturbations, drawn by
    name from `seed`, move to val in every context; with `one_context` those drawn have several training contexts, and
    move in one of these each, if any has. The order of `groups` changes nothing. Training cells of a context that has
    no controls in its group cannot be paired with any: they are left unused, with a note.

    Raises `InputError` for names the cache does not have, a val or test context without controls, or nothing left
    to train or validate on.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be between 0 and 1, found {val_fraction}.")
    assert len({group.path for group in groups}) == len(groups), "group paths are unique"
    tables = [_Table.of(group) for group in sorted(groups, key=lambda group: group.path)]
    notes = _unlabelled_notes(tables)
    if file is None:
        for table in tables:
            table.bits[:] = TRAIN
    else:
        file = _spelled(file, tables)
        _check_names(tables, file)
        for table in tables:
            _apply(table, file)
        notes += _file_notes(tables, file)
    notes += _require_controls(tables)
    if not any(table.perturbed(TRAIN).any() for table in tables):
        raise InputError("No perturbed cells are left for training. Check the control label and the splits file.")
    if not any(table.perturbed(VAL).any() for table in tables):
        notes.append(_hold_out(tables, seed, val_fraction, one_context))
    masks = {table.group.path: table.masks() for table in tables}
    return Splits({group.path: masks[group.path] for group in groups}, tuple(notes))


def _apply(table: _Table, file: SplitFile) -> None:
    dataset, bits, is_control = table.group.dataset, table.bits, table.is_control
    in_training = dataset in file.training
    bits[:] = TRAIN if in_training else 0
    for row, cell_type in enumerate(table.group.cell_types):
        context = (dataset, cell_type)
        if context in file.zeroshot:
            bits[row] = file.zeroshot[context]
            bits[row, is_control] |= TRAIN if in_training else 0
        elif context in file.fewshot:
            bits[row] = TRAIN  # also where the dataset is not in [training]: the rest of a fewshot context trains
            for bit, names in file.fewshot[context].items():
                listed = np.isin(table.group.perturbations, names)
                bits[row, listed] = bit
                bits[row, is_control] |= bit if names else 0


def _spelled(file: SplitFile, tables: list[_Table]) -> SplitFile:
    """The same file with perturbations as the cache spells them: A+ctrl as A, B+A as A+B."""
    known = sorted({name for table in tables for name in table.group.perturbations})
    listed = {name for splits in file.fewshot.values() for names in splits.values() for name in names}
    spelled = same_targets(sorted(listed), known)
    fewshot = {
        context: {bit: tuple(dict.fromkeys(spelled[name] for name in names)) for bit, names in splits.items()}
        for context, splits in file.fewshot.items()
    }
    return replace(file, fewshot=fewshot)


def _check_names(tables: list[_Table], file: SplitFile) -> None:
    """Raise `InputError` for datasets, cell types and perturbations of the file that the cache does not have."""
    contexts = sorted({*file.zeroshot, *file.fewshot})
    have = sorted({table.group.dataset for table in tables})
    missing = sorted((file.training | {dataset for dataset, _ in contexts}) - set(have))
    if missing:
        raise InputError(
            f"{file.path} uses datasets that are not in the cache: {shown(missing)}. "
            f"The cache has {shown(have)}.{nearest(missing[0], have)}"
        )
    for dataset, cell_type in contexts:
        rows = _rows(tables, dataset, cell_type)
        if not rows:
            exist = sorted({table.group.cell_types[row] for table, row in _rows(tables, dataset)})
            raise InputError(
                f"{file.path}: dataset {dataset!r} has no cell type {cell_type!r}. "
                f"It has {shown(exist)}.{nearest(cell_type, exist)}"
            )
        for names in file.fewshot.get((dataset, cell_type), {}).values():
            _check_perturbations(rows, names, f'{file.path}: [fewshot."{dataset}.{cell_type}"]')


def _rows(tables: list[_Table], dataset: str, cell_type: str | None = None) -> list[tuple[_Table, int]]:
    """Return where a dataset (or one cell type of it) has cells."""
    return [
        (table, row)
        for table in tables
        for row, name in enumerate(table.group.cell_types)
        if table.group.dataset == dataset and cell_type in (name, None) and table.counts[row].any()
    ]


def _check_perturbations(rows: list[tuple[_Table, int]], names: tuple[str, ...], what: str) -> None:
    controls = {table.group.control for table, _ in rows}
    if found := sorted(controls.intersection(names)):
        raise InputError(f"{what} lists the control {found[0]!r}: controls go to every split. Take it out of the list.")
    exist = {t.group.perturbations[column] for t, row in rows for column in np.flatnonzero(t.counts[row])} - controls
    if missing := sorted(set(names) - exist):
        raise InputError(
            f"{what} lists perturbations without cells there: {shown(missing)}. "
            f"Of this cell type the cache has {shown(sorted(exist))}.{nearest(missing[0], exist)}"
        )


def _unlabelled_notes(tables: list[_Table]) -> list[str]:
    missing = [(table.group.path, table.n_unlabelled) for table in tables]
    return [f"{n:,} cells of {path!r} have no perturbation or no cell type: not used." for path, n in missing if n]


def _file_notes(tables: list[_Table], file: SplitFile) -> list[str]:
    """Say what of the file does nothing and what of the cache it leaves unused."""
    notes = [
        f"'{dataset}.{cell_type}' is in [zeroshot] and in [fewshot]: zeroshot wins, its fewshot lists are not used."
        for dataset, cell_type in sorted(file.zeroshot.keys() & file.fewshot.keys())
    ]
    for (dataset, cell_type), bit in sorted(file.zeroshot.items()):
        if not any(table.perturbed(bit)[row].any() for table, row in _rows(tables, dataset, cell_type)):
            notes.append(f"'{dataset}.{cell_type}' has no perturbed cells: it adds nothing to {SPLIT_NAMES[bit]}.")
    for dataset in sorted({table.group.dataset for table in tables}):
        unused = [(table, row) for table, row in _rows(tables, dataset) if not table.bits[row].any()]
        n_cells = sum(int(table.counts[row].sum()) for table, row in unused)
        if dataset not in file.datasets:
            notes.append(f"Dataset {dataset!r} is not in {file.path.name}: its {n_cells:,} cells are not used.")
        elif n_cells:
            names = shown(sorted({table.group.cell_types[row] for table, row in unused}))
            notes.append(f"{dataset!r} is not in [training]: its cell types {names} ({n_cells:,} cells) are not used.")
    return notes


def _require_controls(tables: list[_Table]) -> list[str]:
    """Refuse val and test contexts without controls in their group; leave such training contexts unused."""
    notes = []
    for table in tables:
        without = table.counts[:, table.is_control].sum(axis=1) == 0
        for row in np.flatnonzero(without & table.perturbed(TRAIN | VAL | TEST).any(axis=1)):
            group, n_cells = table.group, int(table.counts[row].sum())
            what = f"'{group.dataset}.{group.cell_types[row]}' has no controls ({group.control!r}) in {group.path!r}"
            for bit in (VAL, TEST):
                if table.perturbed(bit)[row].any():
                    raise InputError(f"{what}, so it cannot be in {SPLIT_NAMES[bit]}. Take it out of that split.")
            table.bits[row] = 0
            notes.append(f"{what}: its {n_cells:,} training cells are not used.")
    return notes


def _hold_out(tables: list[_Table], seed: int, val_fraction: float, one_context: bool) -> str:
    """Move a seeded share of the training perturbations to val, in every context or in one each, and say which."""
    contexts = _training_contexts(tables)
    names = sorted(contexts)
    several = [name for name in names if len(contexts[name]) > 1] if one_context else []
    if several:
        rng = np.random.default_rng([seed])
        n_held = min(len(several), max(1, round(val_fraction * len(names))))
        drawn = sorted(several[i] for i in rng.permutation(len(several))[:n_held])
        places = {name: contexts[name][rng.integers(len(contexts[name]))] for name in drawn}
        for table in tables:
            here = [places.get(name) for name in table.group.perturbations]
            rows = [[place == (table.group.dataset, kind) for place in here] for kind in table.group.cell_types]
            _move_to_val(table, np.array(rows, dtype=bool).reshape(table.bits.shape))
        text = shown((f"{name} in {'.'.join(place)}" for name, place in places.items()))
        return (
            f"No validation split: held out {n_held} of {len(names)} training perturbations in one context each, as "
            f"the others train them ({text}), seed {seed}. --val-contexts all holds them out everywhere."
        )
    if len(names) == 1:
        raise InputError(
            f"There is one training perturbation ({names[0]!r}), so none can be held out for validation. "
            "Name a val split in a splits file."
        )
    n_held = min(len(names) - 1, max(1, round(val_fraction * len(names))))
    held = sorted(names[i] for i in np.random.default_rng([seed]).permutation(len(names))[:n_held])
    for table in tables:
        _move_to_val(table, np.isin(table.group.perturbations, held))
    return (
        f"No validation split: held out {n_held} of {len(names)} training perturbations ({shown(held)}), seed {seed}."
    )


def _training_contexts(tables: list[_Table]) -> dict[str, list[tuple[str, str]]]:
    """The (dataset, cell type)s in which each perturbation trains, sorted."""
    found: dict[str, set[tuple[str, str]]] = {}
    for table in tables:
        for row, column in np.argwhere(table.perturbed(TRAIN)):
            context = (table.group.dataset, table.group.cell_types[row])
            found.setdefault(table.group.perturbations[column], set()).add(context)
    return {name: sorted(contexts) for name, contexts in found.items()}


def _move_to_val(table: _Table, chosen: np.ndarray) -> None:
    """Move training cells of the `chosen` (C, P) or (P,) bool to val; the controls of their contexts serve it too."""
    moved = table.perturbed(TRAIN) & chosen
    table.bits[moved] = VAL
    table.bits[np.ix_(moved.any(axis=1), table.is_control)] |= VAL


def split_table(groups: Sequence[GroupCells], splits: Splits) -> list[SplitRow]:
    """Count each context's cells by split, sorted by dataset, cell type and train, val, test; no empty rows.

    A control is counted in every split it serves; cells that are in no split are not counted.
    """
    names: dict[tuple[str, str, int], set[str]] = {}
    cells: dict[tuple[str, str, int], list[int]] = {}  # -> [perturbed, controls]
    for group in groups:
        mask = splits.masks[group.path]
        for bit in SPLIT_NAMES:
            chosen = (mask & bit) > 0
            counted = _Table.of(_only(group, chosen))
            for row in np.flatnonzero(counted.counts.any(axis=1)):
                key = (group.dataset, group.cell_types[row], bit)
                perturbed = np.where(counted.is_control, 0, counted.counts[row])  # (P,) cells
                total = cells.setdefault(key, [0, 0])
                total[0] += int(perturbed.sum())
                total[1] += int(counted.counts[row].sum() - perturbed.sum())
                names.setdefault(key, set()).update(group.perturbations[i] for i in np.flatnonzero(perturbed))
    return [SplitRow(k[0], k[1], SPLIT_NAMES[k[2]], len(names[k]), *cells[k]) for k in sorted(cells)]


def _only(group: GroupCells, chosen: np.ndarray) -> GroupCells:
    return replace(group, perturbation=group.perturbation[chosen], cell_type=group.cell_type[chosen])
