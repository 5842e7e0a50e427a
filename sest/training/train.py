"""Phase two: train the head from a cache. The encoder is never imported here.

`train` reads from top to bottom: prepare, then step, log, evaluate, save. A step depends on (seed, step number) and the
weights alone, so a resumed run is the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sest import progress
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.errors import InputError, TrainingFailed, is_out_of_memory
from sest.head.model import StateTransition, n_parameters
from sest.machine.devices import choose_device, choose_precision, faster_precision, slow_pages
from sest.machine.ranks import SINGLE, Ranks
from sest.machine.signals import Interrupted, StopRequest, TimeLimit, stop_requests
from sest.machine.team import join_team
from sest.options import seconds_of
from sest.outputs import refuse_inside_store
from sest.progress import STEPS
from sest.runs.run_folder import CONFIG, METRICS, SEED, append_metrics, find_start, opened_run, run_is_there
from sest.runs.schema import LAST
from sest.runs.sinks import open_sinks
from sest.training.blend import say_blend
from sest.training.prepare import prepare
from sest.training.trainer import Trainer
from sest.training.without_head import fit_without_head

logger = logging.getLogger(__name__)

Line = dict[str, Any]
FEW_STEPS = 20  # of which nobody asks how long they take
LONG_WAIT = 0.05  # of a step, for cells from files, that is said
TIMED_STEPS, TIMED_SECONDS = 3, 2.0  # steps by which the others are reckoned, or as many as took that long


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    best_step: int | None
    best_val_loss: float | None
    reason: str  # "max_steps", "early_stopping" or "no_head"
    metrics: dict[str, float]  # of the last validation
    n_parameters: int
    blend: tuple[str, ...] = ()  # what head and baselines count in predictions, a sentence each


def train(
    cache: Path,
    run: Path,
    config: TrainConfig,
    *,
    resume: str | None = None,
    ranks: Ranks = SINGLE,
    given: Collection[str] = (),
    on_start: Callable[[Dataset, StateTransition | None], None] | None = None,
    on_log: Callable[[Line], None] | None = None,
) -> TrainResult:
    """Train the head.

    Args:
        cache: a finished cache.
        run: folder for config.toml, metrics.jsonl and checkpoints; must be new unless `resume` is given.
        config: see `TrainConfig`. A resumed run keeps its own; only the fields in `RESUMABLE` may differ.
        resume: "auto" (the run's furthest sound checkpoint; its beginning before there is one), or a checkpoint folder.
        ranks: of the processes that torchrun started, which one this is; the first writes all files.
        given: names of the options that the preset of `config`, where it has one, leaves as they are.
        on_start: is given the data and the model (None: --head none) once, before the first step.
        on_log: is given every line of metrics.jsonl.

    Raises:
        InputError, CacheError: bad input; nothing was trained.
        TrainingFailed: a NaN validation, `max_bad_steps` non-finite steps in a row, or no host memory left; the last
            checkpoint is kept.
        Interrupted: after a signal, or when `max_time` is over; the step was finished and saved to last/.
    """
    refuse_inside_store(run)
    if config.head == "none":
        return _without_head(cache, run, config, resume, ranks, on_start, on_log)
    limit = TimeLimit(seconds_of(config.max_time), time.monotonic())
    device = choose_device(config.device)
    with ExitStack() as stack:
        team = stack.enter_context(join_team(ranks, device))
        start = find_start(run, resume, config)
        trainer = prepare(cache, run, config, device, team, start, given)
        trainer.check_disk()
        if trainer.finished and team.leads:
            logger.info(f"All {trainer.config.max_steps:,} steps are done. A larger --max-steps goes on.")
        if team.leads:
            at = trainer.state.step
            opened = opened_run(run, trainer.config, trainer.data, start, at, trainer.chosen)
            trainer.state.lines = stack.enter_context(opened)
        stop = stack.enter_context(stop_requests(limit=limit))
        stack.enter_context(closing(trainer))
        sinks = stack.enter_context(open_sinks(run, trainer.config, trainer.state.step)) if team.leads else None

        def log(line: Line) -> None:
            if sinks is not None:
                with run_is_there(run):
                    append_metrics(run / METRICS, line)
                trainer.state.lines += 1
                sinks(line)
                if on_log is not None:
                    on_log(line)

        if on_start is not None:
            on_start(trainer.data, trainer.model)
        try:
            reason = _loop(trainer, log, stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingFailed(trainer.out_of_memory()) from error
    state, blend = trainer.state, trainer.blend
    return TrainResult(
        state.step,
        state.best_step,
        state.best_val_loss,
        reason,
        trainer.metrics,
        n_parameters(trainer.model),
        tuple(say_blend(blend, trainer.data, trainer.validator.held)) if blend is not None else (),
    )


def _without_head(
    cache: Path,
    run: Path,
    config: TrainConfig,
    resume: str | None,
    ranks: Ranks,
    on_start: Callable[[Dataset, StateTransition | None], None] | None,
    on_log: Callable[[Line], None] | None,
) -> TrainResult:
    """What `train` does where there is no head: the first process fits the stack."""
    if ranks.rank:
        return TrainResult(0, None, None, "no_head", {}, 0)
    validator, blend, line = fit_without_head(
        cache,
        run,
        config,
        resume=resume,
        on_start=None if on_start is None else lambda data: on_start(data, None),
    )
    if on_log is not None:
        on_log(line)
    metrics = {key: value for key, value in line.items() if key != "step"}
    said = tuple(say_blend(blend, validator.data, validator.held))
    return TrainResult(0, 0, line["val_loss"], "no_head", metrics, 0, said)


def train_seeds(
    folder: Path,
    first: int,
    n_seeds: int,
    train_one: Callable[[Path, int, str | None], object],
    *,
    resume: bool = False,
) -> list[Path]:
    """Train several runs that differ in their seed alone, one after another, each in a folder of its own.

    Args:
        folder: gets seed-0, seed-1 ...; `sest predict` averages the runs in it.
        first: seed of the first; the others count up.
        train_one: trains one run: its folder, seed, and what `resume` of `train` is.
        resume: go on with those that were begun, and begin the others.

    Returns:
        the folders of the runs.

    Raises:
        InputError: `folder` exists and is not to be continued, or is a run itself.
    """
    if (folder / CONFIG).exists():
        raise InputError(f"{folder} is a run itself. Choose another --run folder for --seeds.")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists. Continue it with --resume auto, or choose another --run folder.")
    runs = [folder / f"{SEED}{number}" for number in range(n_seeds)]
    for number, run in enumerate(runs):
        logger.info(f"Seed {first + number} ({number + 1} of {n_seeds}): {run}.")
        train_one(run, first + number, "auto" if (run / CONFIG).exists() else None)
    return runs


class FirstSteps:
    """Times the first steps of a training, one in each `with`, and then says how long those to come will take here.

    The very first warms up and does not count; the shortest of the next three does, of fewer where they are long. Of a
    training of a few steps, and of one that compiles, nothing is said.
    """

    def __init__(self, trainer: Trainer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._trainer, self._clock = trainer, clock
        self._began = self._waited = 0.0
        self._steps: list[tuple[float, float]] = []  # s each took, and of which it waited for its batches
        left = trainer.config.max_steps - trainer.state.step
        self._done = not trainer.team.leads or trainer.compiled or left < FEW_STEPS

    def __enter__(self) -> None:
        self._began, self._waited = self._clock(), self._trainer.batches.waited

    def __exit__(self, failed: type[BaseException] | None, *rest: object) -> None:
        if self._done or failed:
            return
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize(self._trainer.device)
        self._steps.append((self._clock() - self._began, self._trainer.batches.waited - self._waited))
        _, *counted = self._steps
        if len(counted) == TIMED_STEPS or sum(seconds for seconds, _ in counted) > TIMED_SECONDS:
            self._done = True
            say_time(self._trainer, *min(counted))


def say_time(trainer: Trainer, seconds: float, waited: float) -> None:
    """Say how long the steps to come will take if each takes these seconds, what fits an hour, and what is faster.

    Args:
        waited: s of them for which a step waits for its batches.
    """
    config, step = trainer.config, trainer.state.step
    left, an_hour = config.max_steps - step, int(progress.HOUR / seconds)
    fits = (
        f"an hour is about {an_hour:,} steps (--max-steps {step + an_hour})"
        if left * seconds > progress.HOUR
        else f"an hour would hold {an_hour:,}"
    )
    logger.info(
        f"{left:,} more steps will take about {progress.duration(left * seconds)} here, validations aside "
        f"({seconds:.2g} s a step); {fits}."
    )
    if (folder := trainer.data.targets.folder) and waited > LONG_WAIT * seconds:
        logger.info(
            f"{waited / seconds:.0%} of that is waiting for cells from {folder}; --scratch puts them on another disk."
        )
    precision = choose_precision(config.precision, trainer.device, training=True)
    for hint in filter(None, (faster_precision(precision, trainer.device), slow_pages(trainer.device))):
        logger.info(hint)


def _loop(trainer: Trainer, log: Callable[[Line], None], stop: StopRequest) -> str:
    """Step, log, evaluate, save until all steps are done; returns why it ended."""
    config, state, window = trainer.config, trainer.state, trainer.window
    progress.begin("Training", config.max_steps, STEPS, state.step)
    reason, first_steps = "max_steps", FirstSteps(trainer)
    while not trainer.finished:
        # step
        with first_steps:
            trainer.step()
        progress.advance()

        # log
        if state.step % config.log_every == 0 or trainer.finished:
            log(trainer.log_line())
            trainer.check_steps()

        # evaluate
        evaluated = state.step % config.val_every == 0 or trainer.finished
        if evaluated:
            is_best = trainer.evaluate()
            log({"step": state.step, **trainer.metrics})
            if is_best:
                trainer.save_best()

        # save
        trainer.saves.check()
        if state.step % config.checkpoint_every == 0:
            trainer.save_step()
        window.pause()
        if signum := trainer.team.largest(stop.asked()):
            trainer.save_last()
            raise Interrupted(
                signum, f"Stopped after step {state.step}, saved in {trainer.run / LAST}. Go on with --resume auto."
            )
        if evaluated and config.early_stopping and state.validations_without_improvement >= config.patience:
            reason = "early_stopping"
            break
    trainer.save_last()
    trainer.save_blend()
    return reason
