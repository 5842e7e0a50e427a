"""The live panel of `sest train`: as large as the terminal, redrawn from the lines of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import pairwise
from statistics import harmonic_mean
from textwrap import wrap
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sest.config import TrainConfig
from sest.progress import duration
from sest.runs.curves import HIGHER_IS_BETTER, SteadySpeed, curves_of, is_no_measure, judged, steady_speed, strongest
from sest.runs.diagnose import GOOD, WARNING, Finding, diagnose

WIDTH, HEIGHT = 80, 24  # of a terminal that does not say
NARROWEST, WIDEST, LEAST_ROWS = 40, 200, 9
NAME, SPARKS = 10, 24  # columns of a row's name, and of a curve within a row at the usual width
FEW_POINTS = 5  # of a curve, of which no chart is drawn
LEAST_CHART, HIGHEST_CHART, SIDE_BY_SIDE = 5, 14, 100  # rows of a chart; columns from which two stand in one line
WIDE_RANGE = 4  # times the lowest value of a chart, from which it shows logarithms
AVERAGED = 10  # log lines whose speed is taken together: single ones, of few steps, are uneven
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
    """What a run has come to; `render` draws it as large as the terminal is.

    Args:
        total: steps in all.
        about: what `sest.runs.diagnose.diagnose` is to know of the run.
        ascii_only: the terminal shows no block characters.
    """

    def __init__(self, total: int, *, about: Mapping[str, Any] | None = None, ascii_only: bool = False) -> None:
        self.total, self.step = total, 0
        self._about = {"max_steps": total, **(about or {})}
        self._monitor = self._about.get("config", TrainConfig()).monitor
        self._bars = ASCII_BARS if ascii_only else BARS
        self._lines: list[dict[str, Any]] = []
        self._curves = curves_of([])
        self._log: dict[str, Any] = {}  # the last line of each kind
        self._validation: dict[str, Any] = {}
        self._findings: list[Finding] = []
        self._read_again = 0.0  # when
        self._began: tuple[float, int] | None = None  # when, after how many steps

    def begin(self, step: int) -> None:
        """Steps are taken from now on, `step` of them were before."""
        self.step, self._began = step, (time.monotonic(), step)

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
        self._findings = diagnose(self._curves, **self._about)
        now = time.monotonic()
        self._read_again = now + READING_SHARE * (now - began)

    @property
    def speed(self) -> float | None:
        """Steps a second over the last log lines, or before the first one of this process all since it began."""
        if self._began is None or (self._log and self._log["step"] > self._began[1]):
            first = 0 if self._began is None else self._began[1]
            lines = [line for line in self._lines[-2 * AVERAGED :] if "it_per_s" in line and line["step"] > first]
            return harmonic_mean([line["it_per_s"] for line in lines[-AVERAGED:]]) if lines else None
        (when, first), now = self._began, time.monotonic()
        return (self.step - first) / (now - when) if self.step > first and now > when else None

    def render(self, width: int = WIDTH, height: int = HEIGHT) -> Panel:
        """The panel for a terminal of so many columns and rows, of which it leaves one for the cursor.

        The first lines are what a run is watched for; what is left of the terminal shows the curves.
        """
        if time.monotonic() >= self._read_again:
            self.read()
        width = max(min(width, WIDEST), NARROWEST)
        room, inner = max(height - 3, LEAST_ROWS), width - 4
        rows: list[RenderableType] = []
        for row in self._rows(inner):
            rows += row.wrapped(inner, room - len(rows) - 1)
        free = room - 1 - len(rows)
        if free >= LEAST_CHART + 1:
            rows += self._charts(inner, min(free, HIGHEST_CHART))
        rows = rows[: room - 1]
        return Panel(
            Group(self._head(inner), *rows), title="Training", title_align="left", width=width,
            height=len(rows) + 3, padding=(0, 1),
        )  # fmt: skip

    def _head(self, width: int) -> Table:
        """Steps, a bar, and the time left."""
        left = f", {duration((self.total - self.step) / self.speed)} left" if self.speed else ""
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        bar = ProgressBar(total=self.total, completed=self.step)
        head.add_row(f"step {self.step:,}/{self.total:,}", bar, f"{self.step / self.total:.0%}{left}")
        return head

    def _rows(self, width: int) -> list[_Row]:
        curves, log, validation = self._curves, self._log, self._validation
        sparks = max(width - NAME - 46, 12)
        if width >= WIDTH - 4:
            sparks = max(sparks, SPARKS)
        spark = partial(sparkline, width=sparks, bars=self._bars)
        worst = next((finding for finding in self._findings if finding.level != GOOD), None)
        text = [worst.name + ":", *worst.evidence.split()] if worst else ["nothing", "unusual"] if validation else []
        return [
            _Row("speed", _speed(log, self.speed, steady_speed(curves.log)), ", "),
            _Row("loss", [_number(log.get("loss")), spark(curves.log.get("loss", ()))]),
            _Row(
                "val_loss",
                [
                    _number(validation.get("val_loss")),
                    spark(curves.validation.get("val_loss", ())),
                    self._best(curves.validation),
                ],
            ),
            self._baselines(),
            _metrics(validation),
            _Row("optimizer", _optimizer(log), ", "),
            _Row("seems", text, " ", most=4),
            _Row("", worst.advice.split() if worst else [], " ", most=3),
        ]

    def _best(self, validation: Any) -> str:
        losses = validation.get("val_loss")
        if losses is None or not len(losses):
            return ""
        best = int(losses.argmin())
        return f"best {losses[best]:.4f}, step {validation['step'][best]:,.0f}"

    def _baselines(self) -> _Row:
        """How the best validation stands beside predictions without a network: the verdict of `diagnose`."""
        found = judged(self._curves.validation, self._monitor)
        if found is None or not found.baselines:
            return _Row("baselines", [])
        ranked = sorted(found.baselines.items(), key=lambda item: item[1])
        others = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in ranked]
        parts = [f"{found.metric.replace('_distance', '')} {found.smoothed:.4g}", *others]
        if is_no_measure(self._validation):
            return _Row("baselines", ["no measure", *parts])
        said, style = ("level", "") if found.is_level else ("not beaten", "yellow")
        if not found.is_level and found.smoothed < found.baselines[found.best]:
            said, style = "beaten", "green"
        return _Row("baselines", [said, *parts], styles={said: style})

    def _charts(self, width: int, height: int) -> list[RenderableType]:
        """The curves of the training and the validation loss, beside each other where there is room."""
        curves = [
            ("loss", self._curves.log, "loss"),
            ("val_loss", self._curves.validation, "val_loss"),
        ]
        known = [(name, columns["step"], columns[key]) for name, columns, key in curves if key in columns]
        known = [(name, steps, values) for name, steps, values in known if len(values) >= FEW_POINTS]
        if not known:
            return []
        if width >= SIDE_BY_SIDE and len(known) == 2:
            half = (width - 2) // 2
            left, right = (chart(*one, width=half, height=height, bars=self._bars) for one in known)
            return [Text(f"{a:<{half}}  {b}", no_wrap=True) for a, b in zip(left, right, strict=True)]
        each = height // len(known)
        if each < LEAST_CHART:
            known, each = known[-1:], height
        return [
            Text(line, no_wrap=True) for one in known for line in chart(*one, width=width, height=each, bars=self._bars)
        ]


def chart(name: str, steps: Any, values: Any, *, width: int, height: int, bars: str = BARS) -> list[str]:
    """A curve as `height` lines of at most `width` characters: its name and range above, its steps below.

    Of one that falls to a small part of where it began, the logarithm: else all but its beginning is one flat line.
    """
    n = height - 2
    pairs = [(int(step), float(v)) for step, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if not pairs:
        return [name, *[""] * (height - 1)]
    columns = min(width, len(pairs))
    edges = [i * len(pairs) // columns for i in range(columns + 1)]
    means = [sum(v for _, v in pairs[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    stretch = -(-width // columns) if columns < width // 2 else 1
    stretch = max(min(stretch, width // columns), 1)
    of, note = (math.log, ", log scale") if 0 < WIDE_RANGE * low < high else (float, "")
    scale = (n * len(bars) - 1) / (of(high) - of(low)) if high > low else 0.0
    heights = [round((of(value) - of(low)) * scale) + 1 for value in means]
    lines = []
    for row in reversed(range(n)):
        levels = (min(max(level - row * len(bars), 0), len(bars)) for level in heights)
        lines.append("".join((bars[level - 1] if level else " ") * stretch for level in levels).rstrip())
    first, last = f"step {pairs[0][0]:,}", f"{pairs[-1][0]:,}"
    drawn = columns * stretch
    below = f"{first}{last:>{max(drawn - len(first), len(last) + 1)}}"
    return [f"{name} {_number(low)} to {_number(high)}{note}"[:width], *lines, below[:width]]


class _Row:
    """A name and parts of a sentence, which are broken over lines between parts.

    Args:
        join: between parts of a line.
        most: lines it may take.
        styles: of parts.
    """

    def __init__(
        self, name: str, parts: list[str], join: str = "  ", *, most: int = 3, styles: dict[str, str] | None = None
    ) -> None:
        self.name, self.parts, self._join, self._most = name, [part for part in parts if part], join, most
        self._styles = styles or {}

    def _fitting(self, widest: int) -> list[str]:
        """Its parts; one that no line has room for, in pieces of whole words."""
        fitting = list[str]()
        for part in self.parts:
            pieces = wrap(part, max(widest, 1), break_on_hyphens=False) if len(part) > widest else [part]
            self._styles |= {piece: self._styles[part] for piece in pieces if part in self._styles}
            fitting += pieces
        return fitting

    def wrapped(self, width: int, room: int) -> list[Text]:
        """Its lines, `room` of them at most; one that is empty keeps its name."""
        lines, line = list[list[str]](), list[str]()
        widest = width - NAME - len(self._join.strip())
        for part in self._fitting(widest):
            if line and len(self._join.join([*line, part])) > widest:
                lines.append(line)
                line = []
            line.append(part)
        lines = [*lines, line] if line or self.name else lines
        texts = []
        for i, parts in enumerate(lines[: max(min(self._most, room), 0)]):
            cut = "..." if i + 1 == min(self._most, room) < len(lines) else ""
            tail = self._join.strip() if i + 1 < len(lines) and not cut else ""
            text = Text.assemble((f"{self.name if i == 0 else '':<{NAME}}", "dim"), no_wrap=True)
            for k, part in enumerate(parts):
                text.append(self._join if k else "").append(part, self._styles.get(part, ""))
            text.append(tail + cut)
            text.truncate(width, overflow="ellipsis")
            texts.append(text)
        return texts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def _speed(log: dict[str, Any], speed: float | None, steady: SteadySpeed | None) -> list[str]:
    if not speed:
        return []
    parts = [f"{speed:,.0f} it/s" if speed >= 100 else f"{speed:.3g} it/s"]
    if steady is not None and math.isfinite(steady.share):
        parts.append(f"{steady.share:.0%} of the limit ({log['limited_by']})")
    return [*parts, f"{log['data_wait']:.1%} waiting for data"] if log else parts


def _optimizer(log: dict[str, Any]) -> list[str]:
    if not log:
        return []
    return [
        f"lr {log['lr']:.2g}",
        f"gradient norm {_number(log['grad_norm'])}",
        f"{log['skipped_steps']:,} skipped",
        f"memory {log['memory_bytes'] / 1e9:.1f} GB",
    ]


def _metrics(validation: dict[str, Any]) -> _Row:
    """The other metrics, each beside the strongest baseline's; those that are better are green."""
    parts, styles, beside = list[str](), dict[str, str](), strongest(validation)
    for name in ("pearson_delta", "mae", "pds"):
        value, other = validation.get(name), validation.get(f"{name}_{beside}")
        if name not in validation:
            continue
        if value is None or not math.isfinite(value):
            parts.append(f"{name} -")
            continue
        sign = "" if other is None else (">" if value > other else "<" if value < other else "=") + f" {other:.3f}"
        parts.append(f"{name} {value:.3f} {sign}".strip())
        better = other is not None and (value > other) == (name in HIGHER_IS_BETTER)
        if better and not is_no_measure(validation):
            styles[parts[-1]] = "green"
    return _Row("metrics", parts, styles=styles)
