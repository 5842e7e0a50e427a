"""embedding/rows.py: rows in their places, finished ones kept, and nothing encoded twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sest.embedding.rows
from helpers.caches import ATTRIBUTES
from helpers.notes import Notes
from sest.cache import CacheWriter
from sest.embedding.rows import Piece, RowEncoder
from sest.errors import InputError
from sest.machine.signals import Interrupted, StopRequest
from sest.progress import reporting


class Numbered:
    """An encoder whose rows are (row number, 10 x row number, 1); notes the batches it computes, and what happens."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.events: list[str] = []

    def stage(self, cells: Any, block: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        assert (block == numbers).all()
        return numbers

    def start(self, cells: Any, staged: np.ndarray) -> Callable[[], np.ndarray]:
        self.events.append(f"begun {staged[0]}")
        return partial(self.compute, staged)

    def compute(self, staged: np.ndarray) -> np.ndarray:
        self.events.append(f"asked for {staged[0]}")
        self.batches.append(staged.tolist())
        return np.stack([staged, 10 * staged, np.ones_like(staged)], axis=1).astype(np.float32)


class Advances(Notes):
    """Notes how far the step came."""

    def __init__(self) -> None:
        super().__init__()
        self.advanced: list[int] = []

    def advance(self, n: int = 1) -> None:
        self.advanced.append(n)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CacheWriter]:
    with CacheWriter(tmp_path / "cache.zarr", ATTRIBUTES) as writer:
        yield writer


def rows_of(writer: CacheWriter, encoder: Any, stop: StopRequest | None = None, size: int = 3) -> RowEncoder:
    """Keeps the first two columns."""
    return RowEncoder(writer, encoder, size, lambda x: x[:, :2], 2, stop or StopRequest("Saved."))


def piece(name: str, *numbers: int) -> Piece:
    cells: Any = SimpleNamespace(read=lambda rows: rows, file=SimpleNamespace(path=Path("a.h5ad")))
    return Piece(name, cells, np.array(numbers))


def expected(*numbers: int) -> np.ndarray:
    return np.array([[number, 10 * number] for number in numbers], np.float32).reshape(-1, 2)


def test_every_piece_comes_in_order_with_a_row_for_each_cell(writer: CacheWriter) -> None:
    encoder, reporter = Numbered(), Advances()
    pieces = [piece("a/0", 0, 1, 2, 5, 6, 7, 9), piece("a/1"), piece("b/0", 4, 8)]
    with reporting(reporter):
        found = list(rows_of(writer, encoder).encode(pieces))
    assert [done.spool for done, _ in found] == ["a/0", "a/1", "b/0"]
    np.testing.assert_equal([rows for _, rows in found], [expected(0, 1, 2, 5, 6, 7, 9), expected(), expected(4, 8)])
    assert all(rows.dtype == np.float32 for _, rows in found)
    assert encoder.batches == [[0, 1, 2], [5, 6, 7], [9], [4, 8]]  # none holds cells of two pieces
    assert reporter.advanced == [0, 3, 3, 1, 2]


def test_a_batch_has_begun_before_the_numbers_of_the_one_before_are_asked_for_across_pieces_too(
    writer: CacheWriter,
) -> None:
    encoder = Numbered()
    list(rows_of(writer, encoder).encode([piece("a/0", 0, 1, 2, 3), piece("a/1", 7)]))
    assert encoder.events == ["begun 0", "begun 3", "asked for 0", "begun 7", "asked for 3", "asked for 7"]


def test_cells_are_read_in_blocks_of_whole_batches(writer: CacheWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.embedding.rows, "ROWS_PER_READ", 8)
    read: list[int] = []

    def noted(rows: np.ndarray) -> np.ndarray:
        read.append(len(rows))
        return rows

    cells: Any = SimpleNamespace(read=noted)
    for size, blocks, batches in ((3, [6, 6, 3], [3] * 5), (20, [15], [15])):
        read.clear()
        encoder = Numbered()
        list(rows_of(writer, encoder, size=size).encode([Piece(f"a/{size}", cells, np.arange(15))]))
        assert read == blocks and list(map(len, encoder.batches)) == batches


