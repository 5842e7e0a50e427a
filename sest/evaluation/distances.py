"""Distances: energy distance of predicted and real cells, no cell compared with itself; L1 of all pseudobulks.

Shapes: n and m cells or pseudobulks, G genes. Space: log1p.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from sest.blend.transport import move_to_mean
from sest.machine.jit import compiled

CELLS = 64  # of a group that are compared
PAIRS = 32  # that are scored
ROWS, GENES = 32, 1024  # of L1 distances that are taken at once, so that they stay in the processor's cache


def _plain_l1(a: Any, b: Any, out: Any) -> None:
    out += cdist(a, b, "cityblock")


@compiled(_plain_l1, nogil=True, reordered=True, inside=True)  # places follow from the shapes alone
def _add_l1(a: Any, b: Any, out: Any) -> None:
    n, n_genes = a.shape
    for start in range(0, n_genes, GENES):
        stop = min(start + GENES, n_genes)
        for j in range(len(b)):
            other = b[j, start:stop]
            for i in range(0, n - n % 4, 4):  # four rows at a time: each value of the other one is read once for them
                r0, r1, r2, r3 = a[i, start:stop], a[i + 1, start:stop], a[i + 2, start:stop], a[i + 3, start:stop]
                s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
                for k in range(stop - start):
                    value = other[k]
                    s0 += abs(r0[k] - value)
                    s1 += abs(r1[k] - value)
                    s2 += abs(r2[k] - value)
                    s3 += abs(r3[k] - value)
                out[i, j] += s0
                out[i + 1, j] += s1
                out[i + 2, j] += s2
                out[i + 3, j] += s3
            for i in range(n - n % 4, n):
                row, total = a[i, start:stop], 0.0
                for k in range(stop - start):
                    total += abs(row[k] - other[k])
                out[i, j] += total


def l1_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) float64 sums over genes of |a_i - b_j|, of (n, G) and (m, G) float64; equal rows of b have equal ones."""
    a, b, out = np.ascontiguousarray(a), np.ascontiguousarray(b), np.zeros((len(a), len(b)))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as threads:
        parts = [slice(start, start + ROWS) for start in range(0, len(a), ROWS)]
        list(threads.map(lambda part: _add_l1(a[part], b, out[part]), parts))
    return out


def random_of(seed: int, stream: int, *name: str) -> np.random.Generator:
    """Randomness of what is called so, whatever else is evaluated."""
    number = int.from_bytes(hashlib.sha256("\n".join(name).encode()).digest()[:8], "little")
    return np.random.default_rng([seed, stream, number])


def sampled(group: np.ndarray, wanted: Mapping[int, tuple[str, ...]], seed: int) -> np.ndarray:
    """(N,) whether a cell is among the at most CELLS drawn of each group in `wanted`, which has the names of groups.

    group: (N,) of every cell.
    """
    chosen, codes = np.zeros(len(group), bool), list(wanted)
    order = np.argsort(group, kind="stable")
    first, last = np.searchsorted(group[order], codes), np.searchsorted(group[order], codes, side="right")
    for code, a, b in zip(codes, first, last, strict=True):
        rows = order[a:b]
        if len(rows) > CELLS:
            rows = random_of(seed, 0xE4E, *wanted[code]).choice(rows, CELLS, replace=False)
        chosen[rows] = True
    return chosen


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of one set less a point that all sets are near, so that distances by products keep their digits."""

    cells: np.ndarray  # (n, G) float64
    squares: np.ndarray  # (n,) of their lengths

    @classmethod
    def about(cls, centre: np.ndarray, cells: np.ndarray) -> Cells:
        """Of (n, G) cells, about a point (G,)."""
        moved = np.subtract(cells, centre, dtype=np.float64)
        return cls(moved, np.einsum("ij,ij->i", moved, moved))

    def within(self, draw: np.ndarray | None = None, source: np.ndarray | None = None) -> float:
        """Mean distance of two different cells, or of two of different draws (n,) and sources (n,); else NaN."""
        n = len(self.cells)
        if n < 2:
            return float("nan")
        distances = self._to(self)
        if draw is None:
            np.fill_diagonal(distances, 0.0)
            return float(distances.sum() / (n * (n - 1)))
        apart = draw[:, None] != draw
        if source is not None:
            apart &= source[:, None] != source
        return float(distances[apart].mean()) if apart.any() else float("nan")

    def between(self, other: Cells) -> float:
        """Mean distance of a cell of each."""
        return float(self._to(other).mean())

    def _to(self, other: Cells) -> np.ndarray:
        products = self.cells @ other.cells.T  # half the work where both are one, as BLAS is told
        squared = self.squares[:, None] + other.squares - 2 * products
        distances: np.ndarray = np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)
        return distances


def unbiased_energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| over different cells, (n, G) and (m, G); NaN where a set has one cell.

    Its mean over samples of one distribution is 0, so it may be below. Source: Szekely and Rizzo 2013.
    """
    centre = y.mean(0, dtype=np.float64)
    one, other = Cells.about(centre, x), Cells.about(centre, y)
    return _energy_distance(one, other, one.within(), other.within())


