"""What the tables of a file mean: which obs columns hold labels, which label is the control, which genes are known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
BATCH_COLUMNS = ("batch", "batch_var", "gem_group", "gem_batch", "sample", "replicate", "plate", "donor")
# Conventional control labels; compared without case and punctuation.
CONTROL_LABELS = frozenset(
    "nontargeting nontargetingcontrol control ctrl nt ntc negativecontrol negctrl scramble scrambled safetargeting "
    "vehicle dmso dmsotf unperturbed mock untreated".split()
)
NOT_LABELS = frozenset(("", "nan", "NaN", "<NA>"))  # what a missing value becomes when a column is turned into text
MIN_GENES = 4  # slot 0 of a sentence carries the weight of kept gene number 3 (upstream's cls_token_idx)


@dataclass(frozen=True)
class Columns:
    """The obs columns that hold labels, and the control's label; None where the file has none."""

    perturbation: str | None
    cell_type: str | None
    batch: str | None
    control: str | None
    notes: tuple[str, ...]  # what was detected rather than given, one sentence each


@dataclass(frozen=True, eq=False)
class GeneMatch:
    """The genes of a file (G) that an encoder knows."""

    column: str  # the var column whose names matched best, or "var index"
    names: tuple[str, ...]  # (G,) all names in that column, "" where it has none
    positions: np.ndarray  # (kept,) int64 ascending: the genes that are known
    tokens: np.ndarray  # (kept,) int64: where each of them is in `known`


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


def match_genes(var: pd.DataFrame, known: Sequence[str], *, minimum: float = 0.1) -> GeneMatch:
    """Find the genes of a file among the `known` names, by the var index or the text column with most matches.

    Raises InputError if fewer than 4 genes or less than the share `minimum` of the file's genes is known (a small panel
    of known genes is fine), and if two genes of the file have the same known name.
    """
    index = pd.Index(known)
    assert index.is_unique
    tried = {"var index": _names(var.index.to_series())}
    for column in var.columns:
        if isinstance(var[column].dtype, pd.CategoricalDtype | pd.StringDtype) or var[column].dtype == object:
            tried[str(column)] = _names(var[column])
    tokens = {column: index.get_indexer(names) for column, names in tried.items()}
    found = {column: len(np.unique(t[t >= 0])) for column, t in tokens.items()}  # different genes
    best = max(tried, key=lambda column: (found[column], -int((tokens[column] >= 0).sum())))  # first of equals
    if found[best] < max(MIN_GENES, math.ceil(minimum * len(var))):
        raise InputError(_too_few(tried, found, known))
    positions = np.flatnonzero(tokens[best] >= 0)
    kept = tokens[best][positions]
    twice = np.flatnonzero(np.bincount(kept) > 1)
    if len(twice):
        raise InputError(
            f"{len(twice)} known genes are there more than once ({best}): {shown(known[i] for i in twice.tolist())}. "
            "Sum or drop the extra ones and save the file again."
        )
    return GeneMatch(best, tuple(tried[best]), positions.astype(np.int64), kept.astype(np.int64))


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
            raise InputError(f"No control cells: no cell has the label {given!r}.{nearest(given, names)} {frequent}")
        return given
    found = [i for i, text in enumerate(plain) if text in CONTROL_LABELS]
    if not found:
        raise InputError(f"No control cells: no label is a usual name for them. {frequent}")
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


def _names(values: pd.Series) -> list[str]:
    return ["" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)]


def _too_few(tried: dict[str, list[str]], found: dict[str, int], known: Sequence[str]) -> str:
    """Say how many genes each column has in common with `known`, and what its names look like."""
    lower = {name.lower() for name in known}
    tries = []
    for column, names in tried.items():
        ignoring_case = len({name.lower() for name in names} & lower)
        case = f", {ignoring_case} ignoring case" if ignoring_case > 2 * found[column] else ""
        tries.append(f"{column} {found[column]}{case}{_looks_like(names)}")
    genes = len(next(iter(tried.values())))
    return (
        f"Too few of the file's {genes} genes are known to the encoder; matches by var column: {shown(tries)}. "
        f"It knows {len(known)} names such as {shown(known[:3])}{_looks_like(known)}. Add a var column with such names."
    )


def _looks_like(names: Sequence[str]) -> str:
    sample = [name for name in names[:1000] if name]
    for pattern, words in ((r"ENS[A-Z]*[GTP]\d{6,}(\.\d+)?", "ENSEMBL ids"), (r"\d+", "Entrez numbers")):
        if sum(re.fullmatch(pattern, name) is not None for name in sample) > len(sample) / 2:
            return f" (these look like {words})"
    return ""