def test_rows_that_were_kept_are_not_encoded_again(writer: CacheWriter) -> None:
    encoder, reporter = Numbered(), Advances()
    writer.spool_rows("a/0", 0, expected(0, 1))
    writer.spool_rows("a/0", 2, expected(2, 5))
    writer.spool_rows("b/0", 0, expected(4, 8))
    with reporting(reporter):
        found = list(rows_of(writer, encoder).encode([piece("a/0", 0, 1, 2, 5, 6, 7, 9, 11), piece("b/0", 4, 8)]))
    np.testing.assert_equal([rows for _, rows in found], [expected(0, 1, 2, 5, 6, 7, 9, 11), expected(4, 8)])
    assert encoder.batches == [[6, 7, 9], [11]]
    assert reporter.advanced == [6, 3, 1]


@pytest.mark.parametrize(
    ("blocks", "n_used"),
    [
        ({0: 2, 2: 1}, 3),
        ({1: 2}, 0),  # the first row is missing
        ({0: 2, 3: 1}, 2),  # a gap
        ({0: 2, 1: 2}, 2),  # overlaps
        ({0: 2, 2: 3}, 2),  # more rows than the piece has
        ({0: 4}, 4),
    ],
)
def test_kept_rows_are_used_as_far_as_they_follow_each_other(
    writer: CacheWriter, blocks: dict[int, int], n_used: int
) -> None:
    for start, n in blocks.items():
        writer.spool_rows("a/0", start, expected(*range(start, start + n)))
    run = rows_of(writer, Numbered())
    np.testing.assert_array_equal(run.spooled(piece("a/0", 0, 1, 2, 3)), expected(*range(n_used)))
    writer.spool_rows("a/1", 0, np.zeros((2, 3), np.float32))  # of another width
    assert run.spooled(piece("a/1", 0, 1)).shape == (0, 2)


def test_on_request_it_stops_after_the_batch_in_hand_which_is_kept(writer: CacheWriter) -> None:
    stop = StopRequest("Saved.")

    class Stopped(Numbered):
        def compute(self, staged: np.ndarray) -> np.ndarray:
            if len(self.batches) == 1:
                stop.signum = 15
            return super().compute(staged)

    asked, numbers = Stopped(), range(20, 31)
    with pytest.raises(Interrupted, match=r"^Saved\.$") as stopped:
        list(rows_of(writer, asked, stop).encode([piece("a/0", *numbers)]))
    assert stopped.value.signum == 15 and asked.batches == [[20, 21, 22], [23, 24, 25]]
    encoder = Numbered()
    ((_, rows),) = rows_of(writer, encoder).encode([piece("a/0", *numbers)])
    assert encoder.batches == [[26, 27, 28], [29, 30]]
    np.testing.assert_array_equal(rows, expected(*numbers))


def test_rows_are_kept_every_minute(writer: CacheWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 25))  # seconds: a batch takes 25, so that a save is due after three
    monkeypatch.setattr(sest.embedding.rows, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    list(rows_of(writer, Numbered()).encode([piece("a/0", *range(20))]))
    assert [(start, len(rows)) for start, rows in writer.spooled_rows("a/0")] == [(0, 9), (9, 9)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_refused_by_the_number_of_its_cell(writer: CacheWriter, value: float) -> None:
    class Broken(Numbered):
        def compute(self, staged: np.ndarray) -> np.ndarray:
            rows = super().compute(staged)
            rows[staged == 33, 1] = value
            return rows

    message = r"a\.h5ad: the embedding of cell 33 is not finite\. Try --precision fp32\."
    with pytest.raises(InputError, match=message):
        list(rows_of(writer, Broken()).encode([piece("a/0", 30, 31, 32, 33, 34)]))
