"""What long steps report, to whoever listens: the command line, a notebook, or nobody.

A step calls `begin` and `advance` here; what it wants to say in words goes to `logging`, as in other libraries. Who
listens is ambient: `with reporting(...)` around a call, and no function hands it on.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

HOUR = 3600.0  # s
STEPS = "it"  # the unit of a training
LOGGER = logging.getLogger("sest")  # above those of all rooms


class Reporter(Protocol):
    """Receives the progress and the notes of what runs inside `reporting`."""

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


_NOBODY = Silent()
_reporter: ContextVar[Reporter] = ContextVar("reporter", default=_NOBODY)
_step: ContextVar[str] = ContextVar("step", default="")


def is_listened_to() -> bool:
    """Whether something hears of progress here."""
    return _reporter.get() is not _NOBODY


def begin(task: str, total: int, unit: str, done: int = 0, detail: Callable[[], str] | None = None) -> None:
    """A step starts; see `Reporter.begin`."""
    _step.set(task)
    _reporter.get().begin(task, total, unit, done, detail)


def last_step() -> str:
    """The task of the step that began last, finished or not; "" before there is one."""
    return _step.get()


def advance(n: int = 1) -> None:
    """`n` more units of the step are done."""
    _reporter.get().advance(n)


def duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min", "3 h 05 min" or "56 h"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes < 24 * 60 else f"{round(minutes / 60):,} h"


class _Notes(logging.Handler):
    """Hands what the loggers below "sest" say to one reporter, while it is the present one."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.INFO)
        self._to = reporter

    def emit(self, record: logging.LogRecord) -> None:
        if _reporter.get() is self._to:
            self._to.note(record.getMessage())


class _InfoLevel:
    """The logger "sest" lets notes through while anybody listens, in any thread, and is as before afterwards."""

    def __init__(self) -> None:
        self._lock, self._n, self._before = threading.Lock(), 0, logging.NOTSET

    def __enter__(self) -> None:
        with self._lock:
            if self._n == 0:
                self._before = LOGGER.level
                LOGGER.setLevel(min(LOGGER.getEffectiveLevel(), logging.INFO))
            self._n += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n -= 1
            if self._n == 0:
                LOGGER.setLevel(self._before)


_info_level = _InfoLevel()


@contextmanager
def reporting(reporter: Reporter) -> Iterator[Reporter]:
    """Let `reporter` hear of everything that this thread does within the block."""
    notes = _Notes(reporter)
    LOGGER.addHandler(notes)
    token = _reporter.set(reporter)
    try:
        with _info_level:
            yield reporter
    finally:
        _reporter.reset(token)
        LOGGER.removeHandler(notes)
