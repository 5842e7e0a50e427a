"""Distances: energy distance of predicted and real cells, no cell compared with itself; L1 of all pseudobulks.

Shapes: n and m cells or pseudobulks, G genes. Space: log1p.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.sparse as sp

from sest.blend.transport import move_to_mean
from sest.machine.jit import compiled

CELLS = 64  # of a group that are compared
PAIRS = 32  # that are scored
ROWS, GENES = 32, 1024  # of L1 distances that are taken at once, so that they stay in the processor's cache


@compiled(nogil=True, reordered=True, inside=True)  # places follow from the shapes alone
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


def sampled(group: np.ndarray, wanted: Sequence[int], seed: int) -> np.ndarray:
    """(N,) whether a cell is among the at most CELLS drawn of each group in `wanted`; group: (N,) of every cell."""
    chosen = np.zeros(len(group), bool)
    order = np.argsort(group, kind="stable")
    first, last = np.searchsorted(group[order], wanted), np.searchsorted(group[order], wanted, side="right")
    for code, a, b in zip(wanted, first, last, strict=True):
        rows = order[a:b]
        if len(rows) > CELLS:
            rows = np.random.default_rng([seed, 0xE4E, code]).choice(rows, CELLS, replace=False)
        chosen[rows] = True
    return chosen


def unbiased_energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| over different cells, (n, G) and (m, G); NaN where a set has one cell.

    Its mean over samples of one distribution is 0, so it may be below. Source: Szekely and Rizzo 2013.
    """
    return _energy_distance(x, y, mean_within(x), mean_within(y))


def _energy_distance(x: np.ndarray, y: np.ndarray, within_x: float, within_y: float) -> float:
    """The same, where the mean distances within x and within y are known."""
    if np.isnan(within_x) or np.isnan(within_y):
        return float("nan")
    centre = y.mean(0, dtype=np.float64)
    return float(_distances(x - centre, y - centre).mean() - 0.5 * within_x - 0.5 * within_y)


def mean_within(cells: np.ndarray, draw: np.ndarray | None = None) -> float:
    """Mean distance of two different cells of (n, G), or of two of different draws (n,); NaN where there are none."""
    n = len(cells)
    if n < 2:
        return float("nan")
    centred = cells - cells.mean(0, dtype=np.float64)
    distances = _distances(centred, centred)
    if draw is None:
        return float(distances.sum() / (n * (n - 1)))
    apart = draw[:, None] != draw
    return float(distances[apart].mean()) if apart.any() else float("nan")


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    products = a @ b.T  # half the work where both are one, as BLAS is told
    squares_a, squares_b = (np.einsum("ij,ij->i", cells, cells) for cells in (a, b))
    squared = squares_a[:, None] + squares_b - 2 * products
    if a is b:
        np.fill_diagonal(squared, 0.0)
    distances: np.ndarray = np.sqrt(np.maximum(squared, 0.0, out=squared), out=squared)
    return distances


def energy_distances(
    real: sp.csr_matrix,
    model: sp.csr_matrix,
    real_controls: sp.csr_matrix,
    own_controls: sp.csr_matrix,
    means: Mapping[str, np.ndarray],
    control_mean: np.ndarray,
    n_predicted: int,
    rng: np.random.Generator,
    within_controls: float | None = None,
    draw: np.ndarray | None = None,
) -> dict[str, float]:
    """Of one pair by predictor, all cells log1p (n, G).

    Cells that were predicted together can be further apart than independent ones (a head sees all cells of a set) or
    nearer to what they stand for (they have the predicted mean exactly). So x and x' are of different draws, and the
    cells of a baseline are made in two; NaN where the model's are all of one.

    Args:
        real, model: real and predicted cells of the pair.
        real_controls: what `controls` predicts.
        own_controls: of the prediction's file; the other baselines' cells are these, moved to their mean (see
            sest.blend.transport) as a sample of as many as the model's are.
        means: (G,) pseudobulk of every predictor.
        control_mean: (G,) of all own controls.
        n_predicted: cells of the pair in the prediction.
        within_controls: `mean_within` of real_controls, where it is known.
        draw: (n,) of every predicted cell; None: they are taken for independent.
    """
    if draw is not None and len(np.unique(draw)) < 2:
        return dict.fromkeys(means, float("nan"))
    observed, controls = real.toarray(), own_controls.toarray()
    within, found = mean_within(observed), {}
    halves = np.arange(len(controls)) % 2
    for name, mean in means.items():
        if name == "model":
            cells = model.toarray()
            within_cells = mean_within(cells, draw)
        elif name == "controls":
            cells = real_controls.toarray()
            within_cells = mean_within(cells) if within_controls is None else within_controls
        else:
            cells = np.empty_like(controls)
            for half in (0, 1):
                own = controls[halves == half]
                beside = max(n_predicted // 2 - len(own), 0)
                cells[halves == half] = move_to_mean(own, mean, controls, rng, present=control_mean, beside=beside)
            within_cells = mean_within(cells, halves)
        found[name] = _energy_distance(cells, observed, within_cells, within)
    return found
