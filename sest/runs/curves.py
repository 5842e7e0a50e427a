"""The curves of a run, read from its metrics.jsonl.

A line is either a log line (loss, grad_norm, it_per_s ... over the steps since the last one) or a validation (val_loss,
the metrics of sest.training.validate and their baselines).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sest.errors import InputError
from sest.runs.schema import LONGEST_LINE, MOST_BYTES, MOST_LINES, checked_line

METRICS = ("val_loss", "energy_distance", "pearson_delta", "pearson_delta_independent", "mae", "pds")
# baselines with an energy distance and a val_loss, for which they are made into cells
WITH_CELLS = ("controls", "perturbation_mean", "stack")
HIGHER_IS_BETTER = ("pearson_delta", "pearson_delta_independent", "pds")
SMOOTHED = 3  # validations over which a metric of few pairs is averaged, to say which is the best
VAL_PAIRS = "val_pairs"  # in a validation: its (cell type, perturbation) pairs
NOT_MEASURABLE = "val_pairs_not_measurable"  # in a validation: pairs of cell types whose real cells show no effect
NOT_LEARNED = "val_perturbations_not_learned"  # in a validation: their number, where none of them can be learned


def is_no_measure(validation: Mapping[str, Any]) -> bool:
    """Whether nothing about the head follows from a validation, whatever its scores (see sest.runs.diagnose).

    All its perturbations cannot be learned, or all its pairs are of cell types without a measurable effect.
    """
    nothing = validation.get(NOT_MEASURABLE) or 0
    return bool(validation.get(NOT_LEARNED)) or 0 < nothing == validation.get(VAL_PAIRS)


def best_of(values: Sequence[float] | np.ndarray, monitor: str) -> int | None:
    """Which of the validations is the best by the metric `monitor`; None of none that is finite.

    A val_loss or energy_distance is a mean over sets, and counts as it is. The other metrics are means over pairs,
    which are few and swing: each counts as its mean with the two validations before it.
    """
    known = np.asarray(values, np.float64)
    if monitor in HIGHER_IS_BETTER:
        known = -known
    if monitor not in ("val_loss", "energy_distance"):
        known = np.array([known[max(i - SMOOTHED + 1, 0) : i + 1].mean() for i in range(len(known))])
    return int(np.nanargmin(known)) if np.isfinite(known).any() else None


def judged_by(validation: Mapping[str, Any]) -> str:
    """The metric by which a head is held against baselines: runs before sest had energy_distance have val_loss alone.

    A val_loss counts each cell's distance to itself, by which cells of too little spread earn.
    """
    return "energy_distance" if "energy_distance" in validation else "val_loss"


def strongest(validation: Mapping[str, Any]) -> str:
    """The baseline that is shown where there is room for one; runs before sest had the stack know two others."""
    return "stack" if "mae_stack" in validation else "perturbation_mean"


@dataclass(frozen=True, eq=False)
class Curves:
    """Columns of metrics.jsonl, each (lines,) float64 with NaN where a line lacks the value or it was not finite."""

    log: dict[str, np.ndarray]  # of log lines; "step" is always there
    validation: dict[str, np.ndarray]  # of validations; "step" is always there


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; one that a kill cut short is left out.

    Raises:
        InputError: no such file, it cannot be read, or a line is of no run.
    """
    lines = []
    try:
        with metrics.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise InputError(f"{metrics} is larger than {MOST_BYTES >> 20} MiB, which no run writes.")
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if number > MOST_LINES or (len(line) == LONGEST_LINE and not line.endswith(b"\n")):
                    raise InputError(f"{metrics}: line {number:,} is longer, or further down, than any of a run.")
                if (found := checked_line(line, f"{metrics}, line {number:,}")) is not None:
                    lines.append(found)
    except OSError as error:
        raise InputError(f"Cannot read {metrics}: {error}.") from error
    return lines


def curves_of(lines: Iterable[dict[str, Any]]) -> Curves:
    """Sort lines into the two kinds."""
    both = list(lines)
    return Curves(
        _columns([line for line in both if "val_loss" not in line]),
        _columns([line for line in both if "val_loss" in line]),
    )


def read_curves(metrics: Path) -> Curves:
    """The curves of a metrics.jsonl. Raises InputError as `read_lines`."""
    return curves_of(read_lines(metrics))


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {"step": None} | {name: None for line in lines for name in line}
    return {name: np.array([_number(line.get(name)) for line in lines], dtype=np.float64) for name in names}


def _number(value: Any) -> float:
    """NaN for null (a number that was not finite), for words and for what is not there."""
    return float(value) if isinstance(value, (int, float)) else float("nan")
