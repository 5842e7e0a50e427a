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


@compiled(nogil=True, reordered=True)
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
    if len(x) < 2 or len(y) < 2:
        return float("nan")
    centre = y.mean(0, dtype=np.float64)
    x, y = (np.asarray(cells, np.float64) - centre for cells in (x, y))
    within = [_distances(cells, cells).sum() / (len(cells) * (len(cells) - 1)) for cells in (x, y)]
    return float(_distances(x, y).mean() - 0.5 * within[0] - 0.5 * within[1])


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    if a is b:
        np.fill_diagonal(squared, 0.0)
    distances: np.ndarray = np.sqrt(np.maximum(squared, 0.0))
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
) -> dict[str, float]:
    """Of one pair by predictor, all cells log1p (n, G).

    Args:
        real, model: real and predicted cells of the pair.
        real_controls: what `controls` predicts.
        own_controls: of the prediction's file; the other baselines' cells are these, moved to their mean (see
            sest.blend.transport) as a sample of as many as the model's are.
        means: (G,) pseudobulk of every predictor.
        control_mean: (G,) of all own controls.
        n_predicted: cells of the pair in the prediction.
    """
    observed, controls = real.toarray(), own_controls.toarray()
    found = {}
    for name, mean in means.items():
        if name == "model":
            cells = model.toarray()
        elif name == "controls":
            cells = real_controls.toarray()
        else:
            beside = max(n_predicted - len(controls), 0)
            cells = move_to_mean(controls, mean, controls, rng, present=control_mean, beside=beside)
        found[name] = unbiased_energy_distance(cells, observed)
    return found
