"""The stages from cells to a report: embed, train, predict, evaluate, report.

Each is the function behind the command of its name, which is told before it is carried out. A stage that was finished
before is passed over; one that was stopped goes on where its command would.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from sest.cache.disk import sha256, write_durably
from sest.config import EmbedConfig, EvaluateConfig, PredictConfig
from sest.embedding.embed import embed
from sest.evaluation.evaluate import evaluate
from sest.evaluation.results import Evaluation
from sest.machine.signals import Interrupted
from sest.options import Config
from sest.prediction.predict import predict
from sest.report.write import Report, refuse_without_plotly, write_report
from sest.runs.run_folder import CONFIG, config_of
from sest.runs.schema import BEST, LAST
from sest.runs.schema import STATE as CHECKPOINT
from sest.training.train import TrainResult, train

if TYPE_CHECKING:
    from sest.data.dataset import Dataset
    from sest.head.model import StateTransition

EMBED, TRAIN, PREDICT, EVALUATE, REPORT = STAGES = ("embed", "train", "predict", "evaluate", "report")
STATE = "pipeline.toml"  # what a folder was begun with, and which stages are finished
CACHE, RUN = "cache.zarr", "run"
MADE = (STATE, "splits.toml", CACHE, RUN, "predicted.h5ad", "evaluation", "report.html")
MAY_CHANGE = ("max_steps", "device")  # options that another call may have


class Watcher:
    """Is told what is carried out. This one says nothing."""

    def command(self, line: str) -> None:
        """A stage begins: the command line that does the same, as it would be typed."""

    def passed_over(self, stage: str, made: Path) -> None:
        """A stage was finished before."""

    def note(self, text: str) -> None:
        """One sentence the user should read."""

    def facts(self, cells: Path, facts: dict[str, Any]) -> None:
        """What `sest info` says of the cells."""

    def started(self, data: Dataset, model: StateTransition | None) -> None:
        """Training begins."""

    def logged(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def finished(self, stage: str, result: Any) -> None:
        """A stage ended with what its function returns."""


@dataclass
class Ledger:
    """Which stages are finished; kept in a file, where there is one."""

    path: Path | None = None
    begun_with: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    predicted_from: str = ""  # `identity` of the run that what follows it was made from

    def begin(self, stage: str) -> None:
        """Forget that this stage and those behind it were finished."""
        self.done = [name for name in self.done if STAGES.index(name) < STAGES.index(stage)]
        self.save()

    def finish(self, stage: str) -> None:
        self.done.append(stage)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write_durably(self.path, tomli_w.dumps(self._values()).encode())

    def _values(self) -> dict[str, Any]:
        return {**self.begun_with, "done": self.done, "predicted_from": self.predicted_from}


@dataclass(frozen=True)
class Plan:
    """What is to be carried out: the options of each stage, and where everything lies."""

    cells: Path
    folder: Path
    splits: Path
    embed: EmbedConfig
    train: Mapping[str, Any]  # of TrainConfig, those that were given
    evaluate: EvaluateConfig
    predict: PredictConfig = field(default_factory=PredictConfig)
    data_roots: tuple[Path, ...] = ()

    @property
    def cache(self) -> Path:
        return self.folder / CACHE

    @property
    def run(self) -> Path:
        return self.folder / RUN

    @property
    def predicted(self) -> Path:
        return self.folder / "predicted.h5ad"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


@dataclass(frozen=True)
class PipelineResult:
    """What the stages came to; None for those that were finished before."""

    plan: Plan
    training: TrainResult | None
    evaluation: Evaluation | None
    report: Report | None


def carry_out(plan: Plan, watcher: Watcher, ledger: Ledger) -> PipelineResult:
    """The stages of a plan, one after another, but for those that are finished.

    Raises:
        InputError: plotly is not installed, so that the last one could not be carried out, and what each stage says.
        Interrupted: after SIGINT or SIGTERM; finished stages are kept.
    """
    refuse_without_plotly()
    results: dict[str, Any] = {}
    stages = {EMBED: _embed, TRAIN: _train, PREDICT: _predict, EVALUATE: _evaluate, REPORT: _report}
    made = {
        EMBED: plan.cache, TRAIN: plan.run, PREDICT: plan.predicted, EVALUATE: plan.evaluation, REPORT: plan.report,
    }  # fmt: skip
    for stage, carry in stages.items():
        if stage == PREDICT and ledger.predicted_from != (trained := identity(plan.run)):
            if stage in ledger.done:
                watcher.note(f"{plan.run} is another than when it predicted: what follows it is made again.")
            ledger.begin(stage)
            ledger.predicted_from = trained
        if stage in ledger.done and made[stage].exists():
            watcher.passed_over(stage, made[stage])
            continue
        ledger.begin(stage)
        try:
            results[stage] = carry(plan, watcher)
        except Interrupted as stopped:
            again = f"{stopped} Or `sest run` again, as before: it goes on there." if ledger.path else str(stopped)
            raise Interrupted(stopped.signum, again) from stopped
        ledger.finish(stage)
        watcher.finished(stage, results[stage])
    return PipelineResult(plan, results.get(TRAIN), results.get(EVALUATE), results.get(REPORT))


def identity(run: Path) -> str:
    """What its checkpoints say of themselves, hashed: another after more steps, also by `sest train`."""
    said = [path.read_bytes() for name in (BEST, LAST) if (path := run / name / CHECKPOINT).is_file()]
    return sha256(b"".join(said))


def command_line(*words: object) -> str:
    """A command of sest as a line for a shell."""
    return shlex.join(["sest", *map(str, words)])


def as_options(values: Mapping[str, Any], defaults: Mapping[str, Any] = {}) -> list[object]:
    """Values as options of a command line, but for those that are the defaults."""
    words: list[object] = []
    for key, value in values.items():
        if value is None or value == defaults.get(key):
            continue
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, one]
    return words


def changed(config: Config) -> list[object]:
    """Its values that are not the defaults, as options of a command line."""
    return as_options(config.to_values(), type(config)().to_values())


# ---- the stages


def _embed(plan: Plan, watcher: Watcher) -> Any:
    options = [*changed(plan.embed), *as_options({"data_root": plan.data_roots})]
    watcher.command(command_line("embed", plan.splits, "--cache", plan.cache, *options))
    return embed([plan.splits], plan.cache, plan.embed, data_roots=plan.data_roots)


def _train(plan: Plan, watcher: Watcher) -> TrainResult:
    if plan.train.get("head") == "none" and plan.run.exists():
        shutil.rmtree(plan.run)  # stopped in the seconds that it takes, which cannot be resumed
    resume = "auto" if (plan.run / CONFIG).exists() else None
    given = plan.train if resume is None else {k: v for k, v in plan.train.items() if k in MAY_CHANGE}
    words = as_options({"resume": resume, **given})
    watcher.command(command_line("train", plan.cache, "--run", plan.run, *words))
    config = config_of(plan.run, dict(given), resume, "the options")
    return train(
        plan.cache, plan.run, config, resume=resume, given=given, on_start=watcher.started, on_log=watcher.logged
    )


def _predict(plan: Plan, watcher: Watcher) -> Any:
    force = plan.predicted.exists()
    forced = ("--force",) if force else ()
    watcher.command(command_line("predict", plan.run, "--out", plan.predicted, *changed(plan.predict), *forced))
    return predict(plan.run, plan.predicted, plan.predict, force=force)


def _evaluate(plan: Plan, watcher: Watcher) -> Evaluation:
    force = plan.evaluation.exists()
    options = [*changed(plan.evaluate), *(("--force",) if force else ())]
    watcher.command(command_line("evaluate", plan.predicted, plan.cells, "--out", plan.evaluation, *options))
    evaluation = evaluate(plan.predicted, plan.cells, plan.evaluate)
    evaluation.write(plan.evaluation, force=force)
    return evaluation


def _report(plan: Plan, watcher: Watcher) -> Report:
    force = plan.report.exists()
    device = as_options({"device": plan.predict.device}, {"device": "auto"})
    forced = ("--force",) if force else ()
    watcher.command(command_line("report", plan.run, "--out", plan.report, *device, *forced))
    return write_report(plan.run, plan.report, device=plan.predict.device, force=force)
