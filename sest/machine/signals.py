"""Ctrl-C, SIGTERM and SIGHUP are noted, the work in hand is finished and saved, then the program stops.

So it does before its time is over, where it has a limit: as if SIGALRM had come.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESERVE = 0.01  # of a time limit, that is left


class Interrupted(Exception):
    """The user or the scheduler asked to stop; everything finished so far is saved.

    Args:
        signum: the signal; the exit code is 128 + signum.
        saved: one sentence that says what was saved and how to go on.
    """

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(saved)
        self.signum = signum


class TimeLimit:
    """Whether the time is over, but for what the work in hand and saving take.

    Args:
        seconds: all there is; None: no end.
        began: since when, by time.monotonic().
    """

    def __init__(self, seconds: float | None, began: float) -> None:
        self._end = math.inf if seconds is None else began + (1 - RESERVE) * seconds
        self._longest, self._asked = 0.0, time.monotonic()

    def is_over(self) -> bool:
        """To be asked after every piece of work: one as long as the longest, and saving as long, must still fit."""
        now = time.monotonic()
        self._longest, self._asked = max(self._longest, now - self._asked), now
        return now + 2 * self._longest > self._end


@dataclass
class StopRequest:
    """Whether somebody asked to stop, or the time is over."""

    saved: str  # for `Interrupted`
    signum: int = 0  # the signal, once there was one
    limit: TimeLimit | None = None

    def asked(self) -> int:
        """The signal, SIGALRM where the time is over, 0 for none; to be asked after every piece of work."""
        if not self.signum and self.limit is not None and self.limit.is_over():
            self.signum = signal.SIGALRM
        return self.signum

    def check(self) -> None:
        """Raise Interrupted if there is a reason to stop; to be called when all that is finished is saved."""
        if self.asked():
            raise Interrupted(self.signum, self.saved)


@contextmanager
def stop_requests(saved: str = "", limit: TimeLimit | None = None) -> Iterator[StopRequest]:
    """Note a signal in what is yielded. A second signal stops at once.

    Args:
        saved: one sentence for those who stop with `check`.
        limit: of the time.
    """
    stop = StopRequest(saved, limit=limit)
    terminals = [stream for stream in (1, 2) if _is_terminal(stream)]

    def note(signum: int, frame: FrameType | None) -> None:
        if stop.signum:
            raise KeyboardInterrupt
        stop.signum = signum
        if signum == signal.SIGHUP:
            _leave(terminals)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    signals = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores it
    before = {s: signal.signal(s, note) for s in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _is_terminal(stream: int) -> bool:
    try:
        return os.isatty(stream)
    except OSError:  # closed
        return False


def _leave(terminals: list[int]) -> None:
    """What is written to a terminal that is gone goes nowhere, instead of being an error before all is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in terminals:
        os.dup2(nowhere, stream)
    os.close(nowhere)
