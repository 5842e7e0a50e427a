"""Ctrl-C and SIGTERM are noted, the work in hand is finished and saved, then the program stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the signal received so far, or 0. A second signal stops at once."""
    received = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = signum

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread gets signals
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
