"""The figures: which points, pairs, genes and groups they show, and in which order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.pages import Trained, facts, validation
from sest.cache import open_cache
from sest.facts.embeddings import map_embeddings
from sest.report import figures as report_figures
from sest.report.figures import Line, curve, numbers, overlaid, validation_curve


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    steps = np.arange(1, 5002, dtype=float)
    figure = curve([Line("a", steps, steps**0.5)], "a", falls=True)
    assert figure is not None
    x = figure.plot["data"][0]["x"]
    assert len(x) <= report_figures.MOST_POINTS and x[-1] == 5001 and len(set(np.diff(x))) == 1
    assert len(figure.rows) <= report_figures.MOST_ROWS and figure.rows[-1][0] == 5001
    assert figure.plot["layout"]["yaxis"]["type"] == "log"  # 1 to 71
    assert curve([Line("a", steps, steps * math.nan)], "a") is None


def test_only_the_most_frequent_labels_have_a_colour(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    monkeypatch.setattr(report_figures, "MOST_GROUPS", 2)
    cells = map_embeddings(open_cache(trained.cache))
    figure = report_figures.embedding_map(cells, "PCA", "perturbation")
    assert [row[0] for row in figure.rows] == ["3 others", "control", "T", "P"]
    assert [row[1] for row in figure.rows] == [2 * (5 + 6 + 7), 24, 18, 16]
    assert [name for name, _, _ in figure.key] == [row[0] for row in figure.rows]


def test_numbers_have_six_digits_and_none_where_there_is_none() -> None:
    assert numbers([1.23456789, math.nan, -math.inf]) == [1.23457, None, None]


def test_the_best_validation_is_marked_on_val_loss_alone() -> None:
    run = facts("a", [{**validation(4, 2.0), "mae": 1.0}, {**validation(8, 1.5), "mae": 0.5}])
    marked = validation_curve(run, "val_loss")
    assert marked is not None and marked.plot["data"][-1]["name"] == "best, step 8"
    assert marked.plot["data"][-1]["x"] == [8.0] and marked.plot["data"][-1]["y"] == [1.5]
    other = validation_curve(run, "mae")
    assert other is not None and [trace["name"] for trace in other.plot["data"]] == ["head"]
    assert ("best, step 8", "var(--blue)", "circle-open") in marked.key and other.key == ()
    assert validation_curve(facts("b"), "val_loss") is None


def test_many_runs_are_told_apart_by_colour_and_then_by_dash() -> None:
    runs = [facts(f"r{i}", [validation(4, 1.0 + i), validation(8, 1.0 + i)]) for i in range(8)]
    figure = overlaid(runs, "validation", "val_loss")
    assert figure is not None and figure.columns == ["step", *(run.name for run in runs)]
    looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in figure.plot["data"]]
    assert len(set(looks)) == 8 and looks[0][0] == looks[6][0]


def test_an_axis_is_logarithmic_only_where_values_fall_far_and_are_positive() -> None:
    steps = np.arange(1.0, 4.0)
    for values, kind in (([10, 3, 1], "log"), ([3, 2, 1], None), ([10, 1, 0], None)):
        figure = curve([Line("a", steps, np.array(values, float))], "a", falls=True)
        assert figure is not None and figure.plot["layout"]["yaxis"].get("type") == kind
