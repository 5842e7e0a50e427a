"""Pieces of the page that `sest report` writes. Text is escaped here; only `Html` is taken as it is.

The page is one file: style (report.css), script (report.js), plotly's script and the figures as JSON all stand in it,
and its policy forbids it to load anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from sest.errors import visible
from sest.report.figures import Figure, escape

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
GENERATOR = '<meta name="generator" content="sest report">'

CODE = re.compile("`([^`]*)`")
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
    """Text between backticks becomes code."""
    return element("p", *(Html(CODE.sub(r"<code>\1</code>", text(part))) for part in content))


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
    """Collects figures while the sections are written, then writes the whole page.

    Numbers of figures stand in the page once, as JSON, and become a table when a reader opens it.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Any] = {}

    def _add(self, values: dict[str, Any]) -> str:
        key = f"f{len(self._figures)}"
        self._figures[key] = values
        return key

    def _figure(self, figure: Figure) -> str:
        numbers = {"columns": figure.columns, "rows": [list(map(_plain, row)) for row in figure.rows]}
        key = [(visible(words), colour, symbol) for words, colour, symbol in figure.key]
        more = {"key": key, "height": figure.height}
        return self._add(figure.plot | numbers | {name: value for name, value in more.items() if value})

    def plot(self, title: str, figure: Figure | None, *words: Any) -> Html:
        """A plot with its title and what is said of it, and its numbers below."""
        if figure is None:
            return element("figure", element("figcaption", title), note("No values."))
        said = [element("p", *words)] if words else []
        return element("figure", element("figcaption", title), *said, *_shown(self._figure(figure), title, figure))

    def buttons(self, title: str, figures: dict[str, Figure], *words: Any, by: str = "Show") -> Html:
        """A plot of which one form is shown, chosen by buttons."""
        keys = {name: self._figure(figure) for name, figure in figures.items()}
        first = next(iter(keys))
        choice = join(
            element("button", name, type="button", data_figure=key, aria_pressed="true" if name == first else "false")
            for name, key in keys.items()
        )
        return element(
            "figure",
            element("figcaption", title),
            *([element("p", *words)] if words else []),
            element("div", choice, class_="choice", role="group", aria_label=by),
            *_shown(keys[first], title, figures[first]),
        )

    def choices(self, titles: Sequence[str], chosen: Sequence[int], figures: dict[str, Figure]) -> Html:
        """Plots side by side that each show one of the same figures, chosen from a list."""
        keys = {name: self._figure(figure) for name, figure in figures.items()}
        names = list(keys)
        parts = []
        for title, number in zip(titles, chosen, strict=True):
            options = join(
                Html(f'<option value="{key}"{" selected" if name == names[number] else ""}>{text(name)}</option>')
                for name, key in keys.items()
            )
            select = element("select", options, aria_label=title)
            shown = _shown(keys[names[number]], title, figures[names[number]])
            parts.append(element("figure", element("figcaption", title), select, *shown))
        return grid(parts)

    def numbers(self, summary: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
        """A long table, closed, that the script fills."""
        key = self._add({"columns": list(columns), "rows": [list(map(_plain, row)) for row in rows]})
        return _filled(summary, key)

    def whole(self, title: str, contents: Sequence[tuple[str, str]], body: Html) -> str:
        """The page. contents: (id, title) of the sections."""
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
                "<noscript><p class='absent'>The plots and their numbers need JavaScript.</p></noscript>",
                f'<script type="application/json" id="figures">{figures}</script>',
                f"<script>{_plotly()}</script>",
                f"<script>{(ours / 'report.js').read_text()}</script>",
                "</body></html>\n",
            ]
        )


def _shown(key: str, title: str, figure: Figure) -> list[Html]:
    """The place of a plot, of what its marks mean, of its numbers and of the links that save it."""
    label = f"Plot: {title}. Its numbers are in the table below."
    height = {"style": f"height:{figure.height}px"} if figure.height else {}
    saved = (element("button", kind.upper(), type="button", data_save=kind) for kind in ("svg", "png"))
    return [
        element("p", class_="key"),
        element("div", class_="plot", data_figure=key, role="img", aria_label=label, **height),
        element("div", _filled("Numbers", key), element("p", "Save as ", *saved, class_="save"), class_="below"),
    ]


def _filled(summary: str, key: str) -> Html:
    return element("details", element("summary", summary), element("div", class_="scroll"), data_rows=key)


def _plain(value: Any) -> Any:
    """What JSON can hold; of text what is invisible as well."""
    if isinstance(value, str):
        return visible(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def grid(parts: Iterable[Html], *, three: bool = False) -> Html:
    """Figures side by side where there is room."""
    return element("div", join(parts), class_="grid three" if three else "grid")


def _plotly() -> str:
    """Plotly's script; its Python modules are slow to import."""
    return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
