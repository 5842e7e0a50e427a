"""Sets of cells: which cells make batch number t, as a pure function of (seed, t), and their tensors.

Shapes: B sets, S cells a set, E embedding width, G genes. A set holds perturbed cells of one context (a cell type
within a file) and one perturbation; beside it stand S control cells of the same context.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from sest.cells import Labels, Targets
from sest.errors import InputError, shown

_EPOCH_CELLS, _EPOCH_ORDER, _SET_CONTROLS, _FIXED_FILL = 1, 2, 3, 4  # what a random stream is for


class SetRows(TypedDict):
    """The cells of some sets, by row number."""

    targets: np.ndarray  # (B, S) int64
    controls: np.ndarray  # (B, S) int64
    perturbation: np.ndarray  # (B,) int64 codes


class Batch(TypedDict):
    """The tensors of one forward pass, on the training device."""

    basal: Tensor  # (B, S, E) float32 embeddings of the controls
    perturbation: Tensor  # (B,) int64 codes
    target: Tensor  # (B, S, G) float32 log1p


class SetSampler:
    """Draws the sets of one split.

    Every epoch uses every perturbed cell once; the last, short set of a (context, perturbation) is filled by
    resampling its cells. The order of all sets is shuffled. Batch t holds the sets t*B .. (t+1)*B - 1 of the endless
    sequence of epochs, so it depends on the seed and t alone.

    Args:
        labels: of all cells.
        mask: (N,) bool, the cells of the split.
        set_size: S.
        seed: of everything random here.
        same_batch: controls of the same batch as the perturbed cell, where there are any.
        control_targets: also draw sets of control cells.

    Raises:
        InputError: no perturbed cells in the split, or a context without controls.
    """

    def __init__(
        self,
        labels: Labels,
        mask: np.ndarray,
        set_size: int,
        seed: int,
        *,
        same_batch: bool = False,
        control_targets: bool = False,
    ) -> None:
        self.labels, self.set_size, self.seed, self.same_batch = labels, set_size, seed, same_batch
        wanted = mask & (control_targets | ~labels.is_control)
        rows = np.flatnonzero(wanted)
        if not len(rows):
            raise InputError("No perturbed cells in this split.")
        key = labels.context[rows].astype(np.int64) * len(labels.perturbations) + labels.perturbation[rows]
        keys, which = np.unique(key, return_inverse=True)
        order = np.argsort(which, kind="stable")
        self.cells = np.split(rows[order], np.cumsum(np.bincount(which))[:-1])  # per key: sorted rows
        self.context = keys // len(labels.perturbations)  # (keys,)
        self.perturbation = keys % len(labels.perturbations)  # (keys,)
        self.pools = self._control_pools(mask & labels.is_control)
        self._batch_pools = self._same_batch_pools(mask & labels.is_control) if same_batch else {}
        self.sets_per_key = np.array([-(-len(cells) // set_size) for cells in self.cells])
        self.sets_per_epoch = int(self.sets_per_key.sum())
        self._lock = Lock()  # threads ask for the same epoch: it is drawn once
        self._drawn = lru_cache(maxsize=2)(self._draw_epoch)

    def _control_pools(self, controls: np.ndarray) -> dict[int, np.ndarray]:
        pools = {int(c): np.flatnonzero(controls & (self.labels.context == c)) for c in np.unique(self.context)}
        empty = [self.labels.contexts[c] for c, pool in pools.items() if not len(pool)]
        if empty:
            raise InputError(f"No control cells in {shown(f'{group} / {name}' for group, name in empty)}.")
        return pools

    def _same_batch_pools(self, controls: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
        rows = np.flatnonzero(controls)
        pairs = np.stack([self.labels.context[rows], self.labels.batch[rows]], axis=1)
        return {(int(c), int(b)): rows[(pairs == (c, b)).all(1)] for c, b in np.unique(pairs, axis=0)}

    def without_same_batch(self) -> int:
        """How many cells have no control in their own batch and take one of their cell type instead."""
        if not self.same_batch:
            return 0
        rows = np.concatenate(self.cells)
        pairs = zip(self.labels.context[rows].tolist(), self.labels.batch[rows].tolist(), strict=True)
        return sum(pair not in self._batch_pools for pair in pairs)

    def _filled(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Cells (n,) plus resampled ones up to whole sets: (sets * S,)."""
        short = -len(cells) % self.set_size
        extra = rng.choice(cells, short, replace=short > len(cells))
        return np.concatenate([cells, extra])

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All sets of an epoch in order: target rows (sets, S) and the key of each set (sets,)."""
        rows = []
        for k, cells in enumerate(self.cells):
            rng = np.random.default_rng([self.seed, _EPOCH_CELLS, epoch, k])
            rows.append(self._filled(rng.permutation(cells), rng).reshape(-1, self.set_size))
        order = np.random.default_rng([self.seed, _EPOCH_ORDER, epoch]).permutation(self.sets_per_epoch)
        keys = np.repeat(np.arange(len(self.cells)), self.sets_per_key)
        return np.concatenate(rows)[order], keys[order]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            return self._drawn(epoch)

    def _controls(self, key: int, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """S control rows for a set, without repeats where there are enough."""
        context = int(self.context[key])
        pool = self.pools[context]
        chosen = rng.choice(pool, self.set_size, replace=len(pool) < self.set_size)
        if self.same_batch:
            batches = self.labels.batch[targets]
            for batch in np.unique(batches):
                mine = self._batch_pools.get((context, int(batch)))
                if mine is not None:
                    where = np.flatnonzero(batches == batch)
                    chosen[where] = rng.choice(mine, len(where), replace=len(mine) < len(where))
        return chosen

    def sets(self, first: int, count: int) -> SetRows:
        """Sets number first .. first + count - 1 of the endless sequence."""
        targets, controls, keys = [], [], []
        for number in range(first, first + count):
            epoch, place = divmod(number, self.sets_per_epoch)
            rows, key = self._epoch(epoch)
            rng = np.random.default_rng([self.seed, _SET_CONTROLS, epoch, place])
            targets.append(rows[place])
            controls.append(self._controls(int(key[place]), rows[place], rng))
            keys.append(key[place])
        return SetRows(
            targets=np.stack(targets), controls=np.stack(controls), perturbation=self.perturbation[np.array(keys)]
        )

    def fixed_sets(self, at_most: int = 0) -> SetRows:
        """Every cell once, in order: the sets of a validation; the first `at_most` where it is not 0.

        The first set of every (context, perturbation) comes before the second of any and is never left out, so a
        limit keeps all of them.
        """
        targets: list[np.ndarray] = []
        keys: list[int] = []
        turns: list[int] = []  # which set of its key
        for k, cells in enumerate(self.cells):
            rng = np.random.default_rng([self.seed, _FIXED_FILL, k])
            rows = self._filled(cells, rng).reshape(-1, self.set_size)
            targets.append(rows)
            keys += [k] * len(rows)
            turns += range(len(rows))
        order = np.argsort(turns, kind="stable")[: max(at_most, len(self.cells)) if at_most else None]
        rows, key = np.concatenate(targets)[order], np.array(keys)[order]
        controls = [
            self._controls(int(k), row, np.random.default_rng([self.seed, _FIXED_FILL, int(k), i]))
            for i, (k, row) in enumerate(zip(key, rows, strict=True))
        ]
        return SetRows(targets=rows, controls=np.stack(controls), perturbation=self.perturbation[key])


@dataclass(frozen=True, eq=False)
class CellStore:
    """Embeddings and targets in the memory of one device, ready to be gathered."""

    device: torch.device  # where the cells are kept
    embeddings: Tensor  # (controls, E) as stored
    embedding_row: np.ndarray  # (N,) int64, on the host
    indptr: np.ndarray  # (N + 1,) int64, on the host: sizes are known without asking the device
    starts: Tensor  # (N,) int64
    indices: Tensor  # (nnz,) int32
    data: Tensor  # (nnz,)
    factor: Tensor  # (N,) float32
    n_genes: int

    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = (self.embeddings, self.starts, self.indices, self.data, self.factor)
        return sum(t.numel() * t.element_size() for t in tensors)

    def expression(self, rows: np.ndarray) -> Tensor:
        """Cells as dense log1p values: row numbers of any shape (...,) -> (..., G) float32 on the store's device."""
        flat = rows.ravel()
        lengths = self.indptr[flat + 1] - self.indptr[flat]
        n_values = int(lengths.sum())
        where = torch.as_tensor(flat, device=self.device)
        length = torch.as_tensor(lengths, device=self.device)
        # value v of the batch belongs to row `row[v]` of it and stands at `at[v]` in the store
        row = torch.repeat_interleave(torch.arange(len(flat), device=self.device), length, output_size=n_values)
        offset = self.starts[where] - (length.cumsum(0) - length)  # (rows,)
        at = torch.arange(n_values, device=self.device) + offset[row]
        values = self.data[at].float()
        factor = self.factor[where][row]
        values = torch.where(factor > 0, torch.log1p(values * factor), values)
        dense = torch.zeros(len(flat) * self.n_genes, device=self.device)
        dense[row * self.n_genes + self.indices[at]] = values
        return dense.view(*rows.shape, self.n_genes)

    def basal(self, controls: np.ndarray) -> Tensor:
        """Embeddings of control cells: (...,) row numbers -> (..., E) float32 on the store's device."""
        rows = self.embedding_row[controls]
        assert (rows >= 0).all(), "a control without an embedding row"
        return self.embeddings[torch.as_tensor(rows, device=self.device)].float()

    def batch(self, sets: SetRows, device: torch.device) -> Batch:
        """Gather sets and bring them to the training device."""
        return Batch(
            basal=_send(self.basal(sets["controls"]), device),
            perturbation=_send(torch.as_tensor(sets["perturbation"]), device),
            target=_send(self.expression(sets["targets"]), device),
        )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the training device; from pinned memory, so that the copy runs beside the step."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def store_cells(targets: Targets, embeddings: np.ndarray, embedding_row: np.ndarray, device: torch.device) -> CellStore:
    """Put all cells into the memory of a device."""
    return CellStore(
        device=device,
        embeddings=torch.from_numpy(embeddings).to(device),
        embedding_row=embedding_row,
        indptr=targets.indptr,
        starts=torch.from_numpy(targets.indptr[:-1].copy()).to(device),
        indices=torch.from_numpy(targets.indices).to(device),
        data=torch.from_numpy(targets.data).to(device),
        factor=torch.from_numpy(targets.factor).to(device),
        n_genes=len(targets.genes),
    )


