"""Ctrl-C and SIGTERM are noted, the work in hand is finished and saved, then the program stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The user or the scheduler asked to stop; everything finished so far is saved.

    Args:
        signum: SIGINT or SIGTERM; the exit code is 128 + signum.
        saved: one sentence that says what was saved and how to go on.
    """

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(saved)
        self.signum = signum


@dataclass
class StopRequest:
    """Whether somebody asked to stop."""

    saved: str  # for `Interrupted`
    signum: int = 0  # the signal, once there was one

    def check(self) -> None:
        """Raise Interrupted if somebody did; to be called when all that is finished is saved."""
        if self.signum:
            raise Interrupted(self.signum, self.saved)


@contextmanager
def stop_requests(saved: str = "") -> Iterator[StopRequest]:
    """Note a signal in what is yielded. A second signal stops at once.

    Args:
        saved: one sentence for those who stop with `check`.
    """
    stop = StopRequest(saved)

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum:
            raise KeyboardInterrupt
        stop.signum = signum

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
