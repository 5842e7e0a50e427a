"""The figures of held-out pairs: scores, effects, genes and cells, predicted and real.

Shapes: K pairs, G genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sest.evaluation.distances import l1_distances
from sest.facts.cells import CellMap
from sest.facts.pairs import PairResults
from sest.facts.scores import HIGHER, MODEL
from sest.report.figures import COLOURS, INK, QUIET, SYMBOLS, Figure, Key, components, dots, escape, numbers, plotted

MOST_BARS = 30  # pairs of a figure of scores: those furthest behind the best baseline, and furthest ahead
MOST_LABELS = 6  # points with a name beside them
MOST_GENES = 200  # of a scatter of genes
MOST_PAIRS = 60  # whose genes can be looked at: the worst and the best half
HEAT_PAIRS, GENES_OF_EACH, HEAT_GENES = 8, 5, 32  # of the heat map
MOST_TOLD_APART = 24  # pairs of the discrimination matrix
PREDICTED = COLOURS[1]
LOOKS: dict[str, tuple[str, str]] = {  # of baselines, beside a bar of the model
    "controls": (QUIET, "line-ns"),
    "context_mean": (COLOURS[5], "triangle-up"),
    "perturbation_mean": (COLOURS[2], "square"),
    "nearest": (COLOURS[3], "cross"),
    "ridge": (COLOURS[4], "circle"),
    "kernel": (COLOURS[4], "diamond-open"),
    "stack": (COLOURS[1], "diamond"),
}
DIVERGING = [[0, COLOURS[0]], [0.5, "var(--page)"], [1, COLOURS[1]]]
NEARNESS = [[0, COLOURS[0]], [1, "var(--page)"]]
SHORT = 18  # characters of a name beside a figure


def plain(name: str) -> str:
    """A predictor's or a metric's name in words."""
    return name.replace("_", " ")


def brief(name: str) -> str:
    """A name that fits beside a figure, escaped."""
    return escape(name if len(name) <= SHORT else name[: SHORT - 1] + "…")


def pair_name(result: PairResults, k: int) -> str:
    """What a pair is called: its perturbation and its cell type."""
    return f"{result.perturbations[k]} in {result.cell_types[k]}"


# --- scores


def score_bars(table: pd.DataFrame, metric: str, no_effect: Sequence[str] = ()) -> Figure:
    """A bar a pair for the model and a mark for every baseline, of the pairs that differ most from the best of them.

    Args:
        table: a row a (cell_type, perturbation), a column a predictor, the model first.
        no_effect: cell types without a measurable effect, which is said beside the names.
    """
    table = table[table[MODEL].notna()]
    baselines = [name for name in table.columns if name != MODEL]
    sign = 1.0 if metric in HIGHER else -1.0
    lead = (table[MODEL] * sign - (table[baselines] * sign).max(axis=1)).fillna(0.0).to_numpy()
    order = np.argsort(lead, kind="stable")
    if len(order) > MOST_BARS:
        order = np.concatenate([order[: MOST_BARS // 2], order[-MOST_BARS // 2 :]])
    shown = table.iloc[order]
    several = shown.index.get_level_values(0).nunique() > 1
    names = [f"{perturbation} in {kind}" if several else str(perturbation) for kind, perturbation in shown.index]
    kinds = shown.index.get_level_values(0)
    ticks = [f"{brief(n)}{' (no effect)' if kind in no_effect else ''}" for n, kind in zip(names, kinds, strict=True)]
    places = list(range(len(names)))
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": numbers(shown[MODEL]),
        "y": places,
        "name": "this model",
        "marker": {"color": COLOURS[0], "opacity": 0.55},
        "width": 0.7,
        "text": [escape(name) for name in names],
        "textposition": "none",
        "hovertemplate": "%{text}: %{x:.4g}<extra>this model</extra>",
    }
    traces, key = [bar], [("this model", COLOURS[0], "square")]
    for i, name in enumerate(baselines):
        colour, symbol = LOOKS.get(name, (COLOURS[i % len(COLOURS)], SYMBOLS[i % len(SYMBOLS)]))
        marker = {"size": 9, "opacity": 1, "line": {"width": 2 if symbol == "line-ns" else 1, "color": colour}}
        hover = f"{plain(name)}: %{{x:.4g}}<extra></extra>"
        traces.append(dots(shown[name], places, plain(name), colour, symbol, marker=marker, hovertemplate=hover))
        key.append((plain(name), colour, symbol))
    axis = {"tickvals": places, "ticktext": ticks, "autorange": "reversed", "zeroline": False}
    plot = plotted(traces, plain(metric), "", yaxis=axis)
    columns = ["pair", "this model", *map(plain, baselines)]
    rows = [[n, *numbers(row)] for n, row in zip(names, shown[[MODEL, *baselines]].to_numpy(), strict=True)]
    return Figure(plot, columns, rows, tuple(key), height=90 + 20 * len(names))


# --- effects


def overview(results: Sequence[PairResults]) -> Figure:
    """One dot a pair: how large its effect is, and how well it is predicted."""
    traces, rows, key = [], [], list[Key]()
    for i, result in enumerate(results):
        r, stack = result.of_model("pearson_delta"), _of_stack(result)
        names = [pair_name(result, k) for k in range(len(r))]
        hover = [
            f"{escape(name)}<br>pearson_delta {_short(a)} (stack {_short(b)})<br>{n:,} cells, effect {e:.3g}"
            for name, a, b, n, e in zip(names, r, stack, result.n_cells, result.effect, strict=True)
        ]
        labels = _labels(result, np.argsort(-result.effect, kind="stable")[:MOST_LABELS])
        traces.append(_named(result.effect, r, f"{result.split} split", COLOURS[i], SYMBOLS[i], labels, hover))
        key.append((f"{result.split} split", COLOURS[i], SYMBOLS[i]))
        rows += [[name, result.split, *v] for name, *v in zip(names, numbers(result.effect), numbers(r), strict=True)]
    plot = plotted(traces, "size of the observed effect (L2 norm, log1p)", "pearson_delta")
    return Figure(plot, ["pair", "split", "effect", "pearson_delta"], rows, tuple(key) if len(key) > 1 else ())


def _of_stack(result: PairResults) -> np.ndarray:
    found: np.ndarray = result.scores.loc[result.scores["predictor"] == "stack", "pearson_delta"].to_numpy(np.float64)
    return found


def _labels(result: PairResults, chosen: np.ndarray) -> list[str]:
    """(K,) a name for some points, nothing for the others."""
    labels = [""] * len(result.perturbations)
    for k in chosen:
        labels[k] = brief(result.perturbations[k])
    return labels


def _named(x: Any, y: Any, name: str, colour: str, symbol: str, labels: list[str], hover: list[str]) -> dict[str, Any]:
    """Points of which some have a name beside them."""
    more: dict[str, Any] = {
        "mode": "markers+text",
        "text": labels,
        "textposition": "top center",
        "textfont": {"size": 10},
        "cliponaxis": False,
        "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"size": 8},
    }
    return dots(x, y, name, colour, symbol, **more)


def calibration(result: PairResults) -> Figure:
    """Predicted against observed size of effect, one dot a pair; on the dashed line a size is right."""
    observed, model, stack = result.sizes
    names = [pair_name(result, k) for k in range(len(observed))]
    finite = np.concatenate([observed, model, stack])
    finite = finite[finite > 0]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.1, 1.0)
    edges = [float(f"{low / 1.3:.4g}"), float(f"{high * 1.3:.4g}")]
    off = np.abs(np.log(np.maximum(model, low)) - np.log(np.maximum(observed, low)))
    line = {"color": QUIET, "width": 1, "dash": "dash"}
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "x": edges, "y": edges, "mode": "lines", "line": line, "hoverinfo": "skip", "name": "equal"}
    ]
    labels = _labels(result, np.argsort(-off, kind="stable")[:MOST_LABELS])
    for name, sizes, colour, symbol, text in (
        ("stack", stack, "var(--grey)", "circle-open", [""] * len(names)),
        ("this model", model, COLOURS[0], "circle", labels),
    ):
        hover = [
            f"{escape(n)}<br>observed {a:.3g}, {name} {b:.3g}" for n, a, b in zip(names, observed, sizes, strict=True)
        ]
        traces.append(_named(_positive(observed), _positive(sizes), name, colour, symbol, text, hover))
    axis = {"type": "log", "range": [math.log10(edge) for edge in edges], "nticks": 6}
    plot = plotted(traces, "observed size (L2 norm, log1p)", "predicted size", xaxis=axis, yaxis=axis)
    columns = [[n, *numbers(v)] for n, *v in zip(names, observed, model, stack, strict=True)]
    key = (("this model", COLOURS[0], "circle"), ("stack", "var(--grey)", "circle-open"), ("equal", QUIET, "dash"))
    return Figure(plot, ["pair", "observed", "this model", "stack"], columns, key)


def _positive(values: np.ndarray) -> np.ndarray:
    """A logarithmic axis has no place for what is not above 0."""
    return np.where(values > 0, values, np.nan)


# --- genes


def ranked(result: PairResults) -> np.ndarray:
    """(K,) pairs from the lowest pearson_delta to the highest; one that is no number stands first."""
    scores = result.of_model("pearson_delta")
    return np.argsort(np.where(np.isfinite(scores), scores, -np.inf), kind="stable")


def choosable(results: Sequence[PairResults]) -> list[tuple[PairResults, int]]:
    """The pairs whose genes are shown, worst first: all, or the worst and the best of them."""
    found = []
    for result in results:
        scores = np.nan_to_num(result.of_model("pearson_delta"), nan=-np.inf)
        found += [(float(scores[k]), result, int(k)) for k in ranked(result)]
    found.sort(key=lambda pair: pair[0])
    pairs = [(result, k) for _, result, k in found]
    return pairs if len(pairs) <= MOST_PAIRS else pairs[: MOST_PAIRS // 2] + pairs[-MOST_PAIRS // 2 :]


def gene_scatter(result: PairResults, k: int, genes: Sequence[str]) -> Figure:
    """Predicted against observed change, one point a gene, of the genes with the largest change of either."""
    observed, predicted = result.observed[k], result.predicted[k]
    size = np.nan_to_num(np.fmax(np.abs(observed), np.abs(predicted)))
    most = np.argpartition(-size, MOST_GENES)[:MOST_GENES] if len(size) > MOST_GENES else np.arange(len(size))
    chosen = most[np.lexsort((most, -size[most]))]
    x, y, names = observed[chosen], predicted[chosen], [genes[i] for i in chosen]
    finite = np.concatenate([x, y])[np.isfinite(np.concatenate([x, y]))]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = 0.08 * (high - low) or 1.0
    edges = [float(f"{low - pad:.6g}"), float(f"{high + pad:.6g}")]
    texts = [escape(name) for name in names]
    line = {"color": QUIET, "width": 1, "dash": "dash"}
    traces = [
        {"type": "scatter", "x": edges, "y": edges, "mode": "lines", "line": line, "hoverinfo": "skip"},
        _named(x, y, "genes", COLOURS[0], "circle", [t if i < MOST_LABELS else "" for i, t in enumerate(texts)], texts)
        | {"hovertemplate": "%{hovertext}<br>observed %{x:.3f}, predicted %{y:.3f}<extra></extra>"},
    ]
    axis = {"range": edges}
    plot = plotted(traces, "observed change (log1p)", "predicted change (log1p)", xaxis=axis, yaxis=axis)
    rows = [list(row) for row in zip(names, numbers(x), numbers(y), strict=True)]
    return Figure(plot, ["gene", "observed", "predicted"], rows, height=440)


def heat_map(result: PairResults, genes: Sequence[str]) -> Figure:
    """Observed and predicted log2 fold changes of the genes that change most surely in the pairs of largest effect."""
    pairs = np.argsort(-result.effect, kind="stable")[:HEAT_PAIRS]
    noise = result.noise(pairs)
    floor = np.median(noise, axis=1, keepdims=True) + 1e-9
    z = result.observed[pairs] / (noise + floor)  # a gene that no control has is not sure of anything
    chosen = list[int]()
    for row in np.abs(np.nan_to_num(z)):
        chosen += [int(g) for g in np.argsort(-row, kind="stable")[:GENES_OF_EACH] if g not in chosen]
    chosen = chosen[:HEAT_GENES]
    several = len({result.cell_types[k] for k in pairs}) > 1
    names = [pair_name(result, k) if several else result.perturbations[k] for k in pairs]
    sides = [
        effects[pairs][:, chosen].T.astype(np.float64) / math.log(2) for effects in (result.observed, result.predicted)
    ]
    limit = float(f"{np.nanpercentile(np.abs(np.concatenate(sides)), 98) or 1.0:.3g}")
    places = list(range(len(names)))
    texts = [[escape(f"{genes[g]}, {name}") for name in names] for g in chosen]
    bar = {
        "orientation": "h",
        "thickness": 9,
        "len": 0.7,
        "y": 1.01,
        "yanchor": "bottom",
        "outlinewidth": 0,
        "nticks": 5,
    }
    traces: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": [numbers(row) for row in side],
            "x": places,
            "y": list(range(len(chosen))),
            "xaxis": axis,
            "yaxis": "y",
            "zmin": -limit,
            "zmax": limit,
            "colorscale": DIVERGING,
            "xgap": 1,
            "ygap": 1,
            "showscale": axis == "x",
            "colorbar": bar,
            "text": texts,
            "hovertemplate": "%{text}: %{z:.3f}<extra></extra>",
        }
        for axis, side in zip(("x", "x2"), sides, strict=True)
    ]
    ticks = {"tickvals": places, "ticktext": [brief(name) for name in names], "tickangle": -90, "showgrid": False}
    second = {**plotted([], "", "")["layout"]["xaxis"], **ticks, "domain": [0.52, 1], "title": {"text": "predicted"}}
    y = {
        "tickvals": list(range(len(chosen))),
        "ticktext": [brief(genes[g]) for g in chosen],
        "autorange": "reversed",
        "showgrid": False,
        "tickfont": {"size": 10},
    }
    plot = plotted(traces, "observed", "", xaxis={**ticks, "domain": [0, 0.48]}, xaxis2=second, yaxis=y)
    rows = [
        [genes[g], *numbers([value for pair in range(len(names)) for value in (sides[0][i, pair], sides[1][i, pair])])]
        for i, g in enumerate(chosen)
    ]
    columns = ["gene", *(f"{name}, {side}" for name in names for side in ("observed", "predicted"))]
    return Figure(plot, columns, rows, height=190 + 17 * len(chosen))


def discrimination(result: PairResults, genes: Sequence[str]) -> Figure | None:
    """For each predicted effect the real ones by nearness, of the context with most pairs; None of fewer than two."""
    mine = np.flatnonzero(result.context == np.bincount(result.context).argmax())
    if len(mine) < 2:
        return None
    mine = mine[np.argsort(-result.effect[mine], kind="stable")][:MOST_TOLD_APART]
    names = [result.perturbations[k] for k in mine]
    others = ~np.isin(np.array(genes, str), names)  # a perturbed gene tells which perturbation it was
    sides = [effects[mine][:, others].astype(np.float64) for effects in (result.predicted, result.observed)]
    distance = l1_distances(*sides)
    nearer = distance.argsort(1, kind="stable").argsort(1, kind="stable") / (len(mine) - 1)
    places = list(range(len(names)))
    ticks = [brief(name) for name in names]
    heat = {
        "type": "heatmap",
        "z": [numbers(row) for row in nearer],
        "x": places,
        "y": places,
        "colorscale": NEARNESS,
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": [[f"{p} predicted, {r} real" for r in map(escape, names)] for p in map(escape, names)],
        "hovertemplate": "%{text}: %{z:.2f} of the others are nearer<extra></extra>",
    }
    own = dots(places, places, "its own", INK, "circle-open", marker={"size": 7, "opacity": 1}, hoverinfo="skip")
    axis = {"tickvals": places, "ticktext": ticks, "showgrid": False, "tickfont": {"size": 10}}
    x, y = {**axis, "tickangle": -90}, {**axis, "autorange": "reversed"}
    plot = plotted([heat, own], "real effect of", "predicted effect of", xaxis=x, yaxis=y)
    rows = [[name, *numbers(row)] for name, row in zip(names, nearer, strict=True)]
    key = (("nearest", COLOURS[0], "square"), ("furthest", "var(--page)", "framed"), ("its own", INK, "circle-open"))
    return Figure(plot, ["predicted", *names], rows, key, height=max(280, 140 + 17 * len(names)))


# --- cells


def cell_maps(cells: CellMap) -> dict[str, Figure]:
    """Perturbation -> its predicted and real cells and the controls, all on the same axes."""
    every = np.concatenate([cells.controls, *cells.real, *cells.predicted])
    low, high = every.min(0), every.max(0)
    pad = 0.05 * (high - low) + 1e-6
    ranges = [numbers([a, b]) for a, b in zip(low - pad, high + pad, strict=True)]
    x, y = components(cells.explained)
    found = {}
    for name, real, predicted in zip(cells.perturbations, cells.real, cells.predicted, strict=True):
        groups = (
            ("control cells", cells.controls, "var(--grey)", "circle-open"),
            ("real cells", real, COLOURS[0], "circle"),
            ("predicted cells", predicted, PREDICTED, "cross"),
        )
        traces = [
            dots(of[:, 0], of[:, 1], what, colour, symbol, hovertemplate=f"{what}<extra></extra>")
            for what, of, colour, symbol in groups
        ]
        plot = plotted(traces, x, y, xaxis={"range": ranges[0]}, yaxis={"range": ranges[1]})
        rows = [[what, len(of), *numbers(of.mean(0))] for what, of, _, _ in groups]
        key = tuple((what, colour, symbol) for what, _, colour, symbol in groups)
        found[name] = Figure(plot, ["cells", "number", "mean component 1", "mean component 2"], rows, key, height=400)
    return found


def _short(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
