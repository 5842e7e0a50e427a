"""The figures: which points, pairs, genes and groups they show, and in which order."""

from __future__ import annotations

import math

import numpy as np
import pytest

from helpers.pages import Trained, facts, validation
from sest.cache import open_cache
from sest.report import figures as report_figures
from sest.report.cache_facts import PairResults
from sest.report.embedding_map import map_cells
from sest.report.figures import Line, choosable, curve, gene_scatter, overlaid, ranked, validation_curve


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
    cells = map_cells(open_cache(trained.cache))
    figure = report_figures.embedding_map(cells, "PCA", "perturbation")
    assert [row[0] for row in figure.rows] == ["3 others", "control", "T", "P"]
    assert [row[1] for row in figure.rows] == [2 * (5 + 6 + 7), 24, 18, 16]


def results(
    scores: list[float], observed: np.ndarray | None = None, predicted: np.ndarray | None = None
) -> PairResults:
    """Pairs P0, P1 ... of one cell type with these pearson_deltas."""
    n, none = len(scores), np.zeros((len(scores), 0))
    values = {name: np.array(scores) for name in ("pearson_delta", "mae", "pds", "perturbation_mean")}
    return PairResults(
        split="val",
        cell_types=["x"] * n,
        perturbations=[f"P{k}" for k in range(n)],
        n_cells=np.full(n, 3),
        effect=np.ones(n),
        scores=values,
        observed=none if observed is None else observed,
        predicted=none if predicted is None else predicted,
        n_sets=n,
        of_sets=n,
    )


def test_pairs_are_ranked_from_the_worst_and_one_without_a_number_stands_first() -> None:
    assert ranked(results([0.5, math.nan, -0.2, 0.9])).tolist() == [1, 2, 0, 3]


def test_of_many_pairs_the_worst_and_the_best_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [results([0.1, 0.4]), results([0.3, 0.2, 0.5])]
    assert [float(r.scores["pearson_delta"][k]) for r, k in choosable(splits)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    monkeypatch.setattr(report_figures, "MOST_PAIRS", 2)
    assert [float(r.scores["pearson_delta"][k]) for r, k in choosable(splits)] == [0.1, 0.5]


def test_the_genes_shown_are_those_with_the_largest_change_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_figures, "MOST_GENES", 3)
    observed, predicted = np.array([[0.1, -2.0, 0.0, 0.3, math.nan]]), np.array([[0.2, 0.0, 1.0, 0.3, math.nan]])
    figure = gene_scatter(results([0.5], observed, predicted), 0, list("abcde"))
    assert figure.rows == [["b", -2.0, 0.0], ["c", 0.0, 1.0], ["d", 0.3, 0.3]]
    low, high = figure.plot["layout"]["xaxis"]["range"]
    assert low == pytest.approx(-2.18) and high == pytest.approx(1.18)  # 6% of 3 beyond either end
    assert figure.plot["layout"]["yaxis"]["range"] == [low, high]


def test_the_best_validation_is_marked_on_val_loss_alone() -> None:
    run = facts("a", [{**validation(4, 2.0), "mae": 1.0}, {**validation(8, 1.5), "mae": 0.5}])
    marked = validation_curve(run, "val_loss")
    assert marked is not None and marked.plot["data"][-1]["name"] == "best, step 8"
    assert marked.plot["data"][-1]["x"] == [8.0] and marked.plot["data"][-1]["y"] == [1.5]
    other = validation_curve(run, "mae")
    assert other is not None and [trace["name"] for trace in other.plot["data"]] == ["head"]
    assert validation_curve(facts("b"), "val_loss") is None


def test_many_runs_are_told_apart_by_colour_and_then_by_dash() -> None:
    runs = [facts(f"r{i}", [validation(4, 1.0 + i)]) for i in range(8)]
    figure = overlaid(runs, "validation", "val_loss")
    assert figure is not None and figure.columns == ["step", *(run.name for run in runs)]
    looks = [(trace["line"]["color"], trace["line"]["dash"]) for trace in figure.plot["data"]]
    assert len(set(looks)) == 8 and looks[0][0] == looks[6][0]


def test_an_axis_is_logarithmic_only_where_values_fall_far_and_are_positive() -> None:
    steps = np.arange(1.0, 4.0)
    for values, kind in (([10, 3, 1], "log"), ([3, 2, 1], None), ([10, 1, 0], None)):
        figure = curve([Line("a", steps, np.array(values, float))], "a", falls=True)
        assert figure is not None and figure.plot["layout"]["yaxis"].get("type") == kind
