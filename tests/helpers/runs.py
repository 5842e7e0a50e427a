"""What tests of training share: a run's files and metrics, and ways to end it early."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sest.training.prepare
import sest.training.trainer
from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.head.loss import energy_distance
from sest.runs.checkpoint import open_checkpoint, step_folder
from sest.runs.run_folder import METRICS
from sest.runs.schema import BEST, LAST, MODEL
from sest.training.train import train
from sest.training.validate import Validator
from sest.training.window import MEASURED


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "s.zarr", [small_screen()])


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps with dropout; validated and kept at 4, 8 and 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(cache, run, small_config())
    return run


CHECKPOINTS = [step_folder(4), step_folder(8), step_folder(12), BEST, LAST]


def files(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint of a run, hidden ones too."""
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in sorted(run.glob("*/*")) if file.is_file()}


def metrics(run: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without how fast the machine was."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    left_out = ("crc32c",) if timed else MEASURED
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines]


def steps(run: Path, *, validations: bool = False) -> list[int]:
    return [line["step"] for line in metrics(run) if ("val_loss" in line) == validations]


def weights(folder: Path, which: str = MODEL) -> dict[str, Tensor]:
    opened = open_checkpoint(folder)
    return opened.model_tensors() if which == MODEL else opened.optimizer_tensors()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def signal_after(step: int, number: int = signal.SIGTERM) -> Callable[[dict[str, Any]], None]:
    """An `on_log` that sends this process a signal when a step is logged (with log_every = 1: every step)."""

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] == step and "loss" in line:
            signal.raise_signal(number)

    return on_log


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float], metric: str = "val_loss") -> None:
    """Validations give the listed metric at their n-th call, 1 at others."""
    original, calls = Validator.run, 0

    def run(self: Validator, *args: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {**original(self, *args), metric: losses.get(calls, 1.0)}

    monkeypatch.setattr(Validator, "run", run)


def nan_at(monkeypatch: pytest.MonkeyPatch, calls_of_training: set[int]) -> None:
    """The loss of a training batch is NaN at the listed calls (1, 2 ...); validation is left alone."""
    calls = 0

    def make(name: str, gram: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        def criterion(predicted: Tensor, target: Tensor) -> Tensor:
            nonlocal calls
            loss = energy_distance(predicted, target)
            if torch.is_grad_enabled() and predicted.requires_grad:
                calls += 1
                loss = loss * (math.nan if calls in calls_of_training else 1.0)
            return loss

        return criterion

    monkeypatch.setattr(sest.training.prepare, "make_loss", make)
