"""The live panel: what it shows, and that it fits a small terminal."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sest.cli.panel import TrainingPanel, _Row, chart, sparkline
from sest.config import TrainConfig
from sest.runs.curves import curves_of, read_lines
from sest.runs.diagnose import diagnose

RECORDED = Path(__file__).parent.parent / "fixtures" / "curves"


def log_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": step, "loss": 2.0 / (1 + step / 100), "grad_norm": 0.52, "lr": 1e-4, "it_per_s": 212.3,
        "data_wait": 0.001, "skipped_steps": 3, "limit_it_per_s": 600.0, "limited_by": "compute",
        "memory_bytes": 3.21e9,
    }  # fmt: skip
    return line | changes


def validation(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": step, "val_loss": 1.4, "val_loss_perturbation_mean": 1.54, "val_loss_controls": 1.94,
        "pearson_delta": 0.82, "pearson_delta_perturbation_mean": 0.79, "mae": 0.07, "mae_perturbation_mean": 0.06,
        "pds": 0.97, "pds_perturbation_mean": 0.9,
    }  # fmt: skip
    return line | changes


def drawn(panel: TrainingPanel, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(panel.render(width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def full_panel() -> TrainingPanel:
    """A panel after 12,350 of 40,000 steps, with validations that were best at step 9,000."""
    panel = TrainingPanel(40_000)
    for step in range(50, 12_351, 50):
        panel.add(log_line(step))
        if step % 500 == 0:
            panel.add(validation(step, val_loss=1.41 + abs(step - 9000) / 1e5))
    return panel


def test_the_panel_shows_everything_a_run_is_watched_for() -> None:
    text = "\n".join(drawn(full_panel()))
    for part in (
        "step 12,350/40,000", "31%, 2 min left", "212 it/s, 35% of the limit (compute), 0.1% waiting for data",
        "loss      0.01606", "val_loss  1.44", "best 1.4100, step 9,000",
        "beaten  val_loss 1.413  perturbation mean 1.54  controls 1.94",
        "pearson_delta 0.820 > 0.790", "mae 0.070 > 0.060", "pds 0.970 > 0.900",
        "lr 0.0001, gradient norm 0.52, 3 skipped, memory 3.2 GB",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("width", "height"), [(40, 24), (80, 24), (80, 12), (120, 40), (200, 60), (20, 5)])
def test_the_panel_is_as_large_as_the_terminal_and_leaves_a_row_for_the_cursor(width: int, height: int) -> None:
    lines = drawn(full_panel(), max(width, 40), height)
    assert len(lines) <= max(height - 1, 11)
    assert max(map(len, lines)) == max(width, 40)
    assert "step 12,350/40,000" in lines[1] and "2 min left" in lines[1]
    text = " ".join(line.strip("│ ") for line in lines)
    assert ("val_loss 1.41 to 1.49" in text) == (height >= 24 and width >= 80)
    for part in ("212 it/s", "35% of the limit", "pearson_delta 0.820 > 0.790"):
        assert part in text or width < 80, part


def test_the_time_left_is_known_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sest.cli.panel.time.monotonic", lambda: clock[0])
    panel = TrainingPanel(1_000)
    panel.begin(400)
    assert "left" not in drawn(panel)[1]
    clock[0], panel.step = 10.0, 401
    assert "40%, 1 h 40 min left" in drawn(panel)[1] and "speed     0.1 it/s" in "\n".join(drawn(panel))
    panel.add(log_line(450))
    assert "3 s left" in drawn(panel)[1]
    panel.add(log_line(500, it_per_s=log_line(450)["it_per_s"] / 9))
    assert panel.speed == pytest.approx(log_line(450)["it_per_s"] / 5)  # a line of 1 s and one of 9: two in 10


def test_a_row_is_broken_between_its_parts() -> None:
    row = _Row("speed", ["212 it/s", "35% of the limit", "0.1% waiting"], ", ")
    assert [text.plain for text in row.wrapped(80, 5)] == ["speed     212 it/s, 35% of the limit, 0.1% waiting"]
    assert [text.plain for text in row.wrapped(37, 5)] == [
        "speed     212 it/s, 35% of the limit,", "          0.1% waiting",
    ]  # fmt: skip
    assert [text.plain for text in row.wrapped(37, 1)] == ["speed     212 it/s, 35% of the limit…"]
    narrow = _Row(
        "metrics", ["pearson_delta 0.161 < 0.662", "mae 0.2"], styles={"pearson_delta 0.161 < 0.662": "green"}
    )
    first, second = narrow.wrapped(32, 5)
    assert [first.plain, second.plain] == ["metrics   pearson_delta 0.161 <", "          0.662  mae 0.2"]
    assert [str(span.style) for text in (first, second) for span in text.spans] == ["dim", "green", "dim", "green"]
    assert row.wrapped(36, 0) == [] and [text.plain for text in _Row("loss", []).wrapped(20, 3)] == ["loss      "]


def test_a_chart_has_its_range_above_and_its_steps_below() -> None:
    lines = chart("loss", [10, 20, 30, 40], [4.0, 3.0, math.nan, 1.0], width=12, height=5, bars="_#")
    assert lines == ["loss 1 to 4", "####", "########", "########____", "step 10   40"]
    assert chart("loss", [1, 2], [math.nan] * 2, width=6, height=4) == ["loss", "", "", ""]
    assert chart("loss", [1, 2], [5.0, 5.0], width=20, height=3)[1] == "▁" * 20


def test_a_chart_of_a_wide_range_shows_logarithms_and_says_so() -> None:
    """The whole, two fifths (rounded up, of four rows two), and the lowest bar."""
    lines = chart("loss", [1, 2, 3], [10.0, 10**0.4, 1.0], width=3, height=6, bars="_#")
    assert lines[0] == "los" and chart("loss", [1, 2], [10.0, 1.0], width=40, height=4)[0] == "loss 1 to 10, log scale"
    assert lines[1:-1] == ["#", "#", "##", "##_"]
    assert "log" not in chart("loss", [1, 2], [3.9, 1.0], width=40, height=4)[0]
    assert "log" not in chart("loss", [1, 2], [10.0, -1.0], width=40, height=4)[0]


def test_the_panel_names_what_is_wrong_first() -> None:
    panel = full_panel()
    for step in range(12_400, 15_001, 50):
        panel.add(log_line(step, data_wait=0.5))
    assert [finding.name for finding in panel.warnings()] == ["too slow: waits for data"]
    assert "seems     too slow: waits for data: " in "\n".join(drawn(panel))


def test_reading_ever_longer_curves_takes_a_fiftieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sest.cli.panel.time.monotonic", lambda: clock[0])
    reads = []

    def slow(curves: Any, **_: Any) -> list[Any]:
        reads.append(clock[0])
        clock[0] += 1.0
        return []

    monkeypatch.setattr("sest.cli.panel.diagnose", slow)
    panel = TrainingPanel(1000)
    for _ in range(1000):  # drawn four times a second
        panel.add(log_line(1))
        panel.render()
        clock[0] += 0.25
    assert len(reads) == pytest.approx(clock[0] / 51, abs=1)
    assert len(panel.warnings()) == 0 and len(reads) == pytest.approx(clock[0] / 51, abs=2)  # asked for: read now


def test_a_panel_without_lines_yet_can_be_drawn() -> None:
    lines = drawn(TrainingPanel(100))
    assert "step 0/100" in lines[1] and len(lines) <= 12


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    panel = TrainingPanel(100)
    panel.add(log_line(10, loss=math.nan, grad_norm=math.nan))
    assert "nan" in "\n".join(drawn(panel))


def test_baselines_that_are_not_beaten_are_named_so() -> None:
    panel = TrainingPanel(100)
    panel.add(log_line(10))
    panel.add(validation(10, val_loss=1.6))
    assert "not beaten  val_loss 1.6  perturbation mean 1.54  controls 1.94" in "\n".join(drawn(panel))


def test_a_sparkline_goes_from_the_lowest_to_the_highest_bar() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], bars="_#") == "#_"
    assert sparkline([1.0, math.nan, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"


def test_no_pds_is_a_dash_and_a_validation_that_measures_nothing_beats_nothing() -> None:
    unlearned, unseen = {"val_perturbations_not_learned": 1}, {"val_pairs": 2, "val_pairs_not_measurable": 2}
    for nothing, why in ((math.nan, unlearned), (None, unlearned), (None, unseen)):
        panel = TrainingPanel(100)
        panel.add(validation(50, pds=nothing, pds_perturbation_mean=nothing, **why))
        text = "\n".join(drawn(panel))
        assert "pds -" in text and "nan" not in text
        assert "no measure" in text and "not beaten" not in text and "beaten  " not in text


def test_the_energy_distance_stands_beside_the_best_baseline_and_the_controls_and_fits_the_row() -> None:
    names = {"controls": 0.8654, "perturbation_mean": 0.2171, "stack": 0.4905}
    line = {f"energy_distance_{name}": value for name, value in names.items()} | {"energy_distance": 5.1595}
    panel = TrainingPanel(100)
    panel.add(log_line(10))
    panel.add(validation(10, **line, mae_stack=0.05, pearson_delta_stack=0.9, pds_stack=0.5))
    text = drawn(panel)
    assert any("not beaten  energy 5.16  perturbation mean 0.2171  stack 0.4905" in row for row in text)
    assert any("          controls 0.8654" in row for row in text)
    assert any("pearson_delta 0.820 < 0.900" in row for row in text)  # the metrics beside the stack's


VERDICTS = {"beats the baselines": "beaten", "level with the baselines": "level"}
VERDICTS |= {"does not beat the baselines": "not beaten"}
VERDICTS |= {"no measurable effect": "no measure", "validation of perturbations that cannot be learned": "no measure"}


@pytest.mark.parametrize("recorded", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_panel_says_of_a_recorded_run_what_its_diagnosis_says(recorded: Path) -> None:
    usual = {key: value for key, value in log_line(0).items() if key != "limit_it_per_s"}  # what is not recorded
    lines = [line if "val_loss" in line else usual | line for line in read_lines(recorded)]
    about: dict[str, Any] = {"config": TrainConfig(dropout=0.0, control_targets=True), "encoder": "pca"}
    panel = TrainingPanel(10**9, about=about)
    for line in lines:
        panel.add(line)
    findings = {finding.name: finding for finding in diagnose(curves_of(lines), max_steps=10**9, **about)}
    said = [VERDICTS[name] for name in findings if name in VERDICTS]
    text = "\n".join(drawn(panel, 120, 40))
    assert len(said) <= 1
    for word in said:
        assert f"baselines {word}  " in text
    assert "--dropout 0" not in text and "--control-targets" not in text
    if "speed" in findings and "limit" in (evidence := findings["speed"].evidence):
        assert evidence.split(", ")[1].split(" of ")[0] + " of the limit" in text
