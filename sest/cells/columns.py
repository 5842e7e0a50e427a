"""Which obs columns of a file hold labels; what a label of the perturbation column is, sest.cells.labels decides."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sest.cells.labels import AUTO, NOT_LABELS, DecidedLabels, decide
from sest.errors import InputError, nearest, shown

# Conventional names, preferred first; compared without case and with "_" for any punctuation.
PERTURBATION_COLUMNS = (
    "target_gene",
    "perturbation",
    "pert",
    "gene",
    "condition",
    "guide_target",
    "drug",
    "drugname_drugconc",
    "compound",
    "treatment",
)
CELL_TYPE_COLUMNS = ("cell_type", "celltype", "cell_line", "cellline")
CONTEXT = ("context",)  # of the cell type too, where no column has one of the names above
BATCH_COLUMNS = ("batch", "batch_var", "gem_group", "gem_batch", "sample", "replicate", "plate", "donor")


@dataclass(frozen=True)
class Columns:
    """The obs columns that hold labels, and the control's label; None where the file has none."""

    perturbation: str | None
    cell_type: str | None
    batch: str | None
    control: str | None
    notes: tuple[str, ...]  # what was detected rather than given, one sentence each
    decided: DecidedLabels | None = None  # what the perturbation labels are; None: every label is its own name
    rule: str = AUTO  # --labels

    def as_kept(self) -> dict[str, str | None]:
        """The columns and the control as caches, checkpoints and predictions keep them."""
        kept = {key: getattr(self, key) for key in ("perturbation", "cell_type", "batch", "control")}
        return kept | ({"labels": self.rule} if self.rule != AUTO else {})


def detect_columns(
    obs: pd.DataFrame,
    *,
    pert_col: str | None = None,
    cell_type_col: str | None = None,
    batch_col: str | None = None,
    control: str | Sequence[str] | None = None,
    rule: str = AUTO,
    genes: Collection[str] = (),
) -> Columns:
    """Find the label columns by their conventional names, and the control; what is given is checked and used.

    Args:
        control: its label, or several, or patterns.
        rule: "auto" or "as-is", see `sest.cells.labels`.
        genes: names of the file's genes.

    Raises:
        InputError: a given name that does not exist, several candidates that disagree, or labels that
            `sest.cells.labels.decide` refuses.
        NoControlError: no cell has the control's label.
    """
    notes: list[str] = []
    perturbation = _find(obs, "perturbation", "--pert-col", pert_col, PERTURBATION_COLUMNS, notes)
    cell_type = _find(obs, "cell type", "--cell-type-col", cell_type_col, CELL_TYPE_COLUMNS, notes)
    cell_type = cell_type or _find(obs, "cell type", "--cell-type-col", None, CONTEXT, notes)
    batch = _find(obs, "batch", "--batch-col", batch_col, BATCH_COLUMNS, notes)
    for column in filter(None, (cell_type, batch)):
        if spaced := [name for name in obs[column].dropna().unique() if str(name) != str(name).strip()]:
            notes.append(f"Labels of {column!r} are read without the spaces around them: {shown(map(repr, spaced))}.")
    given = [control] if isinstance(control, str) else list(control or ())
    if perturbation is not None:
        codes, there = raw_labels(obs, perturbation)
        counts = np.bincount(codes + 1, minlength=len(there) + 1).tolist()
        of_label = {label: n for label, n in zip(("", *there), counts, strict=True) if n}
        decided = decide(of_label, given, column=perturbation, rule=rule, genes=genes)
        notes += decided.notes(detected=not given)
        return Columns(perturbation, cell_type, batch, decided.control, tuple(notes), decided, rule)
    if given:
        raise InputError(
            f"--control {given[0]!r} needs a perturbation column. Available: {shown(obs.columns)}. Pass --pert-col."
        )
    return Columns(None, cell_type, batch, None, tuple(notes))


def usual_columns(
    obs: pd.DataFrame,
    usual: Mapping[str, str | None],
    *,
    pert_col: str | None,
    cell_type_col: str | None,
    control: str | Sequence[str] | None,
) -> dict[str, Any]:
    """How `detect_columns` is to read a table: as given, else as the `usual` names say where the table has them.

    Args:
        usual: `Columns.as_kept` of the cells that `obs` belongs to.

    Returns:
        pert_col, cell_type_col, control and rule; None where they are to be detected.
    """
    pert_col = pert_col or (usual["perturbation"] if usual["perturbation"] in obs else None)
    cell_type_col = cell_type_col or (usual["cell_type"] if usual["cell_type"] in obs else None)
    if not control and pert_col in obs and usual["control"] in raw_labels(obs, str(pert_col))[1]:
        control = usual["control"]
    rule = usual.get("labels") or AUTO
    return {"pert_col": pert_col, "cell_type_col": cell_type_col, "control": control, "rule": rule}


