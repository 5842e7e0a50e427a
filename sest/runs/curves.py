"""The curves of a run, read from its metrics.jsonl.

A line is either a log line (loss, grad_norm, it_per_s ... over the steps since the last one) or a validation (val_loss,
the metrics of sest.training.validate and their baselines).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sest.errors import InputError

METRICS = ("val_loss", "pearson_delta", "mae", "pds")
BASELINES = ("perturbation_mean", "controls")
HIGHER_IS_BETTER = ("pearson_delta", "pds")
VAL_PAIRS = "val_pairs"  # in a validation: its (cell type, perturbation) pairs
NOT_MEASURABLE = "val_pairs_not_measurable"  # in a validation: pairs of cell types whose real cells show no effect
NOT_LEARNED = "val_perturbations_not_learned"  # in a validation: their number, where none of them can be learned


def is_no_measure(validation: Mapping[str, Any]) -> bool:
    """Whether nothing about the head follows from a validation, whatever its scores (see sest.runs.diagnose).

    All its perturbations cannot be learned, or all its pairs are of cell types without a measurable effect.
    """
    nothing = validation.get(NOT_MEASURABLE) or 0
    return bool(validation.get(NOT_LEARNED)) or 0 < nothing == validation.get(VAL_PAIRS)


@dataclass(frozen=True, eq=False)
class Curves:
    """Columns of metrics.jsonl, each (lines,) float64 with NaN where a line lacks the value or it was not finite."""

    log: dict[str, np.ndarray]  # of log lines; "step" is always there
    validation: dict[str, np.ndarray]  # of validations; "step" is always there


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; one that a kill cut short is left out.

    Raises:
        InputError: no such file, or it cannot be read.
    """
    try:
        text = metrics.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {metrics}: {error}.") from error
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
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
