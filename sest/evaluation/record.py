"""What `sest predict` says of its cells in uns["sest"], read from a file that is not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sest.baselines.effects import BASELINES
from sest.cells.labels import same_targets
from sest.errors import InputError, shown
from sest.files.cell_file import CellFile
from sest.files.nodes import check_below, child, damage_is_bad_input

MAX_STORED = 2**32  # bytes of one array of uns that is read
NOT_STORED = ("model", "controls")  # predictors that are always computed from the cells
DRAW = "sest_draw"  # in obs: what was predicted together, see sest.prediction.draws; -1 of real cells
SOURCE = "sest_control"  # in obs: which control cell each was predicted from, within its cell type; -1 of real cells
FOLLOWED = "follows_controls"  # in the record: see `Record.followed`
MOST_FOLLOWED = 100.0  # a share; more is no prediction's
BASELINES_VERSION = 2  # before, context_mean was the name of the controls


@dataclass(frozen=True, eq=False)
class Record:
    """Labels and normalisation of a prediction, and the baselines' pseudobulks. G genes."""

    columns: dict[str, str]  # perturbation, cell_type: obs columns; control: a label
    is_log1p: bool  # the run was trained on log1p values as they were, however they were normalised
    target_sum: float | None  # counts a cell, where the run was trained on counts
    baselines: dict[str, np.ndarray]  # name -> (rows, G)
    pairs: dict[str, Any]  # cell_type, perturbation: of those rows
    made_by: dict[str, Any] = field(default_factory=dict)  # run, checkpoint, step, model_sha256, cache_sha256
    draw: np.ndarray | None = None  # (N,) what each cell was predicted in, see sest.prediction.draws
    source: np.ndarray | None = None  # (N,) which control each cell is from
    followed: float | None = None  # how much of a change in the controls' mean predicted means follow
    controls: dict[str, Any] = field(default_factory=dict)  # cell_type; mean (cell types, G) that effects are added to
    is_mixed: bool = False  # the run was trained, as asked, on files that were normalised differently

    def baselines_of(self, pairs: list[tuple[str, str]], n_genes: int) -> dict[str, np.ndarray]:
        """The stored baselines in the order of `pairs` (cell type, perturbation), each (n_pairs, G) float64.

        Raises:
            InputError: a baseline that lacks a pair or is no finite table of that width.
        """
        if not self.baselines:
            return {}
        rows = pd.MultiIndex.from_arrays([np.asarray(self.pairs[key], str) for key in ("cell_type", "perturbation")])
        spelled = same_targets({name for _, name in pairs}, rows.get_level_values(1))
        at = rows.get_indexer(pd.MultiIndex.from_tuples([(kind, spelled[name]) for kind, name in pairs]))
        for name, values in self.baselines.items():
            if values.shape != (len(rows), n_genes) or values.dtype.kind != "f" or not np.isfinite(values).all():
                what = f"{name!r} is not {len(rows)} x {n_genes} finite numbers"
            elif (at < 0).any():
                what = f"{name!r} lacks {int((at < 0).sum())} of its pairs"
            else:
                continue
            raise InputError(f"The prediction's stored baseline {what}. Run `sest predict` again.")
        order = sorted(self.baselines, key=lambda name: (BASELINES.index(name) if name in BASELINES else -1, name))
        return {name: self.baselines[name][at].astype(np.float64) for name in order}

    def control_means(self, cell_types: Sequence[str], n_genes: int) -> np.ndarray | None:
        """(cell types, G) float64 that the predicted effects are added to; None where it does not say.

        Raises:
            InputError: a cell type that lacks, or no finite table of that width.
        """
        if not self.controls:
            return None
        names = np.asarray(self.controls["cell_type"], str).tolist()
        mean = np.asarray(self.controls["mean"])
        is_table = mean.shape == (len(names), n_genes) and mean.dtype.kind == "f" and np.isfinite(mean).all()
        if not is_table or not set(cell_types) <= set(names):
            raise InputError("The prediction's stored means of controls are damaged. Run `sest predict` again.")
        return mean[[names.index(name) for name in cell_types]].astype(np.float64)


def read_record(file: CellFile) -> Record | None:
    """Read uns["sest"]; None for a file that `sest predict` did not write.

    Raises:
        InputError: a record with links, absurd sizes, or without what belongs to it.
    """
    from anndata.io import read_elem  # slow to import

    with damage_is_bad_input(file.path):
        uns = child(file.root, "uns") if "uns" in file.root else {}
        if "sest" not in uns:
            return None
        stored = child(uns, "sest")
        check_below(stored, MAX_STORED)
        told: dict[str, Any] = read_elem(stored)
    needed: dict[str, tuple[str, ...]] = {"columns": ("perturbation", "cell_type", "control")}
    if "baselines" in told:
        needed["pairs"] = ("cell_type", "perturbation")
    if "controls" in told:
        needed["controls"] = ("cell_type", "mean")
    absent = [f"{group}/{key}" for group, keys in needed.items() for key in keys if key not in told.get(group, {})]
    if absent:
        raise InputError(f"{file.path}: uns['sest'] has no {shown(absent)}. Run `sest predict` again.")
    not_stored = NOT_STORED if told.get("baselines_version", 1) >= 2 else (*NOT_STORED, "context_mean")
    is_log1p, target_sum = told.get("scale") == "log1p", told.get("target_sum")
    return Record(
        columns={key: str(told["columns"][key]) for key in (*needed["columns"], "labels") if key in told["columns"]},
        is_log1p=is_log1p,
        target_sum=None if is_log1p or target_sum is None else float(target_sum),
        baselines={k: np.asarray(v) for k, v in told.get("baselines", {}).items() if k not in not_stored},
        pairs=told.get("pairs", {}),
        made_by=_made_by(told.get("provenance", {})),
        draw=_numbers(file, DRAW),
        source=_numbers(file, SOURCE),
        followed=_followed(told, file),
        controls=told.get("controls", {}),
        is_mixed=told.get("scale") == "mixed",
    )


def _numbers(file: CellFile, name: str) -> np.ndarray | None:
    if name not in file.obs:
        return None
    numbers = file.obs[name].to_numpy()
    if numbers.dtype.kind not in "iu":
        raise InputError(f"{file.path}: {name} in obs is no column of whole numbers. Run `sest predict` again.")
    return numbers


def _followed(told: dict[str, Any], file: CellFile) -> float | None:
    if FOLLOWED not in told:
        return None
    share = np.asarray(told[FOLLOWED])
    if share.shape or share.dtype.kind != "f" or not abs(share) <= MOST_FOLLOWED:
        raise InputError(f"{file.path}: uns['sest'] has a {FOLLOWED} that is no share. Run `sest predict` again.")
    return float(share)


def _made_by(told: dict[str, Any]) -> dict[str, Any]:
    """Which checkpoint predicted, by plain values."""
    found = {key: str(told[key]) for key in ("run", "checkpoint", "model_sha256", "cache_sha256") if key in told}
    return found | ({"step": int(told["step"])} if "step" in told else {})
