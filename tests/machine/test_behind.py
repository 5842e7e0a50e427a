"""Work beside the loop: in order, bounded, and its errors are not lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from sest.machine.behind import MOST, Behind


def writes(done: list[int], number: int, after: threading.Event | None = None) -> Callable[[], None]:
    """Work that is done once `after` is set."""

    def work() -> None:
        if after is not None:
            after.wait(10)
        done.append(number)

    return work


def test_work_is_done_in_order_while_the_caller_goes_on() -> None:
    done, go = list[int](), threading.Event()
    with closing(Behind()) as behind:
        behind.do(writes(done, 0, go))
        behind.do(writes(done, 1))
        behind.check()
        assert done == []
        go.set()
        behind.wait()
        assert done == [0, 1]


def test_more_than_it_holds_waits_for_the_first() -> None:
    done, go = list[int](), threading.Event()
    with closing(Behind()) as behind:
        behind.do(writes(done, 0))
        for number in range(1, MOST):
            behind.do(writes(done, number, go))
        behind.do(lambda: None)
        assert done[0] == 0
        go.set()
        behind.wait()
        assert done == list(range(MOST))


@pytest.mark.parametrize("method", ["do", "wait", "check"])
def test_an_error_is_raised_by_the_next_call(method: str) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    def calls(behind: Behind) -> None:
        for _ in range(1000):  # until it is known
            behind.do(lambda: None) if method == "do" else getattr(behind, method)()
            time.sleep(0.001)

    with closing(Behind()) as behind:
        behind.do(fail)
        with pytest.raises(OSError, match="No space left"):
            calls(behind)


def test_nothing_is_done_after_an_error() -> None:
    done, go = list[int](), threading.Event()

    def fail() -> None:
        go.wait(10)
        raise OSError(28, "No space left on device")

    behind = Behind()
    behind.do(fail)
    behind.do(writes(done, 1))
    go.set()
    behind.close()
    assert done == []
    with pytest.raises(OSError, match="No space left"):
        behind.check()


def test_closing_leaves_nothing_undone() -> None:
    done, go = list[int](), threading.Event()
    behind = Behind()
    behind.do(writes(done, 0, go))
    behind.do(writes(done, 1))
    closer = threading.Thread(target=behind.close)
    closer.start()
    go.set()
    closer.join(10)
    assert done == [0, 1] and not closer.is_alive()
