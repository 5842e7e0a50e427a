"""The live panel of `sest train`: at most 80 columns and 12 rows, redrawn from the lines of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sest.progress import duration
from sest.runs.curves import HIGHER_IS_BETTER, WITH_CELLS, curves_of, is_no_measure, judged_by, strongest
from sest.runs.diagnose import GOOD, WARNING, Finding, diagnose

WIDTH, SPARKS = 80, 24
READING_SHARE = 50  # of the time, one part in so many goes into reading the curves
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-=+*#@"


def sparkline(values: Iterable[float], width: int = SPARKS, bars: str = BARS) -> str:
    """The last `width` of the values, or means of neighbours where there are more, from lowest to highest bar."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    n = min(width, len(known))
    edges = [i * len(known) // n for i in range(n + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    steps = (high - low) / (len(bars) - 1) or 1.0
    return "".join(bars[round((value - low) / steps)] for value in means)


class TrainingPanel:
    """What a run has come to; `render` draws it.

    Args:
        total: steps in all.
        patience: of early stopping; None: there is none.
        width: columns of the terminal.
        ascii_only: the terminal shows no block characters.
    """

    def __init__(
        self, total: int, *, patience: int | None = None, width: int = WIDTH, ascii_only: bool = False
    ) -> None:
        self._width = min(width, WIDTH)
        self.total, self.step = total, 0
        self._patience, self._bars = patience, ASCII_BARS if ascii_only else BARS
        self._lines: list[dict[str, Any]] = []
        self._curves = curves_of([])
        self._log: dict[str, Any] = {}  # the last line of each kind
        self._validation: dict[str, Any] = {}
        self._findings: list[Finding] = []
        self._read_again = 0.0  # when

    def add(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._lines.append(line)
        if "val_loss" in line:
            self._validation = line
        else:
            self._log = line
        self.step = max(self.step, int(line["step"]))

    def warnings(self) -> list[Finding]:
        """What is wrong by all lines so far."""
        self.read()
        return [finding for finding in self._findings if finding.level == WARNING]

    def read(self) -> None:
        """Read the curves; the time it takes grows with the lines, and training waits meanwhile."""
        began = time.monotonic()
        self._curves = curves_of(self._lines)
        self._findings = diagnose(self._curves, max_steps=self.total, patience=self._patience)
        now = time.monotonic()
        self._read_again = now + READING_SHARE * (now - began)

    def render(self) -> Panel:
        """The panel, 10 rows high."""
        if time.monotonic() >= self._read_again:
            self.read()
        curves, log, validation = self._curves, self._log, self._validation
        speed = log.get("it_per_s")
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right")
        head.add_row(
            f"step {self.step:,}/{self.total:,}",
            ProgressBar(total=self.total, completed=self.step),
            f"{self.step / self.total:.0%}" + (f", {duration((self.total - self.step) / speed)} left" if speed else ""),
        )
        rows = [
            _row("speed", _speed(log)),
            _row("loss", _number(log.get("loss")), sparkline(curves.log.get("loss", ()), bars=self._bars)),
            _row(
                "val_loss",
                _number(validation.get("val_loss")),
                sparkline(curves.validation.get("val_loss", ()), bars=self._bars) + self._best(curves.validation),
            ),
            self._baselines(validation),
            _metrics(validation),
            _row("optimizer", _optimizer(log)),
        ]
        worst = next((finding for finding in self._findings if finding.level != GOOD), None)
        text = f"{worst.name}: {worst.evidence}" if worst else "nothing unusual" if validation else ""
        rows.append(_row("seems", text))
        for row in rows:
            row.truncate(self._width - 4, overflow="ellipsis")
            row.no_wrap = True
        return Panel(
            Group(head, *rows), title="Training", title_align="left", width=self._width, height=10, padding=(0, 1)
        )

    def _best(self, validation: Any) -> str:
        losses = validation.get("val_loss")
        if losses is None or not len(losses):
            return ""
        best = int(losses.argmin())
        return f"  best {losses[best]:.4f}, step {validation['step'][best]:,.0f}"

    def _baselines(self, validation: dict[str, Any]) -> Text:
        metric = judged_by(validation)
        known = {name: validation.get(f"{metric}_{name}") for name in WITH_CELLS}
        figures = {name.replace("_", " "): value for name, value in known.items() if value is not None}
        value = validation.get(metric)
        if value is None or not figures:
            return _row("baselines", "")
        beaten = value < min(figures.values())
        text = ", ".join(f"{name} {other:.4f}" for name, other in figures.items())
        if metric != "val_loss":  # which is in the row above; here there is room for the best of them and the controls
            shown = dict.fromkeys((min(figures, key=figures.__getitem__), "controls"))
            text = f"energy {value:.3g}; " + ", ".join(
                f"{name} {figures[name]:.3g}" for name in shown if name in figures
            )
        if is_no_measure(validation):
            return _row("baselines", "no measure", text)
        row = _row("baselines", "beaten" if beaten else "not beaten", text)
        row.stylize("green" if beaten else "yellow", 10, 20)
        return row


def _row(name: str, *parts: str) -> Text:
    return Text.assemble((f"{name:<10}", "dim"), "  ".join(part for part in parts if part))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def _speed(log: dict[str, Any]) -> str:
    speed, limit = log.get("it_per_s"), log.get("limit_it_per_s")
    if not speed:
        return ""
    text = f"{speed:,.0f} it/s" if speed >= 100 else f"{speed:.3g} it/s"
    if limit:
        text += f", {speed / limit:.0%} of the limit ({log['limited_by']})"
    return text + f", {log['data_wait']:.1%} waiting for data"


def _optimizer(log: dict[str, Any]) -> str:
    if not log:
        return ""
    return (
        f"lr {log['lr']:.2g}, gradient norm {_number(log['grad_norm'])}, {log['skipped_steps']:,} skipped, "
        f"memory {log['memory_bytes'] / 1e9:.1f} GB"
    )


def _metrics(validation: dict[str, Any]) -> Text:
    """The other metrics, each beside the strongest baseline's."""
    parts, beside = [], strongest(validation)
    for name in ("pearson_delta", "mae", "pds"):
        value, other = validation.get(name), validation.get(f"{name}_{beside}")
        if name not in validation:
            continue
        if value is None or not math.isfinite(value):
            parts.append(f"{name} -")
            continue
        sign = "" if other is None else (">" if value > other else "<" if value < other else "=") + f" {other:.3f}"
        parts.append(f"{name} {value:.3f} {sign}".strip())
    row = _row("metrics", *parts)
    better = [
        name
        for name in ("pearson_delta", "mae", "pds")
        if None not in (validation.get(name), validation.get(f"{name}_{beside}"))
        and math.isfinite(validation[name])
        and (validation[name] > validation[f"{name}_{beside}"]) == (name in HIGHER_IS_BETTER)
    ]
    for name in [] if is_no_measure(validation) else better:
        row.highlight_words([name], "green")
    return row
