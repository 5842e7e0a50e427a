"""Which cells make set number n of training: a pure function of (seed, n), however sets are divided into batches.

Shapes: B sets, S cells a set. A set holds perturbed cells of one context (a cell type within a file) and one
perturbation; beside it stand S control cells of the same context.
"""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import TypedDict

import numpy as np

from sest.data.labels import Labels
from sest.errors import InputError, shown

_EPOCH_CELLS, _EPOCH_ORDER, _SET_CONTROLS, _FIXED_FILL = 1, 2, 3, 4  # what a random stream is for


class SetRows(TypedDict):
    """The cells of some sets, by row number."""

    targets: np.ndarray  # (B, S) int64
    controls: np.ndarray  # (B, S) int64
    perturbation: np.ndarray  # (B,) int64 codes
    number: np.ndarray  # (B,) int64 place in the sequence they were drawn from


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

    def sets(self, numbers: np.ndarray) -> SetRows:
        """Sets of the endless sequence by number: (B,) int64."""
        targets, controls, keys = [], [], []
        for number in numbers.tolist():
            epoch, place = divmod(number, self.sets_per_epoch)
            rows, key = self._epoch(epoch)
            rng = np.random.default_rng([self.seed, _SET_CONTROLS, epoch, place])
            targets.append(rows[place])
            controls.append(self._controls(int(key[place]), rows[place], rng))
            keys.append(key[place])
        return SetRows(
            targets=np.stack(targets),
            controls=np.stack(controls),
            perturbation=self.perturbation[np.array(keys)],
            number=np.asarray(numbers, np.int64),
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
        return SetRows(
            targets=rows,
            controls=np.stack(controls),
            perturbation=self.perturbation[key],
            number=np.arange(len(rows)),
        )
