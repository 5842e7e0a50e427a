"""The figures of held-out pairs: which pairs and genes they show, and in which order; that Plotly takes them."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from helpers.pages import HOSTILE
from sest.facts.cells import CellMap
from sest.facts.pairs import PairResults
from sest.report import pair_figures
from sest.report.figures import Figure
from sest.report.pair_figures import (
    calibration,
    cell_maps,
    choosable,
    discrimination,
    gene_scatter,
    heat_map,
    overview,
    ranked,
    score_bars,
)


def results(
    scores: list[float],
    observed: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    noise: float = 0.1,
    names: list[str] | None = None,
) -> PairResults:
    """Pairs P0, P1 ... of one cell type with these pearson_deltas, the stack's all 0.25."""
    n = len(scores)
    observed = np.zeros((n, 3)) if observed is None else observed
    names = names or [f"P{k}" for k in range(n)]
    keys = pd.DataFrame({"cell_type": "x", "perturbation": names, "n_real": 3})
    tables = [
        keys.assign(predictor=name, pearson_delta=values, mae=values, pds=values)
        for name, values in (("model", scores), ("controls", [0.0] * n), ("stack", [0.25] * n))
    ]
    return PairResults(
        split="val",
        cell_types=["x"] * n,
        perturbations=names,
        n_cells=np.full(n, 3),
        scores=pd.concat(tables, ignore_index=True),
        observed=observed,
        predicted=observed if predicted is None else predicted,
        of_stack=observed / 2,
        variance=np.full((1, observed.shape[1]), noise**2),
        own=np.zeros(n, int),
        per_cell=np.ones(n),
        context=np.zeros(n, int),
        perturbation=np.arange(1, n + 1),
        n_sets=n,
        of_sets=n,
    )


def bars(scores: list[float], metric: str = "pearson_delta") -> Figure:
    table = results(scores).scores.set_index(["cell_type", "perturbation", "predictor"])[metric].unstack("predictor")
    return score_bars(table[["model", "controls", "stack"]], metric)


def test_plotly_takes_every_figure() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(5, 40))
    result = results([0.1, 0.5, math.nan, 0.2, 0.3], effects, effects + rng.normal(size=(5, 40)))
    genes, places = [f"G{i}" for i in range(40)], rng.normal(size=(4, 2))
    figures = [bars([0.1, 0.5]), overview([result]), calibration(result), gene_scatter(result, 0, genes)]
    cells = CellMap("val", "x", ["P"], [places], [places], places, (0.5, 0.2))
    figures += [heat_map(result, genes), *cell_maps(cells).values()]
    matrix = discrimination(result, genes)
    assert matrix is not None
    for figure in [*figures, matrix]:
        json.dumps(figure.plot, allow_nan=False)
        go.Figure(_with_colours(figure.plot))  # refuses names and values that Plotly does not know
        assert figure.rows and all(len(row) == len(figure.columns) for row in figure.rows)


