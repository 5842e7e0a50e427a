"""What long steps report. The command line draws it; the library only calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

STEPS = "it"  # the unit of a training


class Progress(Protocol):
    """Receives the progress of one command."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] | None = None) -> None:
        """A step starts: `total` units, of which `done` were there already; `detail` says more whenever it is drawn."""

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""

    def note(self, text: str) -> None:
        """One sentence the user should read."""


class Silent:
    """Reports nothing."""

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] | None = None) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass
