"""What a terminal or a log shows of long steps: bars and the live panel of a training, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from sest.cli import console
from sest.errors import visible
from sest.progress import STEPS, duration, reporting
from sest.runs.curves import is_no_measure, judged_by, strongest

if TYPE_CHECKING:
    from sest.cli.panel import TrainingPanel

PLAIN_SECONDS = 10.0  # between lines where no terminal draws a bar


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


class _RateColumn(ProgressColumn):
    """Units a second since the step began."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {task.fields['unit']}/s" if speed else "", style="cyan")


class _DetailColumn(ProgressColumn):
    """What a step says of itself beside its rate."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["detail"](), style="dim")


def _new_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.percentage:.0f}%"),
        _RateColumn(),
        TimeRemainingColumn(compact=True),
        _DetailColumn(),
        console=console.err,
        expand=True,
    )


class ConsoleProgress:
    """A sest.progress.Reporter: Rich bars and a live panel of the training, or plain lines when not on a terminal.

    Args:
        prefix: of every line where several processes share a terminal; then nothing is live.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._about: dict[str, Any] = {}  # of the run that trains
        self._listening = ExitStack()
        self._is_live = console.err.is_terminal and not prefix
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._panel: TrainingPanel | None = None
        self._live: Live | None = None
        self._history: list[dict[str, Any]] = []  # of metrics.jsonl, before this process
        self._said: set[str] = set()  # findings
        self._name, self._unit = "", ""
        self._detail: Callable[[], str] = str
        self._total, self._done, self._began_with = 0, 0, 0
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        self._listening.enter_context(reporting(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._stop()
        self._listening.close()

    def train(self, about: dict[str, Any]) -> None:
        """A training is about to begin; `about`: what `sest.runs.diagnose.diagnose` is to know of its run."""
        self._about = about

    def remember(self, lines: list[dict[str, Any]]) -> None:
        """The lines that a resumed run has written before."""
        self._history = lines

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] | None = None) -> None:
        self._finish()
        self._name, self._unit, self._total, self._done, self._began_with = task, unit, total, done, done
        self._detail = detail or str
        self._started = self._printed = time.monotonic()
        if unit == STEPS:
            from sest.cli.panel import TrainingPanel  # NumPy, which help texts do not need

            ascii_only = not console.err.encoding.startswith("utf")
            self._panel = TrainingPanel(total, about=self._about, ascii_only=ascii_only)
            for line in self._history:
                self._panel.add(line)
            self._said = self._warnings()
            self._panel.begin(done)
            if self._is_live:
                self._stop()
                self._live = Live(get_renderable=self._drawn, console=console.err, refresh_per_second=4)
                self._live.start()
        elif self._is_live:
            if self._bars is None:
                self._bars = _new_bars()
                self._bars.start()
            self._task = self._bars.add_task(visible(task), total=total, completed=done, unit=unit, detail=self._detail)

    def _drawn(self) -> RenderableType:
        """The panel, as large as the terminal is now."""
        return "" if self._panel is None else self._panel.render(console.err.width, console.err.height)

    def advance(self, n: int = 1) -> None:
        self._done += n
        if self._panel is not None:  # a training ends when its last line was shown
            self._panel.step = self._done
            if self._live is None and time.monotonic() - self._printed > PLAIN_SECONDS:
                self._line()
            return
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, n)
        if self._done >= self._total and self._detail is str:  # a detail may change after what is counted
            self._finish()
        elif not self._is_live and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._line()

    def note(self, text: str) -> None:
        console.note(self._prefix + text)

    def command(self, text: str) -> None:
        """A command line that is about to be carried out, below the step that came before it."""
        self.end()
        console.command(text)

    def end(self) -> None:
        """The step that runs has ended: what is printed next stands below it."""
        self._finish()

    def show(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl: into the panel, or in words."""
        if self._panel is None:
            return
        self._panel.add(line)
        self._printed = time.monotonic()
        if self._live is not None:
            return
        if "val_loss" in line:
            metric, beside = judged_by(line), strongest(line)
            value, other = line[metric], line[f"{metric}_{beside}"]
            better = "better than" if value < other else "not yet better than"
            better = "no measure; beside" if is_no_measure(line) else better
            loss = "" if metric == "val_loss" else f"val_loss {line['val_loss']:.4f}, "
            self.note(
                f"step {line['step']:,}: {loss}{metric} {value:.4f} ({better} the {beside.replace('_', ' ')}, "
                f"{other:.4f}), pearson_delta {line['pearson_delta']:.3f}, "
                f"pds {console.figure(line['pds'], 3)}"
            )
            for finding in self._panel.warnings():
                if finding.name not in self._said and line["step"] < self._total:
                    self.note(f"{finding.name}: {finding.evidence} {finding.advice}")
            self._said = self._warnings()
        else:
            skipped = f", {line['skipped_steps']} skipped" if line["skipped_steps"] else ""
            left = duration((self._total - line["step"]) / (self._panel.speed or line["it_per_s"]))
            self.note(
                f"step {line['step']:,}/{self._total:,}: loss {line['loss']:.4f}, grad norm {line['grad_norm']:.3g}, "
                f"{_rate(line['it_per_s'])} it/s, {left} left{skipped}"
            )

    def _warnings(self) -> set[str]:
        return {finding.name for finding in self._panel.warnings()} if self._panel is not None else set()

    def _stop(self) -> None:
        """What is live stays as it is now."""
        if self._bars is not None:
            self._bars.stop()
        if self._live is not None:
            self._live.stop()
        self._bars = self._live = self._task = None

    def _finish(self) -> None:
        """Say how a step ended, once; its bar goes, the panel of a training stays."""
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._live is None:
            self._line(final=True)
        else:
            if self._panel is not None:
                self._panel.read()  # what stays on the screen is up to date
            self._stop()
        self._panel = None
        self._name = ""

    def _line(self, final: bool = False) -> None:
        """One plain line: what, how much of how much, how fast, how long still."""
        if not self._name or (final and self._done == self._began_with and self._total > 0):
            return
        now = time.monotonic()
        rate = (self._done - self._began_with) / max(now - self._started, 1e-9)
        share = f" ({self._done / self._total:.0%})" if self._total and not final else ""
        left = f", {duration((self._total - self._done) / rate)} left" if rate and not final else ""
        detail = f", {text}" if (text := self._detail()) else ""
        text = f"{self._name}: {self._done:,}/{self._total:,} {self._unit}{share}, {_rate(rate)} {self._unit}/s"
        self.note(f"{text}{left}{detail}")
        self._printed = now
