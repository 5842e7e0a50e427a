"""Reading metrics.jsonl back."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.pages import Trained
from sest.errors import InputError
from sest.runs.curves import best_of, judged, judged_by, read_curves, read_lines, steady_speed, strongest
from sest.runs.run_folder import METRICS
from sest.runs.schema import LAST, STATE

LINES = """\
{"step": 50, "loss": 2.0, "limited_by": "memory"}
{"step": 100, "loss": null, "it_per_s": 3.5}
{"step": 100, "val_loss": 1.5, "mae": 0.25}
{"step": 150, "loss": 1.0, "it_per_s": 4}
{"step": 200, "val_l"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Two kinds of lines, a number that was not finite, and a last line that a kill cut short."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(LINES)
    return path


def test_lines_are_sorted_into_log_lines_and_validations(metrics: Path) -> None:
    curves = read_curves(metrics)
    np.testing.assert_array_equal(curves.log["step"], [50, 100, 150])
    np.testing.assert_array_equal(curves.log["loss"], [2.0, math.nan, 1.0])
    np.testing.assert_array_equal(curves.log["it_per_s"], [math.nan, 3.5, 4.0])
    np.testing.assert_array_equal(curves.log["limited_by"], [math.nan] * 3)
    np.testing.assert_array_equal(curves.validation["step"], [100])
    np.testing.assert_array_equal(curves.validation["val_loss"], [1.5])


def test_a_line_cut_short_is_left_out(metrics: Path) -> None:
    assert [line["step"] for line in read_lines(metrics)] == [50, 100, 100, 150]


def test_fewer_lines_than_were_saved_are_said(
    trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained.run, folder)
    whole = (folder / METRICS).read_bytes()
    assert read_lines(folder / METRICS) and not caplog.records
    n = whole.count(b"\n")
    (folder / METRICS).write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    for _ in range(2):
        assert len(read_lines(folder / METRICS)) == n - 1
    [said] = [record.message for record in caplog.records]  # once
    assert said.startswith(f"{folder / METRICS} has {n - 1:,} whole lines, and had {n:,} when last/ was saved")
    (folder / LAST / STATE).write_text("{")  # which is said by what reads it
    assert len(read_lines(folder / METRICS)) == n - 1


def test_a_run_without_lines_has_curves_without_points(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert len(curves.log["step"]) == len(curves.validation["step"]) == 0


def test_what_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read .*nothing\.jsonl"):
        read_lines(tmp_path / "nothing.jsonl")


def test_the_best_validation_is_the_lowest_loss_or_the_best_mean_of_three() -> None:
    assert best_of([3.0, 1.0, 2.0], "val_loss") == 1 and best_of([3.0, 1.0, 1.0], "energy_distance") == 1
    assert best_of([0.9, 0.1, 0.6, 0.6, 0.6], "pds") == 0  # alone it is the highest mean so far
    assert best_of([0.5, 0.9, 0.4, 0.7, 0.75, 0.72], "pearson_delta") == 5
    assert best_of([0.5, 0.1, 0.4, 0.3, 0.25], "mae") == 3  # 0.27, of 0.1, 0.4 and 0.3
    assert best_of([], "mae") is None and best_of([math.nan], "val_loss") is None
    assert best_of([math.nan, 2.0], "val_loss") == 1


def test_runs_of_an_earlier_sest_are_judged_by_what_they_have() -> None:
    assert judged_by({"val_loss": 1.0}) == "val_loss" and judged_by({"energy_distance": 1.0}) == "energy_distance"
    assert strongest({"mae_perturbation_mean": 1.0}) == "perturbation_mean" and strongest({"mae_stack": 1.0}) == "stack"


def test_the_speed_of_a_run_is_the_median_of_its_second_half() -> None:
    log = {
        "step": np.arange(1.0, 7.0),
        "it_per_s": np.array([1.0, 1.0, 9.0, 10.0, np.nan, 12.0]),
        "limit_it_per_s": np.array([np.nan, 40.0, 40.0, 40.0, 40.0, 40.0]),
    }
    found = steady_speed(log)
    assert found is not None and (found.it_per_s, found.limit, found.share) == (11.0, 40.0, 0.275)
    assert steady_speed({"step": np.zeros(0)}) is None
    unknown = steady_speed({"step": np.ones(1), "it_per_s": np.ones(1)})
    assert unknown is not None and np.isnan(unknown.share)


def test_the_best_validation_is_judged_by_the_metric_that_counts() -> None:
    validation = {
        "step": np.array([10.0, 20.0, 30.0]),
        "val_loss": np.array([3.0, 1.0, 2.0]),
        "energy_distance": np.array([0.3, 0.2, 0.1]),
        "energy_distance_controls": np.full(3, 0.5),
        "energy_distance_stack": np.full(3, 0.25),
        "val_pairs": np.full(3, 7.0),
    }
    found = judged(validation)
    assert found is not None and (found.step, found.metric, found.value) == (20.0, "energy_distance", 0.2)
    assert found.smoothed == pytest.approx(0.2)
    assert found.best == "stack" and found.n_pairs == 7 and found.spread == 0.0 and not found.is_level
    assert judged({"step": np.zeros(0), "val_loss": np.zeros(0)}) is None
