"""Encode chosen cells of open files: read and tokenised ahead in a thread, finished rows kept in the cache's spool.

Shapes: n cells of a piece, W its width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from sest import progress
from sest.cache import CacheWriter
from sest.cells.inputs import ROWS_PER_READ, Cells
from sest.encoder.base import CellEncoder
from sest.errors import InputError
from sest.machine.ahead import ahead
from sest.machine.signals import StopRequest

SPOOL_SECONDS = 60.0  # what a kill costs at most, beside the batches in hand
BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Piece:
    """Cells of one file whose embeddings become one array: a shard, or a part of the PCA's sample."""

    spool: str  # name of its finished rows in the cache's spool
    cells: Cells
    numbers: np.ndarray  # (n,) sorted row numbers in the file


@dataclass(frozen=True)
class RowEncoder:
    """Encodes pieces one after another.

    Args:
        finish: of a batch, (B, D + extra) float32 -> (B, W): the projection, or the choice of columns.
        width: W.
        stop: on request, finished rows are kept and `encode` raises Interrupted.
    """

    writer: CacheWriter
    encoder: CellEncoder
    batch_size: int
    finish: Callable[[np.ndarray], np.ndarray]
    width: int
    stop: StopRequest

    def spooled(self, piece: Piece) -> np.ndarray:
        """Rows 0..k of a piece that an interrupted run finished: (k, W)."""
        parts, done = [], 0
        for start, rows in self.writer.spooled_rows(piece.spool):
            if start != done or rows.shape[1:] != (self.width,) or done + len(rows) > len(piece.numbers):
                break
            parts.append(rows)
            done += len(rows)
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)

    def encode(self, pieces: Sequence[Piece]) -> Generator[tuple[Piece, np.ndarray], None, None]:
        """Yield every piece with its embeddings (n, W) float32, in order."""
        before = [self.spooled(piece) for piece in pieces]
        progress.advance(sum(map(len, before)))
        with closing(ahead(self._staged(pieces, [len(rows) for rows in before]), BATCHES_AHEAD)) as staged:
            batches = self._encoded(staged)
            for piece, known in zip(pieces, before, strict=True):
                out = np.empty((len(piece.numbers), self.width), np.float32)
                out[: len(known)] = known
                self._fill(piece, out, len(known), batches)
                yield piece, out

    def _fill(self, piece: Piece, out: np.ndarray, done: int, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """Encode a piece's rows from number `done` on into `out`, keeping them in the spool every minute."""
        kept, saved = done, time.monotonic()
        while done < len(out):
            numbers, encoded = next(batches)
            if not np.isfinite(encoded).all():
                bad = numbers[~np.isfinite(encoded).all(1)][0]
                raise InputError(
                    f"{piece.cells.file.path}: the embedding of cell {bad} is not finite. Try --precision fp32."
                )
            out[done : done + len(numbers)] = encoded
            done += len(numbers)
            progress.advance(len(numbers))
            if self.stop.asked() or time.monotonic() - saved > SPOOL_SECONDS:
                self.writer.spool_rows(piece.spool, kept, out[kept:done])
                kept, saved = done, time.monotonic()
                self.stop.check()

    def _encoded(self, staged: Iterator[tuple[Cells, np.ndarray, Any]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (row numbers, their embeddings), each once the next batch has begun: so a GPU is never without one."""
        begun: tuple[np.ndarray, Callable[[], np.ndarray]] | None = None
        for cells, numbers, batch in staged:
            before, begun = begun, (numbers, self.encoder.start(cells, batch))
            if before is not None:
                yield before[0], self.finish(before[1]())
        if begun is not None:
            yield begun[0], self.finish(begun[1]())

    def _staged(self, pieces: Sequence[Piece], done: Sequence[int]) -> Iterator[tuple[Cells, np.ndarray, Any]]:
        """Yield (file, row numbers, batch ready for the encoder); batches begin at multiples of their size."""
        step = max(ROWS_PER_READ // self.batch_size, 1) * self.batch_size
        for piece, first in zip(pieces, done, strict=True):
            for start in range(first, len(piece.numbers), step):
                numbers = piece.numbers[start : start + step]
                block = piece.cells.read(numbers)
                for i in range(0, len(numbers), self.batch_size):
                    part = numbers[i : i + self.batch_size]
                    yield piece.cells, part, self.encoder.stage(piece.cells, block[i : i + len(part)], part)
