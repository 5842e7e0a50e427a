"""Hand out the batches of training in order, prepared ahead by threads.

Batch t holds the sets t*B .. (t+1)*B - 1 of the endless sequence (sest.data.sampler); of several processes each takes
every n-th of them.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sest.data.resident import Batch, ResidentCells, Staged
from sest.data.sampler import SetRows, SetSampler
from sest.machine.ranks import SINGLE, Ranks


class BatchSource:
    """The batches of one process; to be closed.

    Threads do ahead what the host does: they draw the sets, and gather the cells or send them to a GPU, which then
    makes them dense. On a CPU buffers are used again: the tensors of a batch are good until the next one is asked for.

    Args:
        size: B, of all processes together.
        n_workers: threads; as many batches are ahead, and one more is in use. 0: nothing is done ahead.
    """

    def __init__(
        self, sampler: SetSampler, cells: ResidentCells, size: int, n_workers: int, ranks: Ranks = SINGLE
    ) -> None:
        self._sampler, self._cells, self._size, self._ranks = sampler, cells, size, ranks
        self._ahead = n_workers
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="batches") if n_workers else None
        self._queue: dict[int, Future[Staged]] = {}
        self._spare: deque[Tensor] = deque()  # append and pop are safe from several threads
        self._in_use: Tensor | None = None
        self.waited = 0.0  # seconds in `get`

    def _prepare(self, number: int) -> Staged:
        ranks = self._ranks
        sets = self._sampler.sets(number * self._size + np.arange(ranks.rank, self._size, ranks.world_size))
        return self._cells.stage(sets, self._buffer(sets))

    def _buffer(self, sets: SetRows) -> Tensor | None:
        """A target tensor to fill, on the CPU only."""
        if self._cells.device.type != "cpu" or self._cells.on_device is not None:
            return None
        try:
            return self._spare.pop()
        except IndexError:
            return torch.empty(*sets["targets"].shape, self._cells.n_genes)

    def get(self, number: int) -> Batch:
        """Batch `number`; the next ones are prepared meanwhile."""
        began = time.perf_counter()
        if self._in_use is not None:
            self._spare.append(self._in_use)
        if self._pool is None:
            staged = self._prepare(number)
        else:
            for ahead in range(number, number + self._ahead + 1):
                if ahead not in self._queue:
                    self._queue[ahead] = self._pool.submit(self._prepare, ahead)
            staged = self._queue.pop(number).result()
        self._in_use = staged.dense
        batch = self._cells.finish(staged)
        self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
