"""machine/ahead.py: items in order, so many ahead, errors in their place, and an end when nobody wants more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from helpers.notes import Notes
from sest import progress
from sest.machine.ahead import ahead
from sest.progress import reporting


class Advances(Notes):
    """Notes how far a step came, too."""

    def __init__(self) -> None:
        super().__init__()
        self.advanced = 0

    def advance(self, n: int = 1) -> None:
        self.advanced += n


def wait_for_length(items: list[int], length: int) -> None:
    """Until a list that another thread fills is so long; ten seconds at most."""
    end = time.monotonic() + 10
    while len(items) < length and time.monotonic() < end:
        time.sleep(0.002)


def test_items_come_in_order_and_one_thread_makes_them() -> None:
    threads = set[str]()

    def items() -> Iterator[int]:
        for i in range(50):
            threads.add(threading.current_thread().name)
            yield i

    for depth in (1, 3, 100):
        assert list(ahead(items(), depth)) == list(range(50))
    assert threads and all(name.startswith("ahead") for name in threads)
    assert list(ahead(iter(()), 2)) == []


def test_no_more_than_depth_items_are_made_before_they_are_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    with closing(ahead(items(), 3)) as numbers:
        for i in range(5):
            assert next(numbers) == i  # in use; three more are made meanwhile
            wait_for_length(made, i + 4)
            assert made == list(range(i + 4))
        time.sleep(0.02)
        assert made == list(range(8))


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ZeroDivisionError

    numbers = ahead(items(), 5)  # made long before it is asked for
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(numbers)


def test_closing_stops_the_thread_and_makes_nothing_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    before = threading.active_count()
    with closing(ahead(items(), 2)) as numbers:
        assert next(numbers) == 0 and threading.active_count() == before + 1
    assert threading.active_count() == before and len(made) <= 4


def test_what_the_thread_reports_reaches_the_callers_reporter() -> None:
    def items() -> Iterator[int]:
        for i in range(3):
            progress.advance(2)
            logging.getLogger("sest.test").info(f"item {i}")
            yield i

    reporter = Advances()
    with reporting(reporter):
        assert list(ahead(items(), 1)) == [0, 1, 2]
    assert reporter.notes == ["item 0", "item 1", "item 2"] and reporter.advanced == 6
