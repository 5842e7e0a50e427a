"""The cells of a cache as training reads them: labels of all cells and embeddings of the controls.

Shapes: N cells of all groups in the cache's order, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sest.cache import Cache
from sest.cells.labels import AS_IS, refuse_twins_between, same_targets
from sest.cells.splits import GroupCells, group_cells
from sest.errors import InputError
from sest.machine.jit import compiled

CONTROL, NOTHING = 0, -1  # codes among the perturbations: of the control, of cells that are left out
ROWS_PER_READ = 16_384


@dataclass(frozen=True, eq=False)
class Labels:
    """What every cell is. A context is a cell type within a file: sets and their controls never leave it."""

    groups: tuple[str, ...]  # group paths, in the cache's order
    first: np.ndarray  # (groups + 1,) int64: where each group's cells begin
    perturbations: tuple[str, ...]  # code -> name; code 0 is the control, whatever each file calls it
    perturbation: np.ndarray  # (N,) of `code_type`; -1 for cells of no known perturbation, which no split has
    contexts: tuple[tuple[str, str], ...]  # code -> (group path, cell type)
    context: np.ndarray  # (N,) of `code_type`
    batch: np.ndarray  # (N,) of `code_type`, unique over all files
    as_is: bool = False  # whether each label stands for itself, and A+B for no set of targets

    @property
    def is_control(self) -> np.ndarray:
        """(N,) bool."""
        return self.perturbation == CONTROL

    def __len__(self) -> int:
        return len(self.perturbation)


def code_type(n: int) -> np.dtype:
    """The type of n codes from 0 on, and of -1: 16 or 32 bits, as there may be very many cells."""
    return np.dtype(np.int16 if n <= 2**15 else np.int32)


def rows_of_pairs(labels: Labels, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The cells of each (context, perturbation), without a sort.

    Args:
        wanted: (N,) bool: which cells; none of no known perturbation.

    Returns:
        context and perturbation (pairs,) int64 codes, in this order, and the rows of each, ascending: int32 where that
        numbers all cells, as they are kept for a whole training.
    """
    counts = pair_counts(labels, wanted)
    context, perturbation = np.nonzero(counts)
    ends = np.cumsum(counts).reshape(counts.shape)
    rows = np.empty(int(ends[-1, -1]), np.int32 if len(wanted) < 2**31 else np.int64)
    _place(labels.context, labels.perturbation, wanted, ends - counts, rows)
    return context, perturbation, np.split(rows, ends[context, perturbation][:-1])


def pair_counts(labels: Labels, wanted: np.ndarray) -> np.ndarray:
    """(contexts, perturbations) int64: how many of the `wanted` (N,) bool cells each pair has."""
    counts = np.zeros((len(labels.contexts), len(labels.perturbations)), np.int64)
    _count(labels.context, labels.perturbation, wanted, counts)
    return counts


def _codes(context: Any, perturbation: Any, wanted: Any, shape: tuple[int, int]) -> np.ndarray:
    """Of the pair of every wanted cell, ascending as contexts and then perturbations do."""
    return np.ravel_multi_index((context[wanted], perturbation[wanted]), shape)


def _plain_count(context: Any, perturbation: Any, wanted: Any, counts: Any) -> None:
    found = np.bincount(_codes(context, perturbation, wanted, counts.shape), minlength=counts.size)
    counts += found.reshape(counts.shape)


def _plain_place(context: Any, perturbation: Any, wanted: Any, at: Any, rows: Any) -> None:
    codes = _codes(context, perturbation, wanted, at.shape)
    rows[:] = np.flatnonzero(wanted)[np.argsort(codes, kind="stable")]  # pairs follow each other in this order


@compiled(_plain_count, nogil=True)
def _count(context: Any, perturbation: Any, wanted: Any, counts: Any) -> None:
    for row in range(len(wanted)):
        if wanted[row]:
            counts[context[row], perturbation[row]] += 1


@compiled(_plain_place, nogil=True)
def _place(context: Any, perturbation: Any, wanted: Any, at: Any, rows: Any) -> None:
    for row in range(len(wanted)):
        if wanted[row]:
            rows[at[context[row], perturbation[row]]] = row
            at[context[row], perturbation[row]] += 1


