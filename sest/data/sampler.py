"""Which cells make set number n of training: a pure function of (seed, n), however sets are divided into batches.

Shapes: B sets, S cells a set. A set holds perturbed cells of one context (a cell type within a file) and one
perturbation; beside it stand S control cells of the same context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TypedDict

import numpy as np

from sest.data.labels import Labels, pair_counts, rows_of_pairs
from sest.errors import InputError, shown
from sest.machine.seeds import choose_from, streams

SMALLEST_SET, LARGEST_SET = 8, 128  # that `fitting_set_size` chooses
_EPOCH_CELLS, _EPOCH_ORDER, _SET_CONTROLS, _FIXED_FILL, _FIXED_OTHER = 1, 2, 3, 4, 5  # what a random stream is for


class SetRows(TypedDict):
    """The cells of some sets, by row number."""

    targets: np.ndarray  # (B, S) int64
    controls: np.ndarray  # (B, S) int64
    perturbation: np.ndarray  # (B,) int64 codes
    number: np.ndarray  # (B,) int64 place in the sequence they were drawn from


@dataclass(frozen=True, eq=False)
class _Epoch:
    """The sets of an epoch, of each (context, perturbation) from when the first of them is asked for."""

    order: np.ndarray  # (sets,): which set stands at each place
    rows: np.ndarray  # (sets, S): target rows, the sets of a key beside each other
    known: np.ndarray  # (keys,) bool: drawn


def fitting_set_size(labels: Labels, mask: np.ndarray) -> int:
    """Cells a set: those of the median (context, perturbation) with cells in `mask`, to the next power of 2; 8 to 128.

    Smaller pairs fill their sets by repeating cells, which costs as much as cells of their own; larger ones have more
    sets, each of which shows less of the distribution.
    """
    counts = pair_counts(labels, mask & ~labels.is_control)
    if not counts.any():
        raise InputError("No perturbed cells in this split.")
    median = float(np.median(counts[counts > 0]))
    return int(np.clip(2 ** np.ceil(np.log2(median)), SMALLEST_SET, LARGEST_SET))


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
        if not wanted.any():
            raise InputError("No perturbed cells in this split.")
        self.context, self.perturbation, self.cells = rows_of_pairs(labels, wanted)  # (keys,), (keys,); sorted rows
        self._keys = self.context * len(labels.perturbations) + self.perturbation  # (keys,)
        controls = _rows(mask & labels.is_control)
        self.pools = self._control_pools(controls)  # context -> sorted rows
        # controls of the same batch: keys of the batches, their controls one after the other, and where each begins
        self._batches: np.ndarray
        self._batches, rows_of = _by_key(controls, self._batch_of(controls)) if same_batch else (np.empty(0), [])
        self._of_batches = np.concatenate([np.empty(0, np.int64), *rows_of])
        self._first_of_batch = np.cumsum([0, *map(len, rows_of)])
        self.sets_per_key = np.array([-(-len(cells) // set_size) for cells in self.cells])
        self.sets_per_epoch = int(self.sets_per_key.sum())
        self._first_set = np.cumsum(self.sets_per_key) - self.sets_per_key  # (keys,), in the order of keys
        self._key_of_set = np.repeat(np.arange(len(self.cells)), self.sets_per_key)  # (sets,)
        self._lock = Lock()  # threads ask for the same epoch: it is drawn once
        self._epoch = lru_cache(maxsize=2)(self._begin_epoch)

    @property
    def filled(self) -> float:
        """Cells that sets hold, beside the cells there are: 1, or more where short sets repeat theirs."""
        return self.sets_per_epoch * self.set_size / sum(map(len, self.cells))

    def _control_pools(self, controls: np.ndarray) -> dict[int, np.ndarray]:
        there = _as_dict(*_by_key(controls, self.labels.context[controls]))
        wanted = np.unique(self.context).tolist()
        empty = [self.labels.contexts[c] for c in wanted if c not in there]
        if empty:
            raise InputError(f"No control cells in {shown(f'{group} / {name}' for group, name in empty)}.")
        return {c: there[c] for c in wanted}

    def _batch_of(self, rows: np.ndarray) -> np.ndarray:
        """One number for each context and batch of cells (n,): (n,) int64, in the order of batches in a context."""
        return self.labels.context[rows].astype(np.int64) * 2**32 + self.labels.batch[rows]

    def without_same_batch(self) -> int:
        """How many cells have no control in their own batch and take one of their cell type instead."""
        if not self.same_batch:
            return 0
        batches = self._batch_of(np.concatenate(self.cells))
        return int(np.isin(batches, self._batches, invert=True).sum())

    def _filled(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Cells (n,) plus resampled ones up to whole sets: (sets * S,)."""
        short = -len(cells) % self.set_size
        if not short:
            return cells
        extra = rng.choice(cells, short, replace=short > len(cells))
        return np.concatenate([cells, extra])

    def _begin_epoch(self, epoch: int) -> _Epoch:
        return _Epoch(
            order=np.random.default_rng([self.seed, _EPOCH_ORDER, epoch]).permutation(self.sets_per_epoch),
            rows=np.empty((self.sets_per_epoch, self.set_size), self.cells[0].dtype),
            known=np.zeros(len(self.cells), bool),
        )

    def _targets(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sets of an epoch by place (n,): target rows (n, S) and the key of each set (n,)."""
        with self._lock:
            drawn = self._epoch(epoch)
            which = drawn.order[places]
            keys = self._key_of_set[which]
            new = np.unique(keys[~drawn.known[keys]])
            for k, rng in zip(new.tolist(), streams(self.seed, _EPOCH_CELLS, epoch, new), strict=True):
                rows = self._filled(rng.permutation(self.cells[k]), rng).reshape(-1, self.set_size)
                drawn.rows[self._first_set[k] : self._first_set[k] + len(rows)] = rows
            drawn.known[new] = True
            return drawn.rows[which].astype(np.int64), keys

    def _controls(self, keys: np.ndarray, targets: np.ndarray, rngs: Iterator[np.random.Generator]) -> np.ndarray:
        """(B, S) control rows for sets of these keys (B,), without repeats where there are enough."""
        chosen, drawing = np.empty_like(targets), list(rngs)
        for out, context, rng in zip(chosen, self.context[keys].tolist(), drawing, strict=True):
            pool = self.pools[context]
            out[:] = rng.choice(pool, self.set_size, replace=len(pool) < self.set_size)
        if self.same_batch:
            batches = self._batch_of(targets.ravel()).reshape(targets.shape)
            mine = np.searchsorted(self._batches[:-1], batches)
            mine[self._batches[mine] != batches] = -1  # cells without a control in their batch
            places = np.empty_like(targets)
            choose_from(drawing, mine, self._first_of_batch, places)
            chosen[mine >= 0] = self._of_batches[places[mine >= 0]]
        return chosen

    def sets(self, numbers: np.ndarray) -> SetRows:
        """Sets of the endless sequence by number: (B,) int64."""
        epochs, places = np.divmod(np.asarray(numbers, np.int64), self.sets_per_epoch)
        targets = np.empty((len(places), self.set_size), np.int64)
        keys = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            targets[here], keys[here] = self._targets(epoch, places[here])
        return self._beside(targets, keys, streams(self.seed, _SET_CONTROLS, epochs, places), numbers)

    def fixed_sets(self, at_most: int = 0) -> SetRows:
        """Every cell once, in order: the sets of a validation; the first `at_most` where it is not 0.

        The first set of every (context, perturbation) comes before the second of any and is never left out, so a
        limit keeps all of them.
        """
        every = np.arange(len(self.cells))
        targets = [
            self._filled(cells, rng).reshape(-1, self.set_size)
            for cells, rng in zip(self.cells, streams(self.seed, _FIXED_FILL, every), strict=True)
        ]
        turns = np.arange(self.sets_per_epoch) - self._first_set[self._key_of_set]  # which set of its key
        order = np.argsort(turns, kind="stable")[: max(at_most, len(self.cells)) if at_most else None]
        keys, numbers = self._key_of_set[order], np.arange(len(order))
        return self._beside(
            np.concatenate(targets)[order].astype(np.int64),
            keys,
            streams(self.seed, _FIXED_FILL, keys, numbers),
            numbers,
        )

    def other_controls(self, sets: SetRows) -> np.ndarray:
        """(B, S) other control cells for fixed sets, drawn by the same rules."""
        context = self.labels.context[sets["targets"][:, 0]].astype(np.int64)
        keys = np.searchsorted(self._keys, context * len(self.labels.perturbations) + sets["perturbation"])
        rngs = streams(self.seed, _FIXED_OTHER, keys, sets["number"])
        return self._controls(keys, sets["targets"], rngs)

    def _beside(
        self, targets: np.ndarray, keys: np.ndarray, rngs: Iterator[np.random.Generator], numbers: np.ndarray
    ) -> SetRows:
        """Sets of these keys, with control cells beside the targets (B, S)."""
        return SetRows(
            targets=targets,
            controls=self._controls(keys, targets, rngs),
            perturbation=self.perturbation[keys],
            number=np.asarray(numbers, np.int64),
        )


def _rows(mask: np.ndarray) -> np.ndarray:
    """(n,) the rows of a mask (N,): int32 where that numbers them, as they are kept for a whole training."""
    rows: np.ndarray = np.flatnonzero(mask)
    return rows.astype(np.int32) if len(mask) < 2**31 else rows


def _by_key(rows: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The different keys (n,) of cells, sorted, and the rows of each in the order they come in."""
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])[: len(key)])
    return key[first].astype(np.int64), np.split(rows[order], first)[1:]  # what is before the first is empty


def _as_dict(keys: np.ndarray, rows: list[np.ndarray]) -> dict[int, np.ndarray]:
    return dict(zip(keys.tolist(), rows, strict=True))
