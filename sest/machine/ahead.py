"""Do the next pieces of work in a thread while the present one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield `items`, which one thread makes up to `depth` ahead. What it raises is raised here, in its place.

    The thread has a copy of the caller's context, so that what it reports reaches the caller's reporter.
    """
    context = copy_context()

    def make() -> T:
        return next(items, _END)

    with ThreadPoolExecutor(1, "ahead") as thread:
        pending: deque[Future[T]] = deque(thread.submit(context.run, make) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(thread.submit(context.run, make))
                yield item
        finally:
            for future in pending:
                future.cancel()