def _energy_distance(x: Cells, y: Cells, within_x: float, within_y: float) -> float:
    """The same, where the mean distances within x and within y are known."""
    if np.isnan(within_x) or np.isnan(within_y):
        return float("nan")
    return x.between(y) - 0.5 * within_x - 0.5 * within_y


class Controls:
    """Those of a cell type, which its pairs are compared beside: each is made dense once."""

    def __init__(self, real: sp.csr_matrix, own: sp.csr_matrix, own_mean: np.ndarray) -> None:
        """All log1p cells (n, G).

        Args:
            real: what the predictor `controls` predicts.
            own: of the prediction's file; the other baselines' cells are these, moved to their mean (see
                sest.blend.transport) as a sample of as many as the model's are.
            own_mean: (G,) of all of the file's.
        """
        self.own = own.toarray()
        self.own_mean = own_mean
        self.real = Cells.about(own_mean, real.toarray())
        self.real_within = self.real.within()


def energy_distances(
    real: sp.csr_matrix,
    model: sp.csr_matrix,
    controls: Controls,
    means: Mapping[str, np.ndarray],
    n_predicted: int,
    rng: np.random.Generator,
    draw: np.ndarray | None = None,
    source: np.ndarray | None = None,
) -> dict[str, float]:
    """Of one pair by predictor, all cells log1p (n, G).

    Cells that were predicted together can be further apart than independent ones (a head sees all cells of a set) or
    nearer to what they stand for (they have the predicted mean exactly). So x and x' are of different draws, and the
    cells of a baseline are made in two; NaN where the model's are all of one.

    Args:
        real, model: real and predicted cells of the pair.
        means: (G,) pseudobulk of every predictor.
        n_predicted: cells of the pair in the prediction.
        draw: (n,) of every predicted cell; None: they are taken for independent.
        source: (n,) the control each is from, with `draw`: two of one control are not independent; None: not known.
    """
    if draw is not None and len(np.unique(draw)) < 2:
        return dict.fromkeys(means, float("nan"))
    about, own = partial(Cells.about, controls.own_mean), controls.own
    observed, found = about(real.toarray()), {}
    within = observed.within()
    halves = np.arange(len(own)) % 2
    for name, mean in means.items():
        if name == "model":
            cells = about(model.toarray())
            within_cells = cells.within(draw, source)
        elif name == "controls":
            cells, within_cells = controls.real, controls.real_within
        else:
            moved = np.empty_like(own)
            for half in (0, 1):
                some = own[halves == half]
                beside = max(n_predicted // 2 - len(some), 0)
                moved[halves == half] = move_to_mean(some, mean, own, rng, present=controls.own_mean, beside=beside)
            cells = about(moved)
            within_cells = cells.within(halves)
        found[name] = _energy_distance(cells, observed, within_cells, within)
    return found
