"""How close predicted pseudobulks are to real ones: pearson_delta, mean absolute error and PDS.

All inputs are pseudobulks: means over cells of log1p(counts normalised to target_sum), float, shape (N, G).
N = perturbations of one cell type, G = genes. The definitions are those of cell-eval 0.8.2, checked against numbers
it produced (tests/evaluation/test_metrics.py); where ours differ (no NaN, no luck in ties) the docstring says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    return Deviations.of(x).correlation(Deviations.of(y))


@dataclass(frozen=True, eq=False)
class Deviations:
    """Effects less their mean over genes: what correlates."""

    values: np.ndarray  # (N, G)
    size: np.ndarray  # (N,) their lengths

    @classmethod
    def of(cls, effects: np.ndarray) -> Deviations:
        """Of (N, G) float64, which is changed."""
        effects -= effects.mean(axis=1, keepdims=True)
        return cls(effects, np.sqrt(np.einsum("ij,ij->i", effects, effects)))

    def correlation(self, other: Deviations) -> np.ndarray:
        """(N,) of each row with the same row of the other, see `pearson_delta`."""
        assert self.values.shape == other.values.shape, (self.values.shape, other.values.shape)
        product, floor = np.einsum("ij,ij->i", self.values, other.values), FLAT * np.sqrt(self.values.shape[1])
        # Written so that a NaN in the data stays NaN in the answer: only a size known to be tiny becomes 0.
        flat = (self.size < floor) | (other.size < floor)
        return np.where(flat, 0.0, product / np.where(flat, 1.0, self.size * other.size))


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
    assert predicted_effect.shape == observed_effect.shape, (predicted_effect.shape, observed_effect.shape)
    ranking = Ranking(observed_effect, perturbations, gene_names)
    return ranking.scores(predicted_effect, np.arange(len(predicted_effect)))


class Ranking:
    """Observed effects (N, G) that predictions are ranked among; see `discrimination_score`."""

    def __init__(
        self, observed: np.ndarray, perturbations: Sequence[str], gene_names: Sequence[str] | None = None
    ) -> None:
        observed, names = _matrix(observed), list(map(str, perturbations))
        assert len(names) == len(observed), "one name a row"
        wanted = set(names)
        column = {gene: j for j, gene in enumerate(map(str, gene_names or ())) if gene in wanted}
        self._named = np.array(sorted(column.values()), int)  # genes that a perturbation is named like
        place = {gene: k for k, gene in enumerate(sorted(column, key=column.__getitem__))}
        self._own_gene = np.array([place.get(name, -1) for name in names], int)
        self._others = np.ones(observed.shape[1], bool)
        self._others[self._named] = False
        self._observed, self._of_named = self._without_named(observed), observed[:, self._named]

    def scores(self, predicted: np.ndarray, own: np.ndarray) -> np.ndarray:
        """(n,) PDS of predicted effects (n, G), of which each belongs to the observed one in row `own` (n,)."""
        n = len(self._observed)
        if n < 2 or not len(own):
            return np.full(len(own), np.nan)
        distance = self._distances(_matrix(predicted), own)
        to_own = distance[np.arange(len(own)), own][:, None]
        nearer, ties = (distance < to_own).sum(axis=1), (distance == to_own).sum(axis=1) - 1  # without itself
        scores: np.ndarray = 1.0 - (nearer + ties / 2) / n
        return scores

    def _distances(self, predicted: np.ndarray, own: np.ndarray) -> np.ndarray:
        """(n, N) L1 over genes of predicted i and observed j, without the gene that perturbation i is named like."""
        from sest.evaluation.distances import l1_distances  # slow to import; the command line reads this for help

        are_one = all((rows == predicted[0]).all() for rows in (predicted[:2], predicted))  # most differ in these two
        different = predicted[:1] if are_one else predicted  # controls and some baselines predict the same for all
        distance = l1_distances(self._without_named(different), self._observed)
        if are_one:
            distance = np.repeat(distance, len(predicted), axis=0)
        for i, gene in enumerate(self._own_gene[own].tolist() if len(self._named) else ()):
            gap = np.abs(self._of_named - predicted[i, self._named])
            if gene >= 0:
                gap[:, gene] = 0.0
            distance[i] += gap.sum(axis=1)
        return distance

    def _without_named(self, effects: np.ndarray) -> np.ndarray:
        return np.compress(self._others, effects, axis=1) if len(self._named) else effects


def mean_score(metric: str, scores: np.ndarray) -> float:
    """Mean of the scores (N,) of a metric; of `SOME_HAVE` over the pairs that have one, NaN where none has."""
    known = scores[~np.isnan(scores)] if metric in SOME_HAVE else scores
    return float(known.mean()) if len(known) else float("nan")


def _effects(
    predicted: np.ndarray, observed: np.ndarray, control: np.ndarray, predicted_control: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and observed pseudobulks minus their controls, both (N, G) float64, new."""
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