def perturbations(obs: pd.DataFrame, columns: Columns) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (codes (N,) int32, names sorted): cell i is of names[codes[i]], the control among them; -1: left out."""
    if columns.decided is None:
        return _of_all(obs, str(columns.perturbation))
    codes, there = raw_labels(obs, str(columns.perturbation))
    taken_for = columns.decided.names
    meant = [*(taken_for[label] for label in there), taken_for.get("")]  # code -1 is the last
    names = sorted({name for name in meant if name is not None})
    place = {name: i for i, name in enumerate(names)}
    return np.array([-1 if name is None else place[name] for name in meant], np.int32)[codes], tuple(names)


def labels(obs: pd.DataFrame, column: str, *, twins: bool = False) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (codes (N,) int32, names sorted): the label of cell i is names[codes[i]], without spaces around it.

    Categories, text, booleans and whole numbers are labels.

    Args:
        twins: whether labels may differ in case or spaces alone; those that do in spaces around them are one then.

    Raises:
        InputError: missing values (also "", "nan" and "<NA>" as text), fractional numbers, or twins.
    """
    codes, there = _of_all(obs, column)
    alike: dict[str, list[str]] = {}
    for name in there:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    if not twins and (same := [names for names in alike.values() if len(names) > 1]):
        said = "; ".join(" and ".join(map(repr, names)) for names in same[:5])
        raise InputError(
            f"Labels in {column!r} that differ in case or spaces alone ({len(same)}): {said}. Make them one."
        )
    names = sorted({name.strip() for name in there})
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[name.strip()] for name in there], np.int32)[codes], tuple(names)


def _of_all(obs: pd.DataFrame, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same, with labels as they stand."""
    codes, names = raw_labels(obs, column)
    if missing := int((codes < 0).sum()):
        raise InputError(
            f"Column {column!r} of obs has no label for {missing} of {len(obs)} cells. "
            "Fill them in or remove these cells."
        )
    return codes, names


def raw_labels(obs: pd.DataFrame, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same, with labels as they stand, and code -1 for cells without one.

    Raises:
        InputError: fractional numbers.
    """
    codes, unique = pd.factorize(obs[column])  # -1: missing
    if fractional := [value for value in unique if isinstance(value, float) and not value.is_integer()]:
        raise InputError(f"Column {column!r} of obs holds numbers such as {fractional[0]:g}; labels are needed.")
    texts = [_text(value) for value in unique]
    names = sorted({text for text in texts if text.strip() not in NOT_LABELS})
    place = {name: i for i, name in enumerate(names)}
    return np.array([*(place.get(text, -1) for text in texts), -1], dtype=np.int32)[codes], tuple(names)


def _find(
    obs: pd.DataFrame, what: str, option: str, given: str | None, names: tuple[str, ...], notes: list[str]
) -> str | None:
    """Return the column `given`, or the one with a conventional name; None if there is none."""
    if given is not None:
        if given not in obs.columns:
            available = f"Available: {shown(obs.columns, 30)}.{nearest(given, map(str, obs.columns))}"
            raise InputError(f"No column {given!r} in obs. {available} Pass {option}.")
        return given
    plain = {column: re.sub(r"[^a-z0-9]+", "_", str(column).lower()) for column in obs.columns}
    present = sorted((c for c in obs.columns if plain[c] in names), key=lambda c: names.index(plain[c]))
    several = [column for column in present if obs[column].nunique() > 1]
    candidates = several or present  # a column with one label for all cells says nothing beside one with several
    if not candidates:
        return None
    chosen, others = candidates[0], candidates[1:]
    different = [column for column in others if not _same_labels(obs[chosen], obs[column])]
    if different:
        there = shown(map(repr, candidates))
        raise InputError(f"Several columns of obs may hold the {what}: {there}. Choose one with {option}.")
    same = f" {shown(map(repr, others))} {'has' if len(others) == 1 else 'have'} the same labels." if others else ""
    notes.append(f"The {what} is column {chosen!r} of obs.{same}")
    return str(chosen)


def _text(value: object) -> str:
    if isinstance(value, float) and value.is_integer():  # whole numbers become floats where some cells have none
        return str(int(value))
    return value.decode() if isinstance(value, bytes) else str(value)


def _same_labels(a: pd.Series, b: pd.Series) -> bool:
    """Whether two columns give every cell the same label, whatever their types."""
    return bool(np.array_equal(_as_text(a), _as_text(b)))


def _as_text(values: pd.Series) -> np.ndarray:
    codes, unique = pd.factorize(values)
    return np.array([*map(_text, unique), ""], dtype=object)[codes]  # code -1, missing, is the last: ""
