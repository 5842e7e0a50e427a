"""The log line of several steps: means over the steps that counted, rates over the time that was training."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sest.training.limit import Limit
from sest.training.window import MEASURED, Window

LIMIT = Limit(flops=100.0, bytes=10.0, flops_per_s=50.0, bytes_per_s=10.0)  # 2 seconds a step, of compute


class Clock:
    """`time.monotonic` that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


def add(window: Window, *steps: tuple[float, float]) -> None:
    """Steps by loss and gradient norm; one that is not finite was skipped."""
    for loss, norm in steps:
        window.add(torch.tensor(loss), torch.tensor(norm), torch.tensor(not math.isfinite(loss + norm)))


def test_the_logged_loss_and_norm_are_means_over_the_steps_that_were_not_skipped() -> None:
    window = Window(torch.device("cpu"))
    add(window, (1.0, 10.0), (math.nan, 5.0), (3.0, math.inf), (5.0, 40.0))
    assert window.n_bad() == 2
    line = window.line(4, 1e-3, 7, 0.0, LIMIT)
    assert (line["loss"], line["grad_norm"]) == ((1.0 + 5.0) / 2, (10.0 + 40.0) / 2)
    assert (line["step"], line["lr"], line["skipped_steps"]) == (4, 1e-3, 7 + 2)


def test_a_line_of_skipped_steps_alone_has_no_loss() -> None:
    window = Window(torch.device("cpu"))
    add(window, (math.nan, 1.0), (1.0, math.nan))
    line = window.line(2, 1e-3, 0, 0.0, LIMIT)
    assert math.isnan(line["loss"]) and math.isnan(line["grad_norm"]) and line["skipped_steps"] == 2


def test_the_next_line_begins_at_nothing() -> None:
    window = Window(torch.device("cpu"))
    add(window, (1.0, 10.0), (math.nan, 5.0))
    window.line(2, 1e-3, 0, 0.0, LIMIT)
    assert window.n_bad() == 0
    add(window, (4.0, 8.0))
    line = window.line(3, 1e-3, 1, 0.0, LIMIT)
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (4.0, 8.0, 1)


def test_the_worst_streak_is_the_most_skipped_steps_in_a_row_also_across_lines() -> None:
    window, good, bad = Window(torch.device("cpu")), (1.0, 1.0), (math.nan, 1.0)
    streaks = []
    for steps in ((bad, bad, good, bad), (bad, bad, good), (good, good)):
        add(window, *steps)
        window.line(1, 1e-3, 0, 0.0, LIMIT)
        streaks.append(window.worst_streak)
    assert streaks == [2, 3, 0]  # the second began in the line before


def test_rates_leave_out_pauses_and_count_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of 2 seconds, 5 seconds of validation, a step of 2 seconds; 1 second in all was spent waiting."""
    clock = Clock(monkeypatch)
    window = Window(torch.device("cpu"))
    for _ in range(3):
        clock.now += 2
        add(window, (1.0, 1.0))
    clock.now += 5
    window.pause()
    clock.now += 2
    add(window, (math.nan, 1.0))
    line = window.line(4, 1e-3, 0, 1.0, LIMIT)
    assert (line["it_per_s"], line["data_wait"]) == (4 / 8, 1 / 8)
    assert (line["limit_it_per_s"], line["limited_by"]) == (0.5, "compute")
    clock.now += 4
    add(window, (1.0, 1.0))
    line = window.line(5, 1e-3, 0, 4.0, LIMIT)  # seconds waited since the run began: 3 of them since the last line
    assert (line["it_per_s"], line["data_wait"]) == (1 / 4, 3 / 4)


def test_a_window_that_is_restored_gives_the_line_of_the_whole_one() -> None:
    steps = [(1.25, 10.0), (math.nan, 5.0), (0.1, 0.3), (5.0, 40.0)]
    whole, first, second = (Window(torch.device("cpu")) for _ in range(3))
    add(whole, *steps)
    add(first, *steps[:2])
    kept = json.loads(json.dumps(first.to_values()))
    second.restore(kept)
    add(second, *steps[2:])
    lines = [{k: v for k, v in w.line(4, 1e-3, 0, 0.0, LIMIT).items() if k not in MEASURED} for w in (whole, second)]
    assert lines[0] == lines[1] and whole.worst_streak == second.worst_streak == 1
