"""Energy distance of predicted and real cells of a pair, no cell compared with itself.

Shapes: n and m cells, G genes. Space: log1p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from sest.blend.transport import move_to_mean

CELLS = 64  # of a group that are compared
PAIRS = 32  # that are scored


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
