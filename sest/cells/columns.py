"""Which obs columns of a file hold labels, and which label is the control."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

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
# Conventional control labels; compared without case and punctuation.
CONTROL_LABELS = frozenset(
    "nontargeting nontargetingcontrol control ctrl nt ntc negativecontrol negctrl scramble scrambled safetargeting "
    "vehicle dmso dmsotf unperturbed mock untreated".split()
)
NOT_LABELS = frozenset(("", "nan", "NaN", "<NA>"))  # what a missing value becomes when a column is turned into text


@dataclass(frozen=True)
class Columns:
    """The obs columns that hold labels, and the control's label; None where the file has none."""

    perturbation: str | None
    cell_type: str | None
    batch: str | None
    control: str | None
    notes: tuple[str, ...]  # what was detected rather than given, one sentence each


class NoControlError(InputError):
    """No cell of a file has the control's label."""


def detect_columns(
    obs: pd.DataFrame,
    *,
    pert_col: str | None = None,
    cell_type_col: str | None = None,
    batch_col: str | None = None,
    control: str | None = None,
) -> Columns:
    """Find the label columns by their conventional names, and the control; what is given is checked and used.

    Raises InputError for a given name that does not exist, for several candidates that disagree, for cells without a
    perturbation label, and for a perturbation column in which no label, or more than one, is a conventional control.
    """
    notes: list[str] = []
    perturbation = _find(obs, "perturbation", "--pert-col", pert_col, PERTURBATION_COLUMNS, notes)
    cell_type = _find(obs, "cell type", "--cell-type-col", cell_type_col, CELL_TYPE_COLUMNS, notes)
    cell_type = cell_type or _find(obs, "cell type", "--cell-type-col", None, CONTEXT, notes)
    batch = _find(obs, "batch", "--batch-col", batch_col, BATCH_COLUMNS, notes)
    if perturbation is not None:
        control = _find_control(obs, perturbation, control, notes)
    elif control is not None:
        raise InputError(
            f"--control {control!r} needs a perturbation column. Available: {shown(obs.columns)}. Pass --pert-col."
        )
    return Columns(perturbation, cell_type, batch, control, tuple(notes))


def usual_columns(
    obs: pd.DataFrame,
    usual: Mapping[str, str | None],
    *,
    pert_col: str | None,
    cell_type_col: str | None,
    control: str | None,
) -> dict[str, Any]:
    """How `detect_columns` is to read a table: as given, else as the `usual` names say where the table has them.

    Args:
        usual: perturbation, cell_type and control of the cells that `obs` belongs to.

    Returns:
        pert_col, cell_type_col and control; None where they are to be detected.
    """
    pert_col = pert_col or (usual["perturbation"] if usual["perturbation"] in obs else None)
    cell_type_col = cell_type_col or (usual["cell_type"] if usual["cell_type"] in obs else None)
    if control is None and pert_col in obs and usual["control"] in labels(obs, str(pert_col))[1]:
        control = usual["control"]
    return {"pert_col": pert_col, "cell_type_col": cell_type_col, "control": control}


def labels(obs: pd.DataFrame, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return (codes (N,) int32, names sorted): the label of cell i is names[codes[i]].

    Categories, text, booleans and whole numbers are labels. Raises InputError for missing values (also "", "nan" and
    "<NA>" as text) and for fractional numbers.
    """
    codes, unique = pd.factorize(obs[column])  # -1: missing
    if fractional := [value for value in unique if isinstance(value, float) and not value.is_integer()]:
        raise InputError(f"Column {column!r} of obs holds numbers such as {fractional[0]:g}; labels are needed.")
    texts = [_text(value) for value in unique]
    missing = (codes < 0) | np.isin(codes, [i for i, text in enumerate(texts) if text.strip() in NOT_LABELS])
    if missing.any():
        raise InputError(
            f"Column {column!r} of obs has no label for {int(missing.sum())} of {len(obs)} cells. "
            "Fill them in or remove these cells."
        )
    names = sorted(set(texts))
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[text] for text in texts], dtype=np.int32)[codes], tuple(names)


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


def _find_control(obs: pd.DataFrame, column: str, given: str | None, notes: list[str]) -> str:
    codes, names = labels(obs, column)
    counts = np.bincount(codes, minlength=len(names))
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    likely = [any(word in text for word in CONTROL_LABELS if len(word) > 3) for text in plain]
    order = sorted(range(len(names)), key=lambda i: (not likely[i], -counts[i], names[i]))
    frequent = f"Labels in {column!r} (cells): {shown(f'{names[i]!r} ({counts[i]})' for i in order)}. Pass --control."
    if given is not None:
        if given not in names:
            raise NoControlError(
                f"No control cells: no cell has the label {given!r}.{nearest(given, names)} {frequent}"
            )
        return given
    found = [i for i, text in enumerate(plain) if text in CONTROL_LABELS]
    if not found:
        raise NoControlError(f"No control cells: no label is a usual name for them. {frequent}")
    if len(found) > 1:
        both = shown(f"{names[i]!r} ({counts[i]})" for i in found)
        raise InputError(f"Several labels in {column!r} may be the control (cells): {both}. Choose one with --control.")
    notes.append(f"The control is {names[found[0]]!r} ({counts[found[0]]} of {len(obs)} cells).")
    return names[found[0]]


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