class BatchSource:
    """Hands out the training batches in order, prepared ahead by threads where the cells are in host memory."""

    def __init__(self, sampler: SetSampler, store: CellStore, device: torch.device, size: int, n_workers: int) -> None:
        self._sampler, self._store, self._device, self._size = sampler, store, device, size
        self._ahead = n_workers if store.device.type == "cpu" else 0
        self._pool = ThreadPoolExecutor(n_workers, thread_name_prefix="batches") if self._ahead else None
        self._queue: dict[int, Future[Batch]] = {}

    def _prepare(self, number: int) -> Batch:
        return self._store.batch(self._sampler.sets(number * self._size, self._size), self._device)

    def get(self, number: int) -> Batch:
        """Batch `number`; the next ones are prepared meanwhile."""
        if self._pool is None:
            return self._prepare(number)
        for ahead in range(number, number + self._ahead + 1):
            if ahead not in self._queue:
                self._queue[ahead] = self._pool.submit(self._prepare, ahead)
        return self._queue.pop(number).result()

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def batch_source(
    sampler: SetSampler, store: CellStore, device: torch.device, size: int, n_workers: int
) -> Iterator[BatchSource]:
    """A `BatchSource` whose threads end with the block."""
    source = BatchSource(sampler, store, device, size, n_workers)
    try:
        yield source
    finally:
        source.close()
