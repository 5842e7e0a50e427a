"""The cells of a cache as training reads them: labels of all cells and embeddings of the controls.

Shapes: N cells of all groups in the cache's order, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sest.cache import Cache
from sest.cells.labels import AS_IS, same_targets
from sest.cells.splits import GroupCells, group_cells
from sest.errors import InputError

CONTROL, NOTHING = 0, -1  # codes among the perturbations: of the control, of cells that are left out
ROWS_PER_READ = 16_384


@dataclass(frozen=True, eq=False)
class Labels:
    """What every cell is. A context is a cell type within a file: sets and their controls never leave it."""

    groups: tuple[str, ...]  # group paths, in the cache's order
    first: np.ndarray  # (groups + 1,) int64: where each group's cells begin
    perturbations: tuple[str, ...]  # code -> name; code 0 is the control, whatever each file calls it
    perturbation: np.ndarray  # (N,) int32; -1 for cells of no known perturbation, which no split has
    contexts: tuple[tuple[str, str], ...]  # code -> (group path, cell type)
    context: np.ndarray  # (N,) int32
    batch: np.ndarray  # (N,) int32, unique over all files
    as_is: bool = False  # whether each label stands for itself, and A+B for no set of targets

    @property
    def is_control(self) -> np.ndarray:
        """(N,) bool."""
        return self.perturbation == CONTROL

    def __len__(self) -> int:
        return len(self.perturbation)


def read_labels(cache: Cache) -> tuple[Labels, list[GroupCells]]:
    """Read the labels of all cells of a cache; also as `sest.cells.splits` takes them.

    Raises:
        InputError: a file has no perturbation column or no control cells.
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
    perturbation, context, batch = (np.empty(first[-1], np.int32) for _ in range(3))
    n_batches = 0
    for t, labelled, a, b in zip(tables, columns, first, first[1:], strict=False):
        codes = [CONTROL if name == t.control else code[name] for name in t.perturbations]
        to_code = np.array([*codes, NOTHING], np.int32)  # code -1 is the last
        to_context = np.array([context_code[t.path, name] for name in t.cell_types], np.int32)
        batches = labelled["batch"].cat
        for start in range(a, b, ROWS_PER_READ):  # some at a time: indices take eight bytes each
            here, of = slice(start, min(start + ROWS_PER_READ, b)), slice(start - a, min(start + ROWS_PER_READ, b) - a)
            perturbation[here] = to_code[t.perturbation[of]]
            context[here] = to_context[t.cell_type[of]]
        batch[a:b] = batches.codes.to_numpy()
        batch[a:b] += n_batches
        n_batches += len(batches.categories)
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
    """The same labels with one spelling of each set of targets: B+A of a later file as A+B of an earlier one."""
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
        (controls, E) as stored, and (N,) int32: a cell's row in it, -1 for cells that are no controls.

    Raises:
        InputError: a control cell was not embedded.
    """
    row_of = np.full(len(labels), -1, np.int32)
    row_of[labels.is_control] = np.arange(int(labels.is_control.sum()))
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
    return embeddings, row_of
