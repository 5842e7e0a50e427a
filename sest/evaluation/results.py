"""The scores of one prediction: a table, its means, and the folder they are written to."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sest.cache.disk import folder_aside, write_flushed
from sest.errors import InputError
from sest.evaluation.ceiling import Ceiling
from sest.evaluation.metrics import mean_score
from sest.outputs import check_output, to_csv

FILES = RESULTS, SUMMARY = "results.csv", "summary.json"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of one prediction and of the baselines on the same pairs."""

    table: pd.DataFrame
    """One row a (cell_type, perturbation, predictor): n_predicted, n_real, pearson_delta, pearson_delta_independent,
    mae, pds, energy_distance and, where cell-eval ran, des, cell_eval_mae, cell_eval_pds. `predictor`: model, controls
    or a stored baseline."""
    summary: dict[str, dict[str, float]]
    """metric -> predictor -> mean over all pairs; real_half is that of `ceilings`. Where cell-eval ran also
    overall_score_over: baseline -> the model's overall score with that baseline as zero (1 is perfect, worse than the
    baseline counts as 0)."""
    provenance: dict[str, object]
    notes: tuple[str, ...]
    """What was decided for the user, one sentence each."""
    ceilings: tuple[Ceiling, ...] = ()
    """How well half of the real cells of each cell type predicts the other half; without those of too few cells."""

    def __repr__(self) -> str:
        """The summary as a small table, for notebooks."""
        means = pd.DataFrame.from_dict(self.summary, orient="index").to_string(float_format="{:.4f}".format, na_rep="-")
        pairs = self.table.drop_duplicates(["cell_type", "perturbation"])
        return f"Evaluation of {len(pairs)} pairs (cell type, perturbation), means over them:\n{means}"

    def write(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write results.csv (the table) and summary.json (metrics, provenance, notes; sorted keys) into `folder`.

        The folder appears with both files or not at all. `force`: an older evaluation there is replaced.

        Raises:
            InputError: the folder holds an evaluation or something else, or cannot be made (see `check_output`).
        """
        inputs = [str(self.provenance[name]) for name in ("predicted", "real") if name in self.provenance]
        check_output(folder, inputs=inputs, force=force, made=FILES)
        summary = {
            "metrics": {metric: _finite(scores) for metric, scores in self.summary.items()},
            "ceilings": [_plain(dataclasses.asdict(c)) | {"is_measurable": c.is_measurable} for c in self.ceilings],
            "notes": self.notes,
            "provenance": self.provenance,
        }
        text = json.dumps(summary, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with folder_aside(Path(folder).resolve(), parents=True) as aside:
            write_flushed(aside / RESULTS, str(to_csv(self.table)).encode())
            write_flushed(aside / SUMMARY, text.encode())


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """What `Evaluation.write` wrote.

    Raises:
        InputError: no such folder, or its files are not those of an evaluation.
    """
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(f"{folder} is no folder that `sest evaluate` wrote: it has no {' and no '.join(missing)}.")
    names = dict.fromkeys(("cell_type", "perturbation", "predictor"), str)
    try:
        table = pd.read_csv(folder / RESULTS, dtype=names, keep_default_na=False, na_values=[""])  # "NA" is a name
        told = json.loads((folder / SUMMARY).read_text())
        table[["n_real", "pearson_delta", "mae", "pds"]].astype(np.float64)
        table[list(names)]
        nan = float("nan")
        summary = {
            str(metric): {str(name): nan if value is None else float(value) for name, value in scores.items()}
            for metric, scores in told["metrics"].items()
        }
        ceilings = []
        for one in told["ceilings"]:
            values: dict[str, Any] = {field.name: one[field.name] for field in dataclasses.fields(Ceiling)}
            values |= {key: nan for key, value in values.items() if value is None}
            ceilings.append(Ceiling(**values))
        return Evaluation(table, summary, dict(told["provenance"]), tuple(map(str, told["notes"])), tuple(ceilings))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} cannot be read as an evaluation ({error}). Run `sest evaluate` again.") from error


def means_over_pairs(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """metric -> predictor -> mean over all pairs of `Evaluation.table`; NaN where one of them is NaN.

    The mean of pds is that of the pairs that have one: a cell type of one perturbation has none.
    """
    of_predictor = dict(list(table.groupby("predictor", sort=False)))
    return {
        str(metric): {
            str(name): mean_score(str(metric), rows[metric].to_numpy()) for name, rows in of_predictor.items()
        }
        for metric in table.select_dtypes("floating")
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in values.items()
    }


def _finite(scores: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: null."""
    return {name: score if np.isfinite(score) else None for name, score in scores.items()}
