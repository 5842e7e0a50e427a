"""Progress and notes reach whoever listens, and nobody else."""

from __future__ import annotations

import logging
import math
import threading

import pytest

from helpers.notes import Notes
from sest import progress
from sest.progress import duration, reporting

logger = logging.getLogger("sest.some.room")


class Counter(Notes):
    """Also counts the units that are done."""

    n_done = 0

    def advance(self, n: int = 1) -> None:
        self.n_done += n


def work() -> None:
    progress.begin("Working", 3, "cells", 1)
    progress.advance()
    progress.advance(2)
    logger.info("Done.")
    logger.debug("Not worth a note.")
    logging.getLogger("another.library").info("Not ours.")


def test_the_reporter_of_the_block_hears_every_step_and_note() -> None:
    with reporting(Counter()) as reporter:
        work()
    assert isinstance(reporter, Counter)
    assert (reporter.steps, reporter.n_done, reporter.notes) == ([("Working", 3, 1)], 3, ["Done."])
    work()
    assert (reporter.steps, reporter.n_done, reporter.notes) == ([("Working", 3, 1)], 3, ["Done."])  # it is over


def test_only_the_innermost_reporter_hears() -> None:
    outer, inner = Counter(), Counter()
    with reporting(outer):
        with reporting(inner):
            work()
        assert (outer.n_done, inner.n_done, outer.notes, inner.notes) == (0, 3, [], ["Done."])
        work()
    assert (outer.n_done, inner.n_done, outer.notes, inner.notes) == (3, 3, ["Done."], ["Done."])


def test_a_reporter_hears_nothing_of_another_threads_work() -> None:
    mine, others = Counter(), Counter()

    def other() -> None:
        with reporting(others):
            work()

    with reporting(mine):
        for target in (work, other):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert (mine.n_done, mine.notes) == (0, []) and (others.n_done, others.notes) == (3, ["Done."])


def test_a_block_that_fails_stops_listening() -> None:
    reporter = Counter()
    with pytest.raises(KeyError), reporting(reporter):
        raise KeyError
    work()
    assert reporter.notes == [] and reporter.n_done == 0
    assert not [handler for handler in logging.getLogger("sest").handlers if isinstance(handler, progress._Notes)]


def test_without_a_reporter_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_the_logger_lets_notes_through_only_while_somebody_listens(caplog: pytest.LogCaptureFixture) -> None:
    """A program that logs warnings only is not told more after a notebook's cell has shown its progress."""
    library = logging.getLogger("sest")
    for level in (logging.NOTSET, logging.ERROR, logging.DEBUG):
        library.setLevel(level)
        with reporting(Notes()) as outer:
            logger.info("One.")
            with reporting(Notes()) as inner:
                logger.info("Two.")
            logger.info("Three.")
        assert library.level == level
        assert isinstance(outer, Notes) and isinstance(inner, Notes)
        assert (outer.notes, inner.notes) == (["One.", "Three."], ["Two."])
    library.setLevel(logging.NOTSET)
    caplog.clear()
    logger.info("Nobody hears this.")
    assert caplog.records == []


def test_the_last_step_that_began_is_remembered() -> None:
    progress.begin("Reading", 1, "cells")
    progress.advance()
    assert progress.last_step() == "Reading"


def test_durations_are_in_the_unit_a_person_would_use() -> None:
    seconds = [0.4, 59.4, 60, 3540, 3600, 11_100, 204_000, math.inf]
    said = ["0 s", "59 s", "1 min", "59 min", "1 h 00 min", "3 h 05 min", "57 h", "?"]
    assert [duration(s) for s in seconds] == said
