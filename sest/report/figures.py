"""The figures of `sest report`: plotly figures as plain values, each with the table of its numbers.

Colours are names of CSS variables ("var(--blue)"), which the page fills in for a light or a dark background. Plotly
reads a subset of HTML in texts, so names given by users are escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sest.errors import visible
from sest.report.cache_facts import PairResults
from sest.report.embedding_map import CONTROL, EmbeddingMap
from sest.report.run_facts import RunFacts
from sest.runs.curves import Curves, strongest

MOST_POINTS = 2_000  # of a curve
MOST_ROWS = 100  # of the table of a curve
MOST_GENES = 300  # of a scatter of genes
MOST_PAIRS = 200  # that can be chosen among: the worst and the best half
FALLING, FAR = ("loss", "grad_norm"), 5.0  # an axis is logarithmic where these fall this many times
MOST_GROUPS = 12  # that have a colour of their own in a map
COLOURS = ("var(--blue)", "var(--vermillion)", "var(--green)", "var(--purple)", "var(--orange)", "var(--sky)")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "cross")
INK, QUIET, LINE = "var(--ink)", "var(--quiet)", "var(--line)"


def escape(text: str) -> str:
    """Text from files as HTML that shows it, what is invisible too."""
    return html.escape(visible(text))


@dataclass(frozen=True, eq=False)
class Figure:
    """A plot and its numbers."""

    plot: dict[str, Any]  # data and layout, for Plotly
    columns: list[str]  # of the table
    rows: list[list[Any]]  # numbers and plain text, not escaped


def numbers(values: Any) -> list[float | None]:
    """Plain numbers of six digits; None for what is not finite."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def _plot(traces: list[Any], x: str, y: str, **layout: Any) -> dict[str, Any]:
    axis = {"gridcolor": LINE, "zerolinecolor": LINE, "linecolor": LINE, "tickcolor": LINE, "automargin": True}
    figure = go.Figure(
        data=traces,
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12, "color": INK},
            "margin": {"l": 52, "r": 14, "t": 10, "b": 44},
            "hoverlabel": {"bgcolor": "var(--page)", "bordercolor": LINE, "font": {"color": INK}, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
            "xaxis": {**axis, "title": {"text": x}, **layout.pop("xaxis", {})},
            "yaxis": {**axis, "title": {"text": y, "standoff": 8}, **layout.pop("yaxis", {})},
            **layout,
        },
    )
    plot: dict[str, Any] = figure.to_plotly_json()
    plot["layout"].pop("template", None)
    return plot


# --- curves over steps


@dataclass(frozen=True, eq=False)
class Line:
    """One curve. n points."""

    name: str
    steps: np.ndarray  # (n,)
    values: np.ndarray  # (n,)
    colour: str = COLOURS[0]
    dash: str = "solid"


def curve(
    lines: Sequence[Line],
    y: str,
    *,
    mark: tuple[float, float, str] | None = None,
    legend: bool = True,
    falls: bool = False,
) -> Figure | None:
    """Curves over steps; None where none of them has a finite value.

    Args:
        mark: step, value and name of a point to show.
        legend: show one where there are several curves.
        falls: give it a logarithmic axis if it falls far.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    traces = []
    for line in lines:
        steps, values = _thin(line, MOST_POINTS)
        traces.append(
            go.Scatter(
                x=numbers(steps),
                y=numbers(values),
                name=escape(line.name),
                mode="lines" if len(steps) > 1 else "markers",
                line={"color": line.colour, "width": 2, "dash": line.dash},
                marker={"color": line.colour},
                hovertemplate="step %{x:,}: %{y:.4g}",
            )
        )
    if mark is not None:
        step, value, name = mark
        traces.append(
            go.Scatter(
                x=[step],
                y=numbers([value]),
                name=escape(name),
                mode="markers",
                marker={"color": lines[0].colour, "size": 10, "symbol": "circle-open", "line": {"width": 2}},
                hovertemplate="step %{x:,}: %{y:.4g}",
            )
        )
    every = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    yaxis = _log_axis(y, every) if falls and every.min() > 0 and every.max() > FAR * every.min() else {}
    plot = _plot(traces, "step", y, showlegend=legend and len(traces) > 1, hovermode="closest", yaxis=yaxis)
    return Figure(plot, ["step", *(line.name for line in lines)], _curve_rows(lines))


def _log_axis(y: str, values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten."""
    powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    ticks = [float(f"{m}e{power}") for power in powers for m in (1, 2, 5)]
    title = {"text": f"{y} (log scale)", "standoff": 8}
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks], "title": title}


