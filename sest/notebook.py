"""Progress in a notebook: one line that is drawn again, with the notes of the step below it."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sest.progress import is_listened_to, reporting

SECONDS = 0.5  # between drawings
MOST_NOTES = 20  # shown below a step; the newest stay


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


@contextmanager
def shown_in_notebooks() -> Iterator[None]:
    """Show the progress of the block in a notebook's cell; elsewhere, or where something listens already, nothing."""
    if is_listened_to() or not in_notebook():
        yield
        return
    cell = NotebookReporter()
    with reporting(cell):
        try:
            yield
        finally:
            cell.draw()


class NotebookReporter:
    """A `sest.progress.Reporter` that draws into the output of the present cell."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._task, self._total, self._unit, self._done, self._before = "", 0, "", 0, 0
        self._detail: Callable[[], str] = str
        self._notes: list[str] = []
        self._began = self._drawn = 0.0

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] | None = None) -> None:
        self._task, self._total, self._unit, self._done, self._before = task, total, unit, done, done
        self._detail, self._began = detail or str, time.monotonic()
        self.draw()

    def advance(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._drawn > SECONDS or self._done >= self._total:
            self.draw()

    def note(self, text: str) -> None:
        self._notes = [*self._notes, text][-MOST_NOTES:]
        self.draw()

    def draw(self) -> None:
        """Draw what is known now."""
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        page = HTML(self._html())
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def _html(self) -> str:
        lines = [f"<small>{html.escape(note)}</small><br>" for note in self._notes]
        if self._task:
            rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
            words = f"{self._task}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.3g} {self._unit}/s"
            words = f"{words} {self._detail()}".strip()
            bar = f'<progress value="{self._done}" max="{max(self._total, 1)}"></progress>'
            lines.append(f"{bar} {html.escape(words)}")
        return "<div>" + "".join(lines) + "</div>"
