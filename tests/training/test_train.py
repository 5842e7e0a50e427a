"""The training loop: the same run whatever interrupts it, and options that do what they say.

Runs are of a head with some thousand parameters on 72 cells (see tests/helpers). Checkpoints are compared byte by byte.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from helpers.configs import small_config
from helpers.notes import Notes
from helpers.runs import CHECKPOINTS, files, metrics, nan_at, same, scripted, signal_after, steps, weights
from sest.cache.disk import write_flushed
from sest.cli.main import main
from sest.config import TrainConfig
from sest.errors import InputError, TrainingFailed
from sest.machine.signals import Interrupted
from sest.machine.team import ALONE
from sest.progress import Silent, reporting
from sest.runs.checkpoint import load_model, open_checkpoint, step_folder, step_folders
from sest.runs.run_folder import CONFIG, METRICS, read_run_config
from sest.runs.schema import BEST, LAST, MODEL, OPTIMIZER
from sest.training.train import FirstSteps, train
from sest.training.trainer import Trainer
from sest.training.window import MEASURED, Window

TINY = {k: v for k, v in small_config().to_values().items() if v != getattr(TrainConfig(), k)}


class Crash(Exception):
    """Stands for anything that ends the process without warning."""


def crash_after(step: int) -> Callable[[dict[str, Any]], None]:
    """An `on_log` that raises at the first line after a step."""

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] > step:
            raise Crash

    return on_log


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_ones(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    result = train(cache, tmp_path / "again", small_config())
    assert sorted({name.split("/")[0] for name in files(whole)}) == sorted(CHECKPOINTS)
    assert files(tmp_path / "again") == files(whole)
    assert metrics(tmp_path / "again") == metrics(whole)
    assert result.step == 12 and result.reason == "max_steps" and result.n_parameters == 5508
    train(cache, tmp_path / "other", small_config(seed=1))
    assert not same(weights(tmp_path / "other" / LAST), weights(whole / LAST))


def test_the_callers_random_state_changes_nothing(cache: Path, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    train(cache, tmp_path / "run", small_config(num_workers=3))
    assert files(tmp_path / "run") == files(whole)  # and neither do threads that prepare batches


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_a_stopped_run_that_is_resumed_is_the_uninterrupted_run(
    cache: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"Stopped after step {step}, saved in .*last") as stopped:
        train(cache, run, small_config(), on_log=signal_after(step))
    assert stopped.value.signum == signal.SIGTERM
    assert open_checkpoint(run / LAST).state["step"] == step
    notes = Notes()
    with reporting(notes):
        train(cache, run, small_config(), resume="auto")
    assert f"Resuming from {run / LAST} at step {step}." in notes.notes
    assert files(run) == files(whole)
    assert metrics(run) == metrics(whole)


@pytest.mark.parametrize("step", [3, 7])
def test_a_line_over_steps_before_and_after_a_stop_is_that_of_the_uninterrupted_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Lines are of 5 steps, the stop is between two of them; the second step is skipped."""
    config, one_step = small_config(log_every=5), Trainer.step

    def stopping(trainer: Trainer) -> None:
        one_step(trainer)
        if trainer.state.step == step:
            signal.raise_signal(signal.SIGTERM)

    for name in ("whole", "stopped"):
        with monkeypatch.context() as patch:
            nan_at(patch, {2})
            if name == "whole":
                train(cache, tmp_path / name, config)
                continue
            patch.setattr(Trainer, "step", stopping)
            with pytest.raises(Interrupted):
                train(cache, tmp_path / name, config)
            patch.setattr(Trainer, "step", one_step)
            train(cache, tmp_path / name, config, resume="auto")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "whole")[-2]["skipped_steps"] == 1
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_training_ends_before_its_time_is_over_saved_and_goes_on(cache: Path, tmp_path: Path) -> None:
    run, began = tmp_path / "run", time.monotonic()
    config = small_config(max_steps=10**6, max_time="3s", log_every=100, val_every=10**6, checkpoint_every=10**6)
    with pytest.raises(Interrupted, match=r"saved in .*last. Go on with --resume auto") as stopped:
        train(cache, run, config)
    assert stopped.value.signum == signal.SIGALRM and time.monotonic() - began < 3
    step = open_checkpoint(run / LAST).state["step"]
    assert step > 0
    result = train(cache, run, dataclasses.replace(config, max_steps=step + 2, max_time=None), resume="auto")
    assert result.step == step + 2 and result.reason == "max_steps"
    with pytest.raises(InputError, match="max-time is '3'; it takes a length of time"):
        train(cache, tmp_path / "other", small_config(max_time="3"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("step", [3, 4])  # 4: a validation, best/ and a kept checkpoint
def test_a_run_folder_deleted_meanwhile_ends_the_training_and_is_not_made_again(
    cache: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"

    def delete(line: dict[str, Any]) -> None:
        if line["step"] == step:
            shutil.rmtree(run)

    with pytest.raises(TrainingFailed, match=r"was deleted or moved while it trained"):
        train(cache, run, small_config(), on_log=delete)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_as_sigterm_does_and_a_second_one_stops_at_once(cache: Path, whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(cache, tmp_path / "once", small_config(), on_log=signal_after(3, signal.SIGINT))
    assert stopped.value.signum == signal.SIGINT

    def twice(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(cache, tmp_path / "twice", small_config(), on_log=twice)
    assert signal.getsignal(signal.SIGINT) is before
    train(cache, tmp_path / "twice", small_config(), resume="auto")
    assert files(tmp_path / "twice") == files(whole)


def test_a_run_stopped_again_and_again_is_the_uninterrupted_run(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 3, 4, 7, 12):
        with pytest.raises(Interrupted):
            train(cache, run, small_config(), resume="auto", on_log=signal_after(step))
    train(cache, run, small_config(), resume="auto")  # at the last step there is nothing left to do
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_run_resumed_from_a_kept_checkpoint_is_the_uninterrupted_run(
    cache: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(cache, run, small_config(), resume=str(run / step_folder(step)))
    assert files(run) == files(whole) and metrics(run) == metrics(whole)


def test_a_kept_checkpoint_can_be_continued_in_another_run_folder(cache: Path, whole: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", small_config(), resume=str(whole / step_folder(8)))
    assert same(weights(tmp_path / "run" / LAST), weights(whole / LAST))
    assert steps(tmp_path / "run") == [9, 10, 11, 12]


def test_a_staged_plan_ends_with_the_weights_of_one_run(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cache, run, small_config(max_steps=4))
    for last in (8, 12):
        train(cache, run, small_config(max_steps=last), resume="auto")
    for which in (MODEL, OPTIMIZER):
        assert same(weights(run / LAST, which), weights(whole / LAST, which))
    assert steps(run) == list(range(1, 13))


def test_a_stage_between_validations_adds_one_and_changes_no_weight(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cache, run, small_config(max_steps=5))
    train(cache, run, small_config(), resume="auto")
    assert steps(run, validations=True) == [4, 5, 8, 12]
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


def test_resuming_a_finished_run_changes_nothing(cache: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    result = train(cache, tmp_path / "run", small_config(max_steps=6), resume="auto")
    assert result.step == 12 and files(tmp_path / "run") == files(whole)


def test_resume_auto_without_any_checkpoint_starts_at_step_0(cache: Path, whole: Path, tmp_path: Path) -> None:
    for name, step in (("none", 2), ("best", 4)):  # best/ alone has no moments
        run = tmp_path / name
        with pytest.raises(Crash):
            train(cache, run, small_config(checkpoint_every=100), on_log=crash_after(step))
        notes = Notes()
        with reporting(notes):
            train(cache, run, small_config(), resume="auto")
        assert f"{run} has no checkpoint yet: training starts at step 0." in notes.notes
        assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(cache, tmp_path / "new", small_config(), resume="auto")  # not even a folder
    assert files(tmp_path / "new") == files(whole)


def test_a_continued_stage_killed_before_its_first_checkpoint_begins_where_it_began(
    cache: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stage2"
    with pytest.raises(Crash):
        train(
            cache, run, small_config(checkpoint_every=100), resume=str(whole / step_folder(4)),
            on_log=crash_after(9))  # fmt: skip
    train(cache, run, small_config(), resume="auto")
    assert same(weights(run / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))
    assert steps(run) == list(range(5, 13))


def test_two_processes_do_not_train_in_one_run_folder(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def second(line: dict[str, Any]) -> None:
        if line["step"] == 5 and "loss" in line:
            with pytest.raises(InputError, match="Another process trains in"):
                train(cache, run, small_config(), resume="auto")

    train(cache, run, small_config(), on_log=second)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    train(cache, run, small_config(), resume="auto")  # it is free again


def test_metrics_have_no_step_twice_and_survive_a_torn_line(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with open(run / METRICS, "a") as file:
        file.write('12\n{"step": 13, "lo')
    train(cache, run, small_config(), resume=str(run / step_folder(4)))
    assert metrics(run) == metrics(whole)
    assert steps(run) == list(range(1, 13)) and steps(run, validations=True) == [4, 8, 12]


def test_log_every_val_every_and_checkpoint_every_set_the_steps(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[dict[str, Any]] = []
    config = small_config(log_every=5, val_every=3, checkpoint_every=7)
    train(cache, run, config, on_log=lambda line: seen.append(dict(line)))
    assert steps(run) == [5, 10, 12] and steps(run, validations=True) == [3, 6, 9, 12]
    assert {f.name for f in run.iterdir() if f.is_dir()} == {step_folder(7), BEST, LAST}
    plain = [{key: None if value != value else value for key, value in line.items()} for line in seen]  # NaN is null
    assert plain == metrics(run, timed=True)
    for line in seen:
        if "loss" in line:
            steady = {"step", "loss", "grad_norm", "lr", "skipped_steps"}
            assert set(line) == (steady | set(MEASURED)) - {"device_wait", "crc32c"}  # for GPUs; of the file
            assert line["limit_it_per_s"] > 0 and line["limited_by"] in ("compute", "memory", "launches")
            assert line["memory_bytes"] > 1e8  # torch alone takes that
            assert line["it_per_s"] > 0 and 0 <= line["data_wait"] <= 1 and line["lr"] == config.lr
    assert [line["step"] for line in seen] == sorted(line["step"] for line in seen)


def test_a_line_is_the_mean_over_the_steps_since_the_last_one(cache: Path, whole: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", small_config(log_every=4))
    every = [line for line in metrics(whole) if "loss" in line]
    for i, line in enumerate(line for line in metrics(tmp_path / "run") if "loss" in line):
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(np.mean([one[key] for one in every[4 * i : 4 * i + 4]]), rel=1e-6)


def test_how_often_is_logged_or_saved_changes_no_weight(cache: Path, whole: Path, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", small_config(log_every=50, val_every=5, checkpoint_every=100))
    assert same(weights(tmp_path / "run" / LAST, OPTIMIZER), weights(whole / LAST, OPTIMIZER))


def test_best_is_the_checkpoint_of_the_lowest_val_loss(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {1: 0.9, 2: 0.7, 3: 0.8, 4: 0.7, 5: 0.75, 6: 0.71})
    run = tmp_path / "run"
    result = train(cache, run, small_config(val_every=2, checkpoint_every=2))
    best = open_checkpoint(run / BEST)
    assert (result.best_step, result.best_val_loss, result.metrics["val_loss"]) == (4, 0.7, 0.71)
    assert best.state["step"] == 4 and best.state["run"]["val_loss"] == 0.7
    assert OPTIMIZER not in best.state["files"] and same(weights(run / BEST), weights(run / step_folder(4)))
    last = open_checkpoint(run / LAST).state["run"]
    assert (last["best_step"], last["best_val_loss"], last["val_loss"]) == (4, 0.7, 0.71)
    assert same(dict(load_model(run).state_dict()), weights(run / step_folder(4)))


def test_best_goes_by_what_is_monitored_over_three_validations_also_when_resumed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Higher is better; the luckiest validation, the second, is not the best mean of three, which the fifth ends."""
    scores = [0.5, 0.9, 0.4, 0.7, 0.75, 0.72]
    run, config = tmp_path / "run", small_config(val_every=2, checkpoint_every=2, monitor="pearson_delta")
    with monkeypatch.context() as patch:
        scripted(patch, {i + 1: value for i, value in enumerate(scores[:3])}, "pearson_delta")
        with pytest.raises(Crash):
            train(cache, run, config, on_log=crash_after(6))
    scripted(monkeypatch, {i + 1: value for i, value in enumerate(scores[3:])}, "pearson_delta")
    result = train(cache, run, config, resume="auto")
    means = [np.mean(scores[max(i - 2, 0) : i + 1]) for i in range(6)]
    assert int(np.argmax(means)) == 5 and result.best_step == 12
    assert open_checkpoint(run / BEST).state["step"] == 12
    assert open_checkpoint(run / LAST).state["run"]["monitored"] == scores


def test_a_metric_that_validation_does_not_have_is_not_monitored(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[datasets]\nscreen = "x.h5ad"\n[training]\nscreen = "train"\n[fewshot."screen.x"]\nval = ["P"]\n'
    )
    with pytest.raises(InputError, match="no cell type has two validation perturbations"):
        train(cache, tmp_path / "run", small_config(monitor="pds", splits=str(tmp_path / "s.toml")))


@pytest.mark.parametrize(
    ("losses", "patience", "stops_at"),
    [
        ([3, 2, 1, 2, 2, 2, 2], 2, 5),
        ([3, 2, 1, 2, 0.5, 2, 2], 2, 7),
        ([1, 1, 1, 1, 1, 1, 1], 3, 4),  # equal is no improvement
        ([7, 6, 5, 4, 3, 2, 1], 1, 12),
    ],
)
def test_early_stopping_waits_for_patience_validations_without_improvement(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], patience: int, stops_at: int
) -> None:
    scripted(monkeypatch, {i + 1: losses[min(i, 6)] / (1 + max(0, i - 6)) for i in range(12)})
    config = small_config(early_stopping=True, patience=patience, val_every=1)
    result = train(cache, tmp_path / "run", config)
    assert result.step == stops_at and result.reason == ("early_stopping" if stops_at < 12 else "max_steps")
    assert open_checkpoint(tmp_path / "run" / LAST).state["step"] == stops_at


def test_without_early_stopping_patience_does_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {})
    assert train(cache, tmp_path / "run", small_config(patience=1, val_every=1)).step == 12


def test_patience_goes_on_counting_when_a_run_is_resumed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = small_config(early_stopping=True, patience=3, val_every=1)
    scripted(monkeypatch, {})  # all equal: the first is best
    with pytest.raises(Interrupted):
        train(cache, run, config, on_log=signal_after(2))
    result = train(cache, run, config, resume="auto")
    assert result.step == 4 and result.reason == "early_stopping"


def test_a_resumed_run_takes_the_learning_rate_given_now(cache: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(cache, run, small_config(max_steps=4))
    train(cache, run, small_config(lr=0.0, max_steps=6), resume="auto")
    assert same(weights(run / LAST), weights(whole / step_folder(4)))
    assert [line["lr"] for line in metrics(run) if "lr" in line] == [1e-3] * 4 + [0.0] * 2
    assert read_run_config(run)[0]["lr"] == 0.0


def test_progress_is_told_every_step_also_those_done_before(cache: Path, whole: Path, tmp_path: Path) -> None:
    class Counted(Silent):
        def __init__(self) -> None:
            self.began: tuple[str, int, str, int] | None = None
            self.advanced, self.is_training = 0, False

        def begin(self, task: str, total: int, unit: str, done: int = 0, detail: object = None) -> None:
            self.is_training = task == "Training"  # what comes after it is the blend
            if self.is_training:
                self.began, self.advanced = (task, total, unit, done), 0

        def advance(self, n: int = 1) -> None:
            self.advanced += n * self.is_training

    progress = Counted()
    with reporting(progress):
        train(cache, tmp_path / "run", small_config(), resume=str(whole / step_folder(8)))
    assert progress.began == ("Training", 12, "it", 8) and progress.advanced == 4


def test_the_caller_is_shown_the_data_and_the_model_once(cache: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train(
        cache,
        tmp_path / "run",
        small_config(max_steps=2),
        on_start=lambda data, model: seen.append((len(data.labels), model.sizes.n_genes if model is not None else 0)),
    )
    assert seen == [(72, 20)]


def sest_train(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `sest train` in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["sest", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_no_host_memory_ends_training_with_what_is_kept_and_the_run_can_go_on(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, step = small_config(), Trainer.step

    def fail_at(number: int) -> None:
        def fail(self: Trainer) -> None:
            if self.state.step == number:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            step(self)

        monkeypatch.setattr(Trainer, "step", fail)

    fail_at(0)
    with pytest.raises(
        TrainingFailed, match=r"Out of host memory after step 0\. No checkpoint was saved yet\. A new run"
    ):
        train(cache, tmp_path / "none", config)
    fail_at(6)
    kept = (
        r"after step 6\. The last checkpoint is checkpoint-step-4 of .*run: go on with --resume auto, .*--data-device"
    )
    with pytest.raises(TrainingFailed, match=kept):
        train(cache, tmp_path / "run", config)
    monkeypatch.setattr(Trainer, "step", step)
    train(cache, tmp_path / "run", config, resume="auto")
    assert same(weights(tmp_path / "run" / LAST), weights(whole / LAST))


def test_the_command_line_trains_resumes_and_repeats_a_run_from_its_config(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text("".join(f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in TINY.items()))
    run = tmp_path / "run"
    assert sest_train(monkeypatch, cache, "--run", run, "--config", tmp_path / "tiny.toml", "--max-steps", 4) == 0
    said = capsys.readouterr()
    assert "5,508 trainable parameters" in said.out and "best val_loss" in said.out
    assert "step 4/4: loss" in said.err
    assert sest_train(monkeypatch, cache, "--run", run) == 2
    assert "Continue it with --resume auto" in capsys.readouterr().err
    assert sest_train(monkeypatch, cache, "--run", run, "--resume", "auto", "--max-steps", 12) == 0
    assert same(weights(run / LAST), weights(whole / LAST))
    assert sest_train(monkeypatch, cache, "--run", run, "--resume", "auto", "--hidden", 32) == 2
    assert "--hidden 32 would make another run; this one has 16" in capsys.readouterr().err
    assert sest_train(monkeypatch, cache, "-r", tmp_path / "again", "--config", run / CONFIG) == 0
    assert files(tmp_path / "again") == files(whole)
    capsys.readouterr()
    assert sest_train(monkeypatch, cache, "--run", tmp_path / "no", "--resume", "auto") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_run_that_was_never_validated_has_no_best_val_loss_to_show(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(cache, run, small_config(checkpoint_every=2, val_every=9), on_log=crash_after(2))
    assert sest_train(monkeypatch, cache, "--run", run, "--resume", "auto", "--max-steps", 2) == 0
    assert "step 2 (all steps done)." in capsys.readouterr().out


def test_the_command_line_says_what_failed_and_exits_with_1_or_143(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.toml").write_text("".join(f"{k.replace('_', '-')} = {json.dumps(v)}\n" for k, v in TINY.items()))
    arguments = [cache, "--config", tmp_path / "tiny.toml", "--max-bad-steps", 2]
    with monkeypatch.context() as patch:
        nan_at(patch, set(range(1, 99)))
        assert sest_train(patch, *arguments, "--run", tmp_path / "bad") == 1
    said = capsys.readouterr().err
    assert "Error: 2 steps in a row before step 3 had a non-finite loss" in said and "Traceback" not in said
    original = Window.add

    def add(self: Any, *args: Any) -> None:
        original(self, *args)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Window, "add", add)
    assert sest_train(monkeypatch, *arguments, "--run", tmp_path / "stopped") == 143
    assert "Stopped after step 1, saved in" in capsys.readouterr().err


def test_steps_go_on_while_a_checkpoint_is_written(
    cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of the step it was asked for: its bytes are those of a run that was not held up."""
    step, later = 4, threading.Event()

    def write_late(path: Path, *data: bytes) -> None:
        if step_folder(step) in str(path):
            assert later.wait(60), "training waited for the disk"
        write_flushed(path, *data)

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] > step:
            later.set()

    monkeypatch.setattr("sest.runs.checkpoint.write_flushed", write_late)
    train(cache, tmp_path / "late", small_config(), on_log=on_log)
    assert files(tmp_path / "late") == files(whole)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_ends_training(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older checkpoints are still there, and nothing half-written."""

    def full(path: Path, *data: bytes) -> None:
        if step_folder(8) in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_flushed(path, *data)

    monkeypatch.setattr("sest.runs.checkpoint.write_flushed", full)
    with pytest.raises(OSError, match="No space left"):
        train(cache, tmp_path / "run", small_config(checkpoint_every=4))
    assert [at for at, _ in step_folders(tmp_path / "run")] == [4] and not list((tmp_path / "run").glob(".*"))


def trainer_of(max_steps: int, **changes: Any) -> Any:
    """What `FirstSteps` asks of a trainer."""
    state, config = SimpleNamespace(step=0), small_config(max_steps=max_steps)
    parts = {"team": ALONE, "compiled": False, "device": torch.device("cpu"), "config": config, "state": state}
    read = {"batches": SimpleNamespace(waited=0.0), "data": SimpleNamespace(targets=SimpleNamespace(folder=None))}
    return SimpleNamespace(**parts | read | changes)


@pytest.mark.parametrize(
    ("took", "said"),
    [
        (
            [9, 0.7, 0.5, 0.6],
            r"56 more steps .* 28 s here, validations aside \(0.5 s a step\); an hour would hold 7,200.",
        ),
        ([99, 90], r"58 more steps will take about 1 h 27 min here, .* an hour is about 40 steps \(--max-steps 42\)."),
    ],
)
def test_how_long_it_will_take_is_said_after_the_first_steps(took: list[float], said: str) -> None:
    """The very first warms up; three are timed, of long ones one."""
    trainer, now, notes = trainer_of(60), [0.0], Notes()
    first = FirstSteps(trainer, clock=lambda: now[0])
    with reporting(notes):
        for seconds in took:
            assert not notes.notes
            with first:
                trainer.state.step += 1
                now[0] += seconds
            now[0] += 1000  # a validation
        text = notes.notes[0]
        n_said = len(notes.notes)
        with first:
            pass
    assert re.fullmatch(said, text) and len(notes.notes) == n_said


@pytest.mark.parametrize(("waited", "folder"), [(0.04, "files"), (0.06, "files"), (0.9, None)])
def test_waiting_for_cells_from_files_is_said(waited: float, folder: str | None) -> None:
    trainer, now, notes = trainer_of(60), [0.0], Notes()
    trainer.data.targets.folder = folder
    first = FirstSteps(trainer, clock=lambda: now[0])
    with reporting(notes):
        for _ in range(4):
            with first:
                now[0] += 1
                trainer.batches.waited += waited
    said = "6% of that is waiting for cells from files; --scratch puts them on another disk."
    assert [text for text in notes.notes if "waiting" in text] == ([said] if waited == 0.06 else [])


@pytest.mark.parametrize("changes", [{"compiled": True}, {"max_steps": 19}, {"team": mock.Mock(leads=False)}])
def test_how_long_it_will_take_is_not_said_where_nobody_asks_or_the_first_steps_do_not_tell(
    changes: dict[str, Any],
) -> None:
    trainer, notes = trainer_of(**{"max_steps": 60} | changes), Notes()
    first = FirstSteps(trainer, clock=iter(range(100)).__next__)
    with reporting(notes):
        for _ in range(8):
            with first:
                pass
    assert not notes.notes


def test_a_training_says_once_how_long_it_will_take(cache: Path, tmp_path: Path) -> None:
    notes = Notes()
    with reporting(notes):
        train(cache, tmp_path / "run", small_config(max_steps=24))
    assert [bool(re.match("20 more steps will take about", text)) for text in notes.notes].count(True) == 1