def read_labels(cache: Cache) -> tuple[Labels, list[GroupCells]]:
    """Read the labels of all cells of a cache; also as `sest.cells.splits` takes them.

    Raises:
        InputError: a file has no perturbation column or no control cells, or perturbations of two files differ in case
            alone.
    """
    groups = list(cache.groups.values())
    columns = [group.read_labels() for group in groups]
    for group, labelled in zip(groups, columns, strict=True):
        if "perturbation" not in labelled or not group.attributes["controls"]:
            raise InputError(
                f"{cache.path}: group {group.path} has no perturbation labels or no controls, so nothing can be "
                "trained on it. Embed it with --pert-col and --control."
            )
    as_is = any(g.attributes["columns"].get("labels") == AS_IS for g in groups)
    tables = [
        group_cells(g.path, g.dataset, labelled, str(g.attributes["columns"]["control"]))
        for g, labelled in zip(groups, columns, strict=True)
    ]
    tables = tables if as_is else _spelled_alike(tables)
    control = tables[0].control
    names = sorted({name for t in tables for name in t.perturbations if name != t.control})
    if both := sorted({t.control for t in tables}.intersection(names)):
        raise InputError(
            f"{cache.path}: '{both[0]}' is the control of one file and a perturbation of another. "
            "Embed again with --control, or rename it in one of them."
        )
    code = {name: i + 1 for i, name in enumerate(names)}
    contexts = [(t.path, name) for t in tables for name in t.cell_types]
    context_code = {pair: i for i, pair in enumerate(contexts)}
    first = np.cumsum([0, *(g.n_cells for g in groups)])
    n_batches = [len(labelled["batch"].cat.categories) for labelled in columns]
    sizes = len(names) + 1, len(contexts), sum(n_batches)
    perturbation, context, batch = (np.empty(first[-1], code_type(n)) for n in sizes)
    first_batch = np.cumsum([0, *n_batches])
    for number, (t, labelled) in enumerate(zip(tables, columns, strict=True)):
        a, b = first[number : number + 2]
        codes = [CONTROL if name == t.control else code[name] for name in t.perturbations]
        to_code = np.array([*codes, NOTHING], perturbation.dtype)  # code -1 is the last
        to_context = np.array([context_code[t.path, name] for name in t.cell_types], context.dtype)
        for start in range(a, b, ROWS_PER_READ):  # some at a time: indices take eight bytes each
            here, of = slice(start, min(start + ROWS_PER_READ, b)), slice(start - a, min(start + ROWS_PER_READ, b) - a)
            perturbation[here] = to_code[t.perturbation[of]]
            context[here] = to_context[t.cell_type[of]]
        batch[a:b] = labelled["batch"].cat.codes.to_numpy()
        batch[a:b] += first_batch[number].astype(batch.dtype)
    labels = Labels(
        tuple(g.path for g in groups),
        first,
        (control, *names),
        perturbation,
        tuple(contexts),
        context,
        batch,
        as_is,
    )
    return labels, tables


def _spelled_alike(tables: list[GroupCells]) -> list[GroupCells]:
    """The same labels with one spelling of each set of targets: B+A of a later file as A+B of an earlier one.

    Raises InputError for names that differ in case alone.
    """
    refuse_twins_between({t.path: [name for name in t.perturbations if name != t.control] for t in tables})
    known: dict[str, None] = {}
    result = []
    for table in tables:
        spelled = same_targets([name for name in table.perturbations if name != table.control], known)
        known |= dict.fromkeys(spelled.values())
        result.append(replace(table, perturbations=tuple(spelled.get(name, name) for name in table.perturbations)))
    return result


def read_embeddings(cache: Cache, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Read the embeddings of the control cells, all that gene-space training needs.

    Returns:
        (controls, E) as stored, and (controls,) int32 or int64: the row of each among all cells, ascending.

    Raises:
        InputError: a control cell was not embedded.
    """
    parts = []
    for number, group in enumerate(cache.groups.values()):
        mine = labels.is_control[labels.first[number] : labels.first[number + 1]]
        for start in range(0, group.n_cells, ROWS_PER_READ):
            stop = min(start + ROWS_PER_READ, group.n_cells)
            if mine[start:stop].any():
                parts.append(group.embeddings(start, stop)[mine[start:stop]])
    embeddings = np.concatenate(parts)
    if not np.isfinite(embeddings).all():
        raise InputError(f"{cache.path}: some control cells have no finite embedding. Embed again with --cells all.")
    return embeddings, np.flatnonzero(labels.is_control).astype(np.int32 if len(labels) < 2**31 else np.int64)
