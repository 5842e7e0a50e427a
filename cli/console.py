"""All printing: progress bars on a terminal, plain lines elsewhere, errors in one line."""

from __future__ import annotations

import json
import re
import time
from textwrap import wrap
from types import TracebackType
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
PLAIN_SECONDS = 10.0  # between lines where no terminal draws a bar


def error(message: str) -> None:
    """Print an error as one line on standard error (a terminal wraps it between words)."""
    err.print(Text.assemble(("Error: ", "bold red"), " ".join(message.split())), soft_wrap=not err.is_terminal)


def say(message: str) -> None:
    """Print a sentence on standard output."""
    out.print(Text(message), soft_wrap=not out.is_terminal)


def say_json(value: Any) -> None:
    """Print a value as JSON on standard output, sorted, for other programs."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; columns of numbers are aligned to the right."""
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        is_number = all(re.fullmatch(r"[-+.,e0-9]+|nan", row[i]) for row in rows)
        drawn.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    out.print(drawn)


class _RateColumn(ProgressColumn):
    """Units a second since the step began."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


class ConsoleProgress:
    """A sest.progress.Progress: a Rich bar with rate and time left, or plain lines when not on a terminal.

    Args:
        prefix: of every line where several processes share a terminal; then there are no bars.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._unit = "", ""
        self._total, self._done, self._began_with = 0, 0, 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if err.is_terminal and not self._prefix:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                _RateColumn(),
                TimeRemainingColumn(compact=True),
                console=err,
                expand=True,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        if self._bars is not None:
            self._bars.stop()

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        self._finish()
        self._name, self._unit, self._total, self._done, self._began_with = task, unit, total, done, done
        self._started = self._printed = time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(task, total=total, completed=done, unit=unit)

    def advance(self, n: int = 1) -> None:
        self._done += n
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, n)
        if self._done >= self._total:
            self._finish()
        elif self._bars is None and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._line()

    def note(self, text: str) -> None:
        err.print(Text(self._prefix + text), soft_wrap=not err.is_terminal)

    def command(self, text: str) -> None:
        """A command line that is about to be carried out; a terminal shows it in lines that can be copied."""
        self._finish()
        lines = [text]
        if err.is_terminal and "'" not in text:
            lines = wrap(text, err.width - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        err.print(Text.assemble(("\n$ ", "bold green"), (" \\\n".join(lines), "bold")), soft_wrap=True)

    def show(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, in words."""
        if "val_loss" in line:
            better = "better than" if line["val_loss"] < line["val_loss_perturbation_mean"] else "not yet better than"
            self.note(
                f"step {line['step']:,}: val_loss {line['val_loss']:.4f} ({better} the perturbation mean, "
                f"{line['val_loss_perturbation_mean']:.4f}), pearson_delta {line['pearson_delta']:.3f}, "
                f"pds {line['pds']:.3f}"
            )
        elif self._bars is not None:
            if self._task is not None:
                self._bars.update(self._task, description=f"Training, loss {line['loss']:.4f}")
        else:
            skipped = f", {line['skipped_steps']} skipped" if line["skipped_steps"] else ""
            left = (self._total - line["step"]) / line["it_per_s"]
            self.note(
                f"step {line['step']:,}/{self._total:,}: loss {line['loss']:.4f}, grad norm {line['grad_norm']:.3g}, "
                f"{_rate(line['it_per_s'])} it/s, {left:,.0f} s left{skipped}"
            )
            self._printed = time.monotonic()

    def _finish(self) -> None:
        """Say how a step ended, once; its bar goes."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self._line(final=True)
        self._name = ""

    def _line(self, final: bool = False) -> None:
        """One plain line: what, how much of how much, how fast, how long still."""
        if not self._name or (final and self._done == self._began_with and self._total > 0):
            return
        now = time.monotonic()
        rate = (self._done - self._began_with) / max(now - self._started, 1e-9)
        left = f", {(self._total - self._done) / rate:,.0f} s left" if rate and not final else ""
        text = f"{self._name}: {self._done:,}/{self._total:,} {self._unit}, {_rate(rate)} {self._unit}/s{left}"
        err.print(Text(self._prefix + text), soft_wrap=not err.is_terminal)
        self._printed = now
