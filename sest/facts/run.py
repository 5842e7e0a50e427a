"""What a run folder says of itself: its configuration, its curves, its diagnosis and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sest.baselines.effects import BASELINES
from sest.config import TrainConfig
from sest.errors import InputError
from sest.facts.scores import Score, Scoreboard
from sest.runs.checkpoint import Checkpoint, checkpoints, find_checkpoint, sound_checkpoint
from sest.runs.curves import (
    METRICS,
    NOT_LEARNED,
    NOT_MEASURABLE,
    VAL_PAIRS,
    Curves,
    best_of,
    curves_of,
    is_no_measure,
    read_lines,
)
from sest.runs.diagnose import Finding, diagnose
from sest.runs.run_folder import METRICS as METRICS_FILE
from sest.runs.run_folder import read_run_config

NOT_OF_ALL = ("energy_distance", "pearson_delta_independent")  # metrics that older runs lack, or those of few controls


@dataclass(frozen=True, eq=False)
class RunFacts:
    """What a run folder says of itself, without its cache."""

    folder: Path
    name: str
    written: datetime  # when its last line was
    config: TrainConfig
    provenance: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    curves: Curves
    findings: list[Finding]
    checkpoint: Checkpoint | None  # best/, or else the furthest one
    problem: str  # why there is no checkpoint
    given_cache: str | None = None  # where the user says that its cache is

    @property
    def step(self) -> int:
        """The last step that a line tells of."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def cache(self) -> str:
        """Path or URL of its cache, "" where that is not known."""
        return str(self.provenance.get("cache", ""))

    @property
    def state(self) -> dict[str, Any]:
        """The checkpoint's state.json, empty without one."""
        return self.checkpoint.state if self.checkpoint else {}

    def best(self) -> int | None:
        """Which validation is the best by what the run monitors; None before there is one."""
        return best_of(self.curves.validation.get(self.config.monitor, np.zeros(0)), self.config.monitor)

    def scores(self) -> list[Score]:
        """Every metric at the best validation; empty before there is one."""
        best = self.best()
        if best is None:
            return []

        def at(name: str) -> float:
            values = self.curves.validation.get(name)
            return math.nan if values is None else float(values[best])

        columns = self.curves.validation
        baselines = [b for b in BASELINES if any(f"{m}_{b}" in columns for m in METRICS)]
        known = [m for m in METRICS if m not in NOT_OF_ALL or m in columns]
        return [Score(m, at(m), {b: at(f"{m}_{b}") for b in baselines}) for m in known]

    def validation(self) -> Scoreboard | None:
        """The scores at the best validation; None before there is one."""
        if not (scores := self.scores()):
            return None
        said = {name: self.last(name) for name in (VAL_PAIRS, NOT_MEASURABLE, NOT_LEARNED)}
        no_measure = ""
        if is_no_measure(said):
            why = "training says nothing about its perturbations" if said[NOT_LEARNED] else "no measurable effect"
            no_measure = f"The validation is no measure of the head ({why}): no score there is a win or a loss."
        who = "the stack of baselines" if self.config.head == "none" else "the head alone"
        return Scoreboard(
            of="validation",
            by=f"{who} at the best {self.config.monitor}, step {self.best_step:,}",
            scores=tuple(scores),
            n_pairs=int(said[VAL_PAIRS] or 0),
            real_half={m: half for m in METRICS if (half := self.last(f"{m}_real_half")) is not None},
            is_measured=said[NOT_MEASURABLE] is not None,
            no_measure=no_measure,
        )

    @property
    def best_step(self) -> int | None:
        best = self.best()
        return None if best is None else int(self.curves.validation["step"][best])

    def last(self, name: str) -> Any:
        """The last value of a key over all lines, None where no line has it."""
        return next((line[name] for line in reversed(self.lines) if line.get(name) is not None), None)


def read_runs(folders: Iterable[Path], *, cache: str | None = None, perturbations: str | None = None) -> list[RunFacts]:
    """Read run folders, each once, and name them so that no two have the same name.

    Args:
        cache, perturbations: where the cache and the features file are now, if not where the runs say.

    Raises:
        InputError: a folder is no run, its metrics.jsonl cannot be read, it is given twice, or there is none.
    """
    given = [folder.resolve() for folder in folders]
    if not given:
        raise InputError("No run is given. Name one run folder at least.")
    if twice := [folder for folder in given if given.count(folder) > 1]:
        raise InputError(f"{twice[0]} is given twice. Name every run once.")
    names = [
        (f.parent if (f.parent / "pipeline.toml").is_file() else f).name for f in given
    ]  # of `sest run`: its folder's
    names = [
        name if names.count(name) == 1 else f"{f.parent.name}/{f.name}" for f, name in zip(given, names, strict=True)
    ]
    return [_read_run(f, name, cache, perturbations) for f, name in zip(given, names, strict=True)]


def _read_run(folder: Path, name: str, cache: str | None, perturbations: str | None) -> RunFacts:
    values, provenance = read_run_config(folder)
    if cache is not None:
        provenance["cache"] = cache
    if perturbations is not None:
        values["perturbations"] = perturbations
    config = TrainConfig.from_values(values, str(folder / "config.toml"))
    lines = read_lines(folder / METRICS_FILE)
    curves = curves_of(lines)
    checkpoint, problem = None, f"{folder} has no checkpoint yet."
    if checkpoints(folder):
        try:
            checkpoint = sound_checkpoint(find_checkpoint(folder))
        except InputError as error:
            problem = str(error)
    findings = diagnose(
        curves,
        run=str(folder),
        cache=str(provenance.get("cache", "CACHE")),
        max_steps=config.max_steps,
        patience=config.patience if config.early_stopping else None,
        config=config,
        encoder=str(checkpoint.state["encoder"]["name"]) if checkpoint is not None else "",
    )
    written = datetime.fromtimestamp((folder / METRICS_FILE).stat().st_mtime, UTC)
    return RunFacts(folder, name, written, config, provenance, lines, curves, findings, checkpoint, problem, cache)
