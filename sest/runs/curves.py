"""The curves of a run, read from its metrics.jsonl.

A line is either a log line (loss, grad_norm, it_per_s ... over the steps since the last one) or a validation (val_loss,
the metrics of sest.training.validate and their baselines).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sest.errors import InputError
from sest.runs.schema import LAST, LONGEST_LINE, MOST_BYTES, MOST_LINES, checked_line, read_state

logger = logging.getLogger(__name__)
METRICS = ("val_loss", "energy_distance", "pearson_delta", "pearson_delta_independent", "mae", "pds")
# baselines with an energy distance and a val_loss, for which they are made into cells
WITH_CELLS = ("controls", "perturbation_mean", "stack")
HIGHER_IS_BETTER = ("pearson_delta", "pearson_delta_independent", "pds")
NEIGHBOURS = 4  # validations on either side of the best that say how much one differs by chance
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


@dataclass(frozen=True)
class Judged:
    """How a head stands at its best validation beside what needs no network, by the metric that counts."""

    step: float
    metric: str  # see `judged_by`; lower is better
    value: float
    smoothed: float  # mean with the validations on either side: the best of many is lucky
    baselines: dict[str, float]  # of WITH_CELLS, those that are known
    spread: float  # two standard errors of that mean: what it differs by for no reason
    n_pairs: int  # 0: not known

    @property
    def best(self) -> str:
        """The best baseline."""
        return min(self.baselines, key=self.baselines.__getitem__)

    @property
    def is_level(self) -> bool:
        """Whether head and best baseline differ by no more than validations do."""
        return abs(self.smoothed - self.baselines[self.best]) <= self.spread


def judged(validation: Mapping[str, np.ndarray], monitor: str = "val_loss") -> Judged | None:
    """The validation that the metric `monitor` says is the best; None where there is none, or no number in it."""
    best = best_of(validation.get(monitor, np.zeros(0)), monitor)
    if best is None:
        return None
    metric = judged_by(validation)
    values = validation[metric]
    known = {name: validation.get(f"{metric}_{name}", np.full(len(values), np.nan)) for name in WITH_CELLS}
    if not np.isfinite(values[best]):
        return None
    beside = values[max(best - 1, 0) : best + 2]
    beside, noise = beside[np.isfinite(beside)], _noise(values[max(best - NEIGHBOURS, 0) : best + NEIGHBOURS + 1])
    return Judged(
        step=float(validation["step"][best]),
        metric=metric,
        value=float(values[best]),
        smoothed=float(beside.mean()),
        baselines={name: float(of[best]) for name, of in known.items() if np.isfinite(of[best])},
        spread=2 * noise / float(np.sqrt(len(beside))),
        n_pairs=int(pairs[best]) if (pairs := validation.get(VAL_PAIRS)) is not None and pairs[best] > 0 else 0,
    )


def _noise(values: np.ndarray) -> float:
    """Standard deviation of single values around a straight line through their neighbours; 0 of fewer than four."""
    bends = np.diff(values, 2)
    bends = bends[np.isfinite(bends)]
    return float(np.median(np.abs(bends)) / 0.6745 / np.sqrt(6)) if len(bends) > 1 else 0.0


@dataclass(frozen=True)
class SteadySpeed:
    """How fast a run trains once it is under way."""

    it_per_s: float  # median over the second half of its steps
    limit: float  # of the device for such a step; NaN: not known

    @property
    def share(self) -> float:
        """Of the limit; NaN: not known."""
        return self.it_per_s / self.limit


def steady_speed(log: Mapping[str, np.ndarray]) -> SteadySpeed | None:
    """The one speed that is said everywhere; None before there is one. log: columns of log lines."""
    steps, speed = finite(log, "it_per_s")
    if not len(steps):
        return None
    _, limit = finite(log, "limit_it_per_s")
    late = speed[steps >= (steps[0] + steps[-1]) / 2]
    return SteadySpeed(float(np.median(late)), float(limit[-1]) if len(limit) else float("nan"))


def finite(columns: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column where it is a number."""
    values = columns.get(name, np.full(len(columns["step"]), np.nan))
    known = np.isfinite(values)
    return columns["step"][known], values[known]


def strongest(validation: Mapping[str, Any]) -> str:
    """The baseline that is shown where there is room for one; runs before sest had the stack know two others."""
    return "stack" if "mae_stack" in validation else "perturbation_mean"


@dataclass(frozen=True, eq=False)
class Curves:
    """Columns of metrics.jsonl, each (lines,) float64 with NaN where a line lacks the value or it was not finite."""

    log: dict[str, np.ndarray]  # of log lines; "step" is always there
    validation: dict[str, np.ndarray]  # of validations; "step" is always there


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; one that a kill cut short is left out, and fewer than were saved is said.

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
    with suppress(InputError, OSError):  # of a checkpoint that is damaged or not there: said by what needs it
        if len(lines) < (saved := read_state(metrics.parent / LAST)["run"].get("lines", 0)):
            _say_fewer(metrics, len(lines), saved)
    return lines


@cache
def _say_fewer(metrics: Path, n: int, saved: int) -> None:
    """Once: several parts of a command read them."""
    logger.warning(
        f"{metrics} has {n:,} whole lines, and had {saved:,} when {LAST}/ was saved: the others were cut off, or "
        " the run went back to an earlier step."
    )


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
