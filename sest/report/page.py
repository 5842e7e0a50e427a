"""Pieces of the page that `sest report` writes. Text is escaped here; only `Html` is taken as it is.

The page is one file: style (report.css), script (report.js), plotly's script and the figures as JSON all stand in it,
and its policy forbids it to load anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from sest.errors import visible
from sest.report.figures import Figure, escape

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
GENERATOR = '<meta name="generator" content="sest report">'

LONG = 30  # characters of a cell that wants a wide column


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> Html:
    """A value for people: numbers of four digits, "-" for what is not there or not finite; escaped."""
    if isinstance(value, Html):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Html("-")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    if isinstance(value, (int, float)) and float(value).is_integer():
        return Html(f"{value:,.0f}")
    return Html(f"{value:.4g}" if isinstance(value, float) else escape(str(value)))


def sentence_case(words: str) -> str:
    return words[:1].upper() + words[1:]


def join(parts: Iterable[Html]) -> Html:
    return Html("\n".join(parts))


def element(tag: str, *content: Any, **attributes: str) -> Html:
    """`element("p", "a < b", class_="note")`; `for_` and `class_` lose their underscore, others get dashes."""
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{written}>{''.join(text(part) for part in content)}</{tag}>")


def paragraph(*content: Any) -> Html:
    return element("p", *content)


def note(*content: Any) -> Html:
    """Why something is not here."""
    return element("p", *content, class_="absent")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    """A table that scrolls within its box; columns of numbers stand right."""
    is_number = [
        bool(rows) and all(row[i] is None or (isinstance(row[i], (int, float)) and row[i] is not True) for row in rows)
        for i in range(len(columns))
    ]
    is_long = [any(isinstance(row[i], str) and len(row[i]) > LONG for row in rows) for i in range(len(columns))]
    kinds = ["number" if n else "word long" if long else "word" for n, long in zip(is_number, is_long, strict=True)]
    head = join(element("th", c, scope="col", class_=kind) for c, kind in zip(columns, kinds, strict=True))
    body = join(
        element("tr", join(element("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows
    )
    whole = element("table", element("thead", element("tr", head)), element("tbody", body))
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label="table")


def details(summary: str, *content: Html) -> Html:
    return element("details", element("summary", summary), *content)


def section(identity: str, title: str, *content: Html, level: int = 2) -> Html:
    return element("section", element(f"h{level}", title), *content, id=identity)


class Page:
    """Collects figures while the sections are written, then writes the whole page."""

    def __init__(self) -> None:
        self._figures: dict[str, Any] = {}

    def _add(self, figure: Figure, *, with_rows: bool = False) -> str:
        key = f"f{len(self._figures)}"
        rows = [[visible(cell) if isinstance(cell, str) else cell for cell in row] for row in figure.rows]
        self._figures[key] = figure.plot | ({"columns": figure.columns, "rows": rows} if with_rows else {})
        return key

    def plot(self, title: str, figure: Figure | None) -> Html:
        """A plot with its title, and its numbers below."""
        if figure is None:
            return element("figure", element("figcaption", title), note("No values."))
        numbers = details("Numbers", table(figure.columns, figure.rows))
        return element("figure", element("figcaption", title), _canvas(self._add(figure), title), numbers)

    def buttons(self, title: str, figures: dict[str, Figure]) -> Html:
        """A plot of which one form is shown, chosen by buttons; the numbers of all forms below."""
        keys = {name: self._add(figure, with_rows=True) for name, figure in figures.items()}
        first = next(iter(keys.values()))
        choice = join(
            element("button", name, type="button", data_figure=key, aria_pressed="true" if key == first else "false")
            for name, key in keys.items()
        )
        tables = [table(figure.columns, figure.rows) for figure in figures.values()]
        return element(
            "figure",
            element("figcaption", title),
            element("div", choice, class_="choice", role="group", aria_label="Colour by"),
            _canvas(first, title, tall=True),
            element("p", class_="key dots"),
            details("Numbers", *tables),
        )

    def choices(self, titles: Sequence[str], chosen: Sequence[int], figures: dict[str, Figure]) -> Html:
        """Plots side by side that each show one of the same figures, chosen from a list (tables by the script)."""
        keys = {name: self._add(figure, with_rows=True) for name, figure in figures.items()}
        names = list(keys)
        parts = []
        for title, number in zip(titles, chosen, strict=True):
            options = join(
                Html(f'<option value="{key}"{" selected" if name == names[number] else ""}>{text(name)}</option>')
                for name, key in keys.items()
            )
            parts.append(
                element(
                    "figure",
                    element("figcaption", title),
                    element("select", options, aria_label=title),
                    _canvas(keys[names[number]], title, tall=True),
                    element("details", element("summary", "Numbers"), element("div", class_="scroll filled")),
                )
            )
        return grid(parts)

    def whole(self, title: str, contents: Sequence[tuple[str, str]], body: Html) -> str:
        """The page. contents: (id, title) of the sections."""
        from plotly.offline import get_plotlyjs

        links = join(element("li", element("a", name, href=f"#{identity}")) for identity, name in contents)
        figures = json.dumps(self._figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        ours = resources.files("sest.report")
        return "\n".join(
            [
                "<!DOCTYPE html>",
                '<html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<meta name="color-scheme" content="light dark">{GENERATOR}',
                element("title", title),
                f"<style>{(ours / 'report.css').read_text()}</style></head><body>",
                element("nav", element("ul", links), aria_label="Contents"),
                element("main", body),
                "<noscript><p class='absent'>The plots need JavaScript; their numbers are in tables.</p></noscript>",
                f'<script type="application/json" id="figures">{figures}</script>',
                f"<script>{get_plotlyjs()}</script>",
                f"<script>{(ours / 'report.js').read_text()}</script>",
                "</body></html>\n",
            ]
        )


def _canvas(key: str, title: str, *, tall: bool = False) -> Html:
    label = f"Plot: {title}. Its numbers are in the table below."
    return element("div", class_="plot tall" if tall else "plot", data_figure=key, role="img", aria_label=label)


def grid(parts: Iterable[Html], *, three: bool = False) -> Html:
    """Figures side by side where there is room."""
    return element("div", join(parts), class_="grid three" if three else "grid")
