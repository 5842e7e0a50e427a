"""How close predicted pseudobulks are to real ones: pearson_delta, mean absolute error and PDS.

All inputs are pseudobulks: means over cells of log1p(counts normalised to target_sum), float, shape (N, G).
N = perturbations of one cell type, G = genes. The definitions are those of cell-eval 0.8.2, checked against numbers
it produced (tests/evaluation/test_metrics.py); where ours differ (no NaN, no luck in ties) the docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FLAT = 1e-6
"""Effects whose standard deviation over genes is below this (log1p units) are float32 rounding, not effects."""
SOME_HAVE = ("pds", "energy_distance", "pearson_delta_independent")
"""Metrics that not every pair has: of one perturbation, not drawn, or with few controls."""


def pearson_delta(
    predicted: np.ndarray, observed: np.ndarray, control: np.ndarray, predicted_control: np.ndarray | None = None
) -> np.ndarray:
    """Correlation over genes of the predicted and the observed effect, one number a row: (N,).

    r(predicted - predicted_control, observed - control), in log1p space; the effect of a perturbation is its
    pseudobulk minus the mean of the matching controls. `control` is (G,) or (N, G); `predicted_control` are the
    prediction's own controls and default to `control`.

    1 is the right direction at any size. 0 is no linear relation, **and** an effect without variation over genes
    (below `FLAT`), for which the correlation is undefined: predicting no effect earns nothing. cell-eval's
    `pearson_delta` gives NaN there, which would turn the mean over perturbations into NaN or drop the row.
    """
    x, y = _effects(predicted, observed, control, predicted_control)
    for effect in (x, y):
        effect -= effect.mean(axis=1, keepdims=True)
    product, size_x, size_y = (np.einsum("ij,ij->i", a, b) for a, b in ((x, y), (x, x), (y, y)))
    size_x, size_y = np.sqrt(size_x), np.sqrt(size_y)
    floor = FLAT * np.sqrt(x.shape[1])
    # Written so that a NaN in the data stays NaN in the answer: only a size known to be tiny becomes 0.
    flat = (size_x < floor) | (size_y < floor)
    return np.where(flat, 0.0, product / np.where(flat, 1.0, size_x * size_y))


def mean_absolute_error(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean over genes of |predicted - observed|, in log1p units, one number a row: (N,). cell-eval's `mae`.

    0 is a perfect pseudobulk. Controls do not enter.
    """
    gap = _matrix(predicted) - _matrix(observed)
    mean: np.ndarray = np.abs(gap, out=gap).mean(axis=1)
    return mean


def discrimination_score(
    predicted: np.ndarray,
    observed: np.ndarray,
    control: np.ndarray | None,
    perturbations: Sequence[str],
    gene_names: Sequence[str] | None = None,
    predicted_control: np.ndarray | None = None,
) -> np.ndarray:
    """Perturbation discrimination score (PDS), cell-eval's `discrimination_score_l1`, one number a row: (N,).

    1 - rank / N, where rank is the number of perturbations whose observed effect is nearer (L1 over genes, log1p
    space) to the predicted effect of perturbation i than its own observed effect. A perturbation named exactly like a
    gene is compared without that gene's column (knocking it out is no discovery); combinations such as `A+B` keep all.

    1 is nearest to its own; a prediction that cannot tell perturbations apart averages (N + 1) / 2N, about 0.5; the
    worst is 1 / N, so 0 is never reached; with N = 1 there is no score (NaN; cell-eval says 1). Equal distances count
    as half a rank each (cell-eval breaks such ties by the order of names). With one control for both sides it cancels:
    pass None.

    `perturbations` has N names, `gene_names` G (None: no column is left out).
    """
    predicted_effect, observed_effect = _matrix(predicted), _matrix(observed)
    if control is not None:
        predicted_effect, observed_effect = _effects(predicted, observed, control, predicted_control)
    n = len(predicted_effect)
    assert len(perturbations) == n, "one name a row"
    if n < 2:
        return np.full(n, np.nan)
    distance = _distances(predicted_effect, observed_effect, perturbations, gene_names)
    own = distance.diagonal()[:, None]
    nearer, ties = (distance < own).sum(axis=1), (distance == own).sum(axis=1) - 1  # without itself
    scores: np.ndarray = 1.0 - (nearer + ties / 2) / n
    return scores


def _distances(
    predicted: np.ndarray, observed: np.ndarray, perturbations: Sequence[str], gene_names: Sequence[str] | None
) -> np.ndarray:
    """(N, N) L1 over genes of predicted i and observed j, without the gene that perturbation i is named like."""
    from sest.evaluation.distances import l1_distances  # slow to import; the command line reads this module for help

    wanted = set(map(str, perturbations))
    column = {gene: j for j, gene in enumerate(map(str, gene_names or ())) if gene in wanted}
    named = np.unique([column[name] for name in map(str, perturbations) if name in column]).astype(int)
    others = np.ones(predicted.shape[1], bool)
    others[named] = False
    are_one = all((rows == predicted[0]).all() for rows in (predicted[:2], predicted))  # most differ in the first two
    different = predicted[:1] if are_one else predicted  # controls and some baselines predict the same for all
    if len(named):
        distance = l1_distances(*(np.compress(others, effects, axis=1) for effects in (different, observed)))
    else:
        distance = l1_distances(different, observed)
    if are_one:
        distance = np.repeat(distance, len(predicted), axis=0)
    place = {gene: k for k, gene in enumerate(named.tolist())}
    for i, name in enumerate(map(str, perturbations) if len(named) else ()):
        gap = np.abs(observed[:, named] - predicted[i, named])
        if name in column:
            gap[:, place[column[name]]] = 0.0
        distance[i] += gap.sum(axis=1)
    return distance


def mean_score(metric: str, scores: np.ndarray) -> float:
    """Mean of the scores (N,) of a metric; of `SOME_HAVE` over the pairs that have one, NaN where none has."""
    known = scores[~np.isnan(scores)] if metric in SOME_HAVE else scores
    return float(known.mean()) if len(known) else float("nan")


def _effects(
    predicted: np.ndarray, observed: np.ndarray, control: np.ndarray, predicted_control: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and observed pseudobulks minus their controls, both (N, G) float64."""
    control = np.asarray(control, dtype=np.float64)
    own = control if predicted_control is None else np.asarray(predicted_control, dtype=np.float64)
    predicted, observed = _matrix(predicted), _matrix(observed)
    assert predicted.shape == observed.shape, (predicted.shape, observed.shape)
    return predicted - own, observed - control


def _matrix(pseudobulks: np.ndarray) -> np.ndarray:
    """(N, G) as float64: means of float32 sums lose the small differences that ranks rest on."""
    matrix = np.asarray(pseudobulks, dtype=np.float64)
    assert matrix.ndim == 2, matrix.shape
    return matrix