def _thin(line: Line, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, evenly spaced, the last one among them."""
    every = -(-len(line.steps) // most)
    chosen = np.arange(len(line.steps))[::-1][::every][::-1]
    return line.steps[chosen], line.values[chosen]


def _curve_rows(lines: Sequence[Line]) -> list[list[Any]]:
    by_line = [dict(zip(line.steps.tolist(), line.values.tolist(), strict=True)) for line in lines]
    steps = np.array(sorted(set().union(*by_line)))
    chosen, _ = _thin(Line("", steps, steps), MOST_ROWS)
    return [[int(step), *(values.get(step, math.nan) for values in by_line)] for step in chosen.tolist()]


def _column(columns: dict[str, np.ndarray], name: str) -> np.ndarray:
    return columns.get(name, np.full(len(columns["step"]), math.nan))


def log_curve(curves: Curves, name: str, y: str, *, limit: str = "") -> Figure | None:
    """A value of the log lines; `limit` names a column to draw beside it."""
    lines = [Line(y, curves.log["step"], _column(curves.log, name))]
    if limit:
        lines.append(Line("limit of the device", curves.log["step"], _column(curves.log, limit), QUIET, "dash"))
    return curve(lines, y, falls=name in FALLING)


def validation_curve(run: RunFacts, metric: str) -> Figure | None:
    """A metric of the validations beside two baselines (no legend: the page has one for all metrics)."""
    columns = run.curves.validation
    if not len(columns["step"]):
        return None
    step, beside = columns["step"], strongest(columns)
    lines = [
        Line("head", step, _column(columns, metric)),
        Line(beside.replace("_", " "), step, _column(columns, f"{metric}_{beside}"), COLOURS[1], "dash"),
        Line("controls", step, _column(columns, f"{metric}_controls"), QUIET, "dot"),
    ]
    best = run.best()
    mark = None
    if metric == "val_loss" and best is not None:
        mark = (float(step[best]), float(columns[metric][best]), f"best, step {step[best]:,.0f}")
    return curve(lines, metric, mark=mark, legend=False)


def overlaid(runs: Sequence[RunFacts], kind: str, name: str) -> Figure | None:
    """The same column of several runs; `kind`: "log" or "validation"."""
    lines = []
    for i, run in enumerate(runs):
        columns = getattr(run.curves, kind)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        lines.append(Line(run.name, columns["step"], _column(columns, name), colour, dash))
    return curve(lines, name, falls=name in FALLING)


# --- held-out pairs


def overview(results: Sequence[PairResults]) -> Figure:
    """One dot a pair: how large its effect is, and how well it is predicted."""
    traces, rows = [], []
    for i, result in enumerate(results):
        scores = result.scores
        names = [pair_name(result, k) for k in range(len(result.perturbations))]
        traces.append(
            go.Scatter(
                x=numbers(result.effect),
                y=numbers(scores["pearson_delta"]),
                name=f"{result.split} split",
                mode="markers",
                marker={
                    "color": COLOURS[i],
                    "symbol": SYMBOLS[i],
                    "size": 9,
                    "opacity": 0.8,
                    "line": {"width": 1, "color": "var(--page)"},
                },
                text=[
                    f"{escape(name)}<br>pearson_delta {_short(r)} (stack {_short(b)})<br>{n:,} cells, effect {e:.3g}"
                    for name, r, b, n, e in zip(
                        names,
                        scores["pearson_delta"],
                        scores["stack"],
                        result.n_cells,
                        result.effect,
                        strict=True,
                    )
                ],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        rows += [[name, result.split, *values] for name, values in zip(names, _overview_values(result), strict=True)]
    plot = _plot(traces, "size of the observed effect (L2 norm, log1p)", "pearson_delta", hovermode="closest")
    return Figure(plot, ["pair", "split", "effect", "pearson_delta"], rows)


def _overview_values(result: PairResults) -> list[list[float]]:
    return np.stack([result.effect, result.scores["pearson_delta"]], 1).tolist()


def pair_name(result: PairResults, k: int) -> str:
    """What a pair is called: its perturbation and its cell type."""
    return f"{result.perturbations[k]} in {result.cell_types[k]}"


def ranked(result: PairResults) -> np.ndarray:
    """(K,) pairs from the lowest pearson_delta to the highest; one that is no number stands first."""
    scores = result.scores["pearson_delta"]
    return np.argsort(np.where(np.isfinite(scores), scores, -np.inf), kind="stable")


def choosable(results: Sequence[PairResults]) -> list[tuple[PairResults, int]]:
    """The pairs whose genes are shown, worst first: all, or the worst and the best of them."""
    pairs = [(result, int(k)) for result in results for k in ranked(result)]
    pairs.sort(key=lambda pair: float(np.nan_to_num(pair[0].scores["pearson_delta"][pair[1]], nan=-np.inf)))
    return pairs if len(pairs) <= MOST_PAIRS else pairs[: MOST_PAIRS // 2] + pairs[-MOST_PAIRS // 2 :]


def gene_scatter(result: PairResults, k: int, genes: Sequence[str]) -> Figure:
    """Predicted against observed change, one point a gene, of the genes with the largest change of either."""
    observed, predicted = result.observed[k], result.predicted[k]
    size = np.fmax(np.abs(observed), np.abs(predicted))
    chosen = np.argsort(-np.nan_to_num(size), kind="stable")[:MOST_GENES]
    x, y, names = observed[chosen], predicted[chosen], [genes[i] for i in chosen]
    finite = np.concatenate([x, y])[np.isfinite(np.concatenate([x, y]))]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    pad = 0.06 * (high - low) or 1.0
    edges = [float(f"{low - pad:.6g}"), float(f"{high + pad:.6g}")]
    traces = [
        go.Scatter(x=edges, y=edges, mode="lines", line={"color": QUIET, "width": 1, "dash": "dash"}, hoverinfo="skip"),
        go.Scatter(
            x=numbers(x),
            y=numbers(y),
            mode="markers",
            marker={"color": COLOURS[0], "size": 6, "opacity": 0.7},
            text=[escape(name) for name in names],
            hovertemplate="%{text}<br>observed %{x:.3f}, predicted %{y:.3f}<extra></extra>",
        ),
    ]
    plot = _plot(
        traces,
        "observed change (log1p)",
        "predicted change (log1p)",
        showlegend=False,
        hovermode="closest",
        xaxis={"range": edges},
        yaxis={"range": edges},
    )
    rows = [list(row) for row in zip(names, numbers(x), numbers(y), strict=True)]
    return Figure(plot, ["gene", "observed", "predicted"], rows)


def _short(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


# --- the map of the embeddings


def embedding_map(cells: EmbeddingMap, layout: str, label: str) -> Figure:
    """The sampled cells, coloured by one of their labels: the largest groups, the others light, controls grey."""
    places, names = cells.places[layout], np.array(cells.labels[label], dtype=object)
    is_control = cells.is_control & (label == "perturbation")
    values, counts = np.unique(names[~is_control].astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    own = [str(values[i]) for i in order[:MOST_GROUPS]]
    others = ~np.isin(names.astype(str), own) & ~is_control
    groups = [
        (f"{len(values) - len(own)} others", others, "var(--light)", SYMBOLS[0]),
        (CONTROL, is_control, "var(--grey)", SYMBOLS[0]),
    ]
    for i, name in enumerate(own):
        mine = (names.astype(str) == name) & ~is_control
        groups.append((name, mine, COLOURS[i % len(COLOURS)], SYMBOLS[i // len(COLOURS)]))
    traces, rows = [], []
    for name, mine, colour, symbol in groups:
        if not mine.any():
            continue
        traces.append(
            go.Scatter(
                x=numbers(places[mine, 0]),
                y=numbers(places[mine, 1]),
                name=escape(name),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 5, "opacity": 0.7},
                text=[escape(text) for text in names[mine]],
                hovertemplate="%{text}<extra></extra>",
            )
        )
        rows.append([name, int(mine.sum()), *places[mine].mean(0).tolist()])
    if layout == "PCA":
        axes = [f"component {i + 1} ({share:.1%} of the variance)" for i, share in enumerate(cells.explained)]
    else:
        axes = ["UMAP 1", "UMAP 2"]
    plot = _plot(traces, *axes, hovermode="closest", showlegend=False)  # the page draws one, which can be long
    return Figure(plot, [label, "cells", f"mean {layout} 1", f"mean {layout} 2"], rows)
