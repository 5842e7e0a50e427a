"""Finish work in a thread while the next steps are taken, such as writing what was just copied to a disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context

MOST = 2  # pieces of work at one time: each holds what it works on in memory


class Behind:
    """Work that one thread does in the order it was given; what it raises is raised by the next call of a method.

    After an error nothing more is done: later work may rest on what failed.
    """

    def __init__(self) -> None:
        self._thread, self._failed = ThreadPoolExecutor(1, "behind"), False
        self._pending: deque[Future[None]] = deque()

    def do(self, work: Callable[[], None]) -> None:
        """Do this once all before it is done; waits where MOST pieces are not."""
        while len(self._pending) >= MOST:
            self._pending.popleft().result()
        self.check()
        self._pending.append(self._thread.submit(copy_context().run, self._try, work))

    def _try(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        self._failed = True
        work()
        self._failed = False

    def check(self) -> None:
        """Raise what was raised so far; waits for nothing."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def wait(self) -> None:
        """Return when all is done."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Return when all is done, and end the thread; errors are left."""
        self._thread.shutdown()