def _with_colours(value: object) -> object:
    """The page puts colours for the names of its variables."""
    if isinstance(value, dict):
        return {key: _with_colours(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_colours(inner) for inner in value]
    return "#123456" if isinstance(value, str) and value.startswith("var(--") else value


def test_bars_begin_with_the_pairs_furthest_behind_the_best_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = bars([0.5, 0.1, 0.3])
    assert figure.columns == ["pair", "this model", "controls", "stack"]
    assert figure.rows == [["P1", 0.1, 0.0, 0.25], ["P2", 0.3, 0.0, 0.25], ["P0", 0.5, 0.0, 0.25]]
    assert [name for name, _, _ in figure.key] == ["this model", "controls", "stack"]
    lower = bars([0.5, 0.1, 0.3], "mae")  # the controls, 0, are the best: all are behind, the highest most
    assert [row[0] for row in lower.rows] == ["P0", "P2", "P1"]
    monkeypatch.setattr(pair_figures, "MOST_BARS", 2)
    assert [row[0] for row in bars([0.5, 0.1, 0.3]).rows] == ["P1", "P0"]


def test_names_are_never_markup() -> None:
    rng = np.random.default_rng(0)
    result = results([0.1, 0.5], rng.normal(size=(2, 3)), names=["P", HOSTILE])
    genes = ["a", "b", HOSTILE]
    figures = [overview([result]), calibration(result), heat_map(result, genes), gene_scatter(result, 1, genes)]
    matrix = discrimination(result, genes)
    assert matrix is not None
    table = result.scores.set_index(["cell_type", "perturbation", "predictor"])["mae"].unstack("predictor")
    for figure in [*figures, matrix, score_bars(table[["model", "stack"]], "mae")]:
        assert "<script" not in str(figure.plot) and "script" in str(figure.plot)


def test_pairs_are_ranked_from_the_worst_and_one_without_a_number_stands_first() -> None:
    assert ranked(results([0.5, math.nan, -0.2, 0.9])).tolist() == [1, 2, 0, 3]


def test_of_many_pairs_the_worst_and_the_best_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [results([0.1, 0.4]), results([0.3, 0.2, 0.5])]
    assert [float(r.of_model("pearson_delta")[k]) for r, k in choosable(splits)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    monkeypatch.setattr(pair_figures, "MOST_PAIRS", 2)
    assert [float(r.of_model("pearson_delta")[k]) for r, k in choosable(splits)] == [0.1, 0.5]


def test_the_genes_shown_are_those_with_the_largest_change_of_either_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_figures, "MOST_GENES", 3)
    observed, predicted = np.array([[0.1, -2.0, 0.0, 0.3, math.nan]]), np.array([[0.2, 0.0, 1.0, 0.3, math.nan]])
    figure = gene_scatter(results([0.5], observed, predicted), 0, list("abcde"))
    assert figure.rows == [["b", -2.0, 0.0], ["c", 0.0, 1.0], ["d", 0.3, 0.3]]
    low, high = figure.plot["layout"]["xaxis"]["range"]
    assert low == pytest.approx(-2.24) and high == pytest.approx(1.24)  # 8% of 3 beyond either end
    assert figure.plot["layout"]["yaxis"]["range"] == [low, high]


def test_the_heat_map_has_log2_changes_of_the_surest_genes_of_the_largest_effects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pair_figures, "HEAT_PAIRS", 2)
    monkeypatch.setattr(pair_figures, "GENES_OF_EACH", 1)
    observed = np.array([[0.1, 0.1, 0.1, 0.1], [2.0, 0.0, 0.0, 3.0], [0.0, -1.0, 0.0, 0.5]])
    result = results([0.1, 0.2, 0.3], observed, observed / 2)
    result.variance[:, 3] = 2500.0  # that gene varies between controls more than it changes
    figure = heat_map(result, list("abcd"))
    assert figure.columns == ["gene", "P1, observed", "P1, predicted", "P2, observed", "P2, predicted"]
    ln2 = math.log(2)
    assert [row[0] for row in figure.rows] == ["a", "b"]
    assert figure.rows[0][1:] == pytest.approx([2 / ln2, 1 / ln2, 0, 0], abs=1e-5)
    assert figure.rows[1][1:] == pytest.approx([0, 0, -1 / ln2, -0.5 / ln2], abs=1e-5)


def test_the_matrix_ranks_the_real_effects_by_their_distance_to_each_predicted_one() -> None:
    observed = np.array([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    predicted = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 1.9]])
    figure = discrimination(results([0.1, 0.2, 0.3], observed, predicted), ["a", "b"])
    assert figure is not None
    assert figure.rows == [["P0", 0.0, 1.0, 0.5], ["P1", 1.0, 0.5, 0.0], ["P2", 1.0, 0.0, 0.5]]
    assert discrimination(results([0.1]), list("abc")) is None


def test_sizes_of_effects_are_compared_without_the_noise_of_finite_cells() -> None:
    observed = np.array([[3.0, 4.0], [0.1, 0.0]])
    result = results([0.1, 0.2], observed, observed * 2, noise=0.5)
    figure = calibration(result)
    assert figure.rows[0][1:] == pytest.approx([math.sqrt(25 - 0.5), 10.0, 2.5], rel=1e-5)
    assert figure.rows[1][1] == 0.0 and figure.plot["data"][2]["x"][1] is None  # no place on a logarithmic axis


def test_maps_of_cells_have_the_same_axes_for_every_perturbation() -> None:
    one, other, controls = np.array([[0.0, 1.0]]), np.array([[5.0, -1.0], [7.0, 0.0]]), np.array([[1.0, 1.0]])
    figures = cell_maps(CellMap("val", "x", ["P", "Q"], [one, other], [other, one], controls, (0.5, 0.2)))
    layouts = [figure.plot["layout"] for figure in figures.values()]
    assert layouts[0]["xaxis"]["range"] == layouts[1]["xaxis"]["range"] and list(figures) == ["P", "Q"]
    assert [row[:2] for row in figures["P"].rows] == [["control cells", 1], ["real cells", 1], ["predicted cells", 2]]
    assert layouts[0]["xaxis"]["title"]["text"] == "component 1 (50.0% of the variance)"
