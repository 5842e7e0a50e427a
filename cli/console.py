"""All printing: sentences, tables and JSON on standard output; notes and errors, a line each, on standard error.

Names and labels in them are from files: nothing is markup, and what a terminal would obey is shown (`visible`).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from textwrap import wrap
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sest.errors import visible


def _console(stream: str) -> Console:
    """A notebook (`!sest ...`) passes for a terminal, and FORCE_COLOR calls a log file one: both get plain lines."""
    plain = "JPY_PARENT_PID" in os.environ or ("FORCE_COLOR" in os.environ and not getattr(sys, stream).isatty())
    return Console(stderr=stream == "stderr", highlight=False, force_terminal=False if plain else None)


out, err = _console("stdout"), _console("stderr")


def _text(words: str) -> Text:
    return Text(visible(words))


def error(message: str) -> None:
    """Print an error as one line on standard error (a terminal wraps it between words)."""
    err.print(Text.assemble(("Error: ", "bold red"), _text(" ".join(message.split()))), soft_wrap=not err.is_terminal)


def note(message: str) -> None:
    """Print a sentence on standard error, where it does not mix with what a command answers."""
    err.print(_text(message), soft_wrap=not err.is_terminal)


def command(text: str) -> None:
    """Print a command line that is about to be carried out; a terminal shows it in lines that can be copied."""
    text = visible(text)
    lines = [text]
    if err.is_terminal and "'" not in text:
        lines = wrap(text, err.width - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    err.print(Text.assemble(("\n$ ", "bold green"), (" \\\n".join(lines), "bold")), soft_wrap=True)


def say(message: str) -> None:
    """Print a sentence on standard output."""
    out.print(_text(message), soft_wrap=not out.is_terminal)


def say_json(value: Any) -> None:
    """Print a value as JSON on standard output, sorted, for other programs."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    drawn = Table(title=_text(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        is_number = all(re.fullmatch(r"[-+.,e0-9]+|nan", row[i]) for row in rows)
        drawn.add_column(_text(column), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(_text, row))
    out.print(drawn)


def figure(value: float, decimals: int = 4, width: int = 99) -> str:
    """A score, with fewer decimals where it would be wider than `width`; "-" where it is none."""
    if not math.isfinite(value):
        return "-"
    too_wide = max(len(f"{value:.{decimals}f}") - width, 0)
    return f"{value:.{max(decimals - too_wide, 0)}f}"
