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

from sest.errors import visible
from sest.facts.embeddings import CONTROL, EmbeddingMap
from sest.facts.run import RunFacts
from sest.runs.curves import Curves, strongest

MOST_POINTS = 2_000  # of a curve
MOST_ROWS = 100  # of the table of a curve
HOVER = "step %{x:,}: %{y:.4g}"
FALLING, FAR = ("loss", "grad_norm"), 5.0  # an axis is logarithmic where these fall this many times
MOST_GROUPS = 12  # that have a colour of their own in a map
COLOURS = ("var(--blue)", "var(--vermillion)", "var(--green)", "var(--purple)", "var(--orange)", "var(--sky)")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "cross")
INK, QUIET, LINE = "var(--ink)", "var(--quiet)", "var(--line)"

Key = tuple[str, str, str]  # what a mark stands for (not escaped), its colour, and its symbol or dash


def escape(text: str) -> str:
    """Text from files as HTML that shows it, what is invisible too."""
    return html.escape(visible(text))


@dataclass(frozen=True, eq=False)
class Figure:
    """A plot and its numbers."""

    plot: dict[str, Any]  # data and layout, for Plotly
    columns: list[str]  # of the table
    rows: list[list[Any]]  # numbers and plain text, not escaped
    key: tuple[Key, ...] = ()  # drawn by the page, as that of a plot takes its place away on small screens
    height: int | None = None  # pixels; None: as the page has it


def numbers(values: Any) -> list[float | None]:
    """Plain numbers of six digits; None for what is not finite."""
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def plotted(traces: list[dict[str, Any]], x: str, y: str, **layout: Any) -> dict[str, Any]:
    """Traces on a pair of axes with these titles; `layout` wins. Plotly's own classes would take 20 ms a figure."""
    axis = {"gridcolor": LINE, "zerolinecolor": LINE, "linecolor": LINE, "tickcolor": LINE, "automargin": True}
    usual = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": INK},
        "margin": {"l": 52, "r": 14, "t": 10, "b": 44},
        "hoverlabel": {"bgcolor": "var(--page)", "bordercolor": LINE, "font": {"color": INK}, "align": "left"},
        "hovermode": "closest",
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
        "xaxis": {**axis, "title": {"text": x}, **layout.pop("xaxis", {})},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}, **layout.pop("yaxis", {})},
    }
    return {"data": traces, "layout": {**usual, **layout}}


def dots(x: Any, y: Any, name: str, colour: str, symbol: str = "circle", **values: Any) -> dict[str, Any]:
    """A trace of points; `marker` among the values adds to theirs."""
    marker = {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.75, **values.pop("marker", {})}
    mode = values.pop("mode", "markers")
    axes = {"x": x if isinstance(x, list) else numbers(x), "y": y if isinstance(y, list) else numbers(y)}
    return {"type": "scatter", "mode": mode, "name": escape(name), **axes, "marker": marker, **values}


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
    falls: bool = False,
) -> Figure | None:
    """Curves over steps; None where none of them has a finite value.

    Args:
        mark: step, value and name of a point to show.
        falls: give it a logarithmic axis if it falls far.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    traces = []
    for line in lines:
        steps, values = _thin(line, MOST_POINTS)
        trace = dots(steps, values, line.name, line.colour, hovertemplate=HOVER)
        if len(steps) > 1:
            trace |= {"mode": "lines", "line": {"color": line.colour, "width": 2, "dash": line.dash}}
        traces.append(trace)
    if mark is not None:
        step, value, name = mark
        open_circle = {"size": 10, "opacity": 1, "line": {"width": 2}}
        traces.append(
            dots([step], [value], name, lines[0].colour, "circle-open", marker=open_circle, hovertemplate=HOVER)
        )
    every = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    yaxis = _log_axis(y, every) if falls and every.min() > 0 and every.max() > FAR * every.min() else {}
    key = [(line.name, line.colour, line.dash) for line in lines] if len(lines) > 1 else []
    key += [(mark[2], lines[0].colour, "circle-open")] if mark is not None else []
    columns = ["step", *(line.name for line in lines)]
    return Figure(plotted(traces, "step", y, yaxis=yaxis), columns, _curve_rows(lines), tuple(key))


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
    """A metric of the validations beside two baselines."""
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
    return curve(lines, metric, mark=mark)


def overlaid(runs: Sequence[RunFacts], kind: str, name: str) -> Figure | None:
    """The same column of several runs; `kind`: "log" or "validation"."""
    lines = []
    for i, run in enumerate(runs):
        columns = getattr(run.curves, kind)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        lines.append(Line(run.name, columns["step"], _column(columns, name), colour, dash))
    return curve(lines, name, falls=name in FALLING)


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
    traces, rows, key = [], [], list[Key]()
    for name, mine, colour, symbol in groups:
        if not mine.any():
            continue
        texts = [escape(text) for text in names[mine]]
        more: dict[str, Any] = {"text": texts, "hovertemplate": "%{text}<extra></extra>", "marker": {"size": 5}}
        traces.append(dots(places[mine, 0], places[mine, 1], name, colour, symbol, **more))
        rows.append([name, int(mine.sum()), *places[mine].mean(0).tolist()])
        key.append((name, colour, symbol))
    x, y = components(cells.explained) if layout == "PCA" else ("UMAP 1", "UMAP 2")
    columns = [label, "cells", f"mean {layout} 1", f"mean {layout} 2"]
    return Figure(plotted(traces, x, y), columns, rows, tuple(key), height=440)


def components(explained: Sequence[float]) -> tuple[str, str]:
    """Titles of the axes of principal components."""
    first, second = (f"component {i} ({share:.1%} of the variance)" for i, share in enumerate(explained, 1))
    return first, second
