"""The sections on one run: their numbers are those of metrics.jsonl, and what is not recorded is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from helpers.pages import Opened, Trained, brief, opened, rewrite
from sest.baselines.effects import BASELINES
from sest.report.write import write_report
from sest.runs.curves import METRICS, WITH_CELLS


def test_the_best_validation_stands_below_the_curves_beside_its_baselines(trained: Trained, page: Opened) -> None:
    best, curves = trained.best, re.sub(r"<[^>]*>", " ", page.section("curves"))
    for metric in METRICS:
        known = WITH_CELLS if metric in ("val_loss", "energy_distance") else BASELINES
        figures = [f"{best[f'{metric}_{name}']:.4g}" if name in known else "-" for name in BASELINES]
        cells = re.escape(metric) + "".join(rf"\s+{re.escape(figure)}" for figure in (f"{best[metric]:.4g}", *figures))
        assert re.search(cells, curves), metric
    assert f"Head alone at step {best['step']}" in curves


def test_curves_are_the_lines_of_metrics_jsonl(trained: Trained, page: Opened) -> None:
    logs = [line for line in trained.lines if "loss" in line]
    for name, y in (("loss", "loss"), ("grad_norm", "norm"), ("it_per_s", "it/s")):
        assert page.curve(y) == {line["step"]: float(f"{line[name]:.6g}") for line in logs}
    for metric in METRICS:
        for number, of in enumerate(("", "_stack", "_controls")):
            expected = {line["step"]: float(f"{line[metric + of]:.6g}") for line in trained.validations}
            if metric != "pearson_delta":  # the overview has that axis too
                assert page.curve(metric, number) == expected


def test_options_that_differ_come_first_and_the_splits_are_counted(page: Opened) -> None:
    configuration = page.section("configuration")
    changed = configuration.split("All options")[0]
    assert "--set-size" in changed and "--weight-decay" not in changed
    assert "--weight-decay" in configuration
    splits = configuration.split(">Splits<")[1]
    assert re.search(r"screen</td>\s*<td[^>]*>x</td>\s*<td[^>]*>test</td>\s*<td[^>]*>1</td>\s*<td[^>]*>5<", splits)


def test_speed_shows_the_limit_and_what_is_not_recorded(copy: Path, trained: Trained) -> None:
    measured = ("limit_it_per_s", "limited_by", "memory_bytes")
    old = [{k: v for k, v in line.items() if k not in measured} for line in trained.lines]
    rewrite(copy, old)
    assert brief(copy).section("speed").count("not recorded") == 4
    new = [line | {"it_per_s": 50.0, "limit_it_per_s": 200.0, "limited_by": "memory", "memory_bytes": 3_000_000_000}
           if "loss" in line else line for line in old]  # fmt: skip
    rewrite(copy, new)
    speed = brief(copy).section("speed")
    assert all(words in speed for words in ("200 it/s", ">memory<", ">25%<", "3.00 GB", "50 it/s"))


def test_null_values_and_a_cut_line_are_shown_as_what_they_are(copy: Path, trained: Trained) -> None:
    lines = trained.lines
    lines[1]["loss"] = None
    next(line for line in lines if "val_loss" in line)["pds"] = None
    rewrite(copy, lines, tail='{"step": 13, "loss": 0.')
    page = brief(copy)
    losses = page.curve("loss")
    assert losses[lines[1]["step"]] is None and 13 not in losses
    assert list(page.curve("pds").values()).count(None) == 1
    table = next(f for f in page.figures.values() if f["columns"] == ["step", "loss"])
    assert [lines[1]["step"], None] in table["rows"]
    assert "nan" not in page.words.lower().split()


def test_a_run_without_any_validation_yet_has_a_report(copy: Path, trained: Trained) -> None:
    rewrite(copy, [line for line in trained.lines if "val_loss" not in line])
    page = brief(copy)
    assert "No validation yet" in page.words and page.curve("loss")
    rewrite(copy, [])
    for name in ("best", "last", *(f"checkpoint-step-{step}" for step in (4, 8, 12))):
        shutil.rmtree(copy / name)
    page = opened(write_report([copy], None).path)
    assert "has no checkpoint yet" in page.section("perturbations")
    assert "trained for 0 of 12 steps" in page.words and "No values." in page.words
