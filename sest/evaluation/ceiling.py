"""How well real cells predict real cells: what no prediction can beat, and whether there is anything to predict.

The cells of every perturbation, and the controls of every cell type, are dealt into folds; a half is half of the folds.
One half predicts the other, each with its own half of the controls, so that the noise of a shared control mean, which
both effects would have in common, cannot look like agreement. Shapes: F folds, S splits into halves, G genes. Space:
log1p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations

import numpy as np

from sest.evaluation.metrics import FLAT, discrimination_score, mean_absolute_error, mean_score

FOLDS = 8  # fewer where their sums would take more than MOST_BYTES
MOST_BYTES = 2**29  # of the sums of all folds
BLOCK_BYTES = 2**23  # of the sums of the pairs whose halves are compared at one time
SPLITS = 10  # into halves, at most; scores are means over them
PDS_ROWS = 20_000  # effects that pds compares over all splits, but for the first: it grows with the pairs' square
PDS_PAIRS = 300  # perturbations of a cell type above which halves get no pds: it would take minutes at the start
LEAST_CELLS = FOLDS  # of a perturbation, and of the controls, that take part
LEAST_CORRELATION = 0.1  # below, one half explains less than 1% of what the other shows
LEAST_RATIO = 2.0  # standard errors of no effect at all that the correlation must be above 0
DRAWS = 60  # of controls against controls, for that error


@dataclass(frozen=True)
class Ceiling:
    """Scores of one half of the real cells of a cell type as a prediction of the other half."""

    cell_type: str
    n_perturbations: int  # with cells enough to be halved
    n_cells: int  # a perturbation, median
    n_controls: int
    pearson_delta: float
    pearson_delta_se: float  # standard error if there were no effect: from controls against controls
    mae: float  # the noise floor: what halves differ by, twice the noise of all cells together
    mae_controls: float  # of a half of the controls as a prediction, at the same noise
    pds: float  # NaN of one perturbation, and of more than PDS_PAIRS

    @property
    def is_measurable(self) -> bool:
        """Whether real replicates predict each other at all."""
        r = self.pearson_delta
        return bool(r >= LEAST_CORRELATION and r > LEAST_RATIO * self.pearson_delta_se)

    def verdict(self) -> str:
        """One sentence for the user; "" where there is an effect to predict."""
        if self.is_measurable:
            return ""
        return (
            f"{self.cell_type}: no measurable effect here with {self.n_cells:,} cells a perturbation and "
            f"{self.n_controls:,} controls: half of the real cells does not predict the other half (pearson_delta "
            f"{self.pearson_delta:.2f} ± {self.pearson_delta_se:.2f}). No score there is a win."
        )


def n_folds(n_groups: int, n_genes: int) -> int:
    """Folds whose sums fit: 8, or else 4."""
    return FOLDS if n_groups * FOLDS * n_genes * 4 <= MOST_BYTES else 4


def deal(group: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) fold of each cell: those of each group in equal parts, drawn from the seed, whatever other groups hold."""
    fold = np.zeros(len(group), np.int64)
    if folds == 1:
        return fold
    order = np.argsort(group, kind="stable")
    for cells in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        fold[cells] = np.random.default_rng([seed, 0xCE11, len(cells)]).permutation(len(cells)) % folds
    return fold


def splits(folds: int, seed: int) -> list[np.ndarray]:
    """At most SPLITS ways to make two halves of the folds: masks (F,), each split once."""
    halves = [half for half in combinations(range(folds), folds // 2) if 0 in half]
    chosen = np.random.default_rng([seed, 0x5911]).permutation(len(halves))[:SPLITS]
    return [np.isin(np.arange(folds), halves[i]) for i in sorted(chosen)]


@dataclass(frozen=True, eq=False)
class Folds:
    """Sums of log1p cells, (groups, F, G), float32 of many, and cells, (groups, F)."""

    sums: np.ndarray
    n_cells: np.ndarray
    seed: int = 0

    @property
    def means(self) -> np.ndarray:
        """(groups, G) mean of all cells of each group; NaN for an empty one."""
        with np.errstate(invalid="ignore"):
            whole: np.ndarray = self.sums.sum(1, dtype=np.float64) / self.counts[:, None]
        return whole

    @property
    def counts(self) -> np.ndarray:
        """(groups,) cells."""
        whole: np.ndarray = self.n_cells.sum(1)
        return whole

    def some(self, groups: np.ndarray) -> Folds:
        """Those of some groups."""
        return Folds(self.sums[groups], self.n_cells[groups], self.seed)

    def about(self, point: np.ndarray) -> np.ndarray:
        """(groups, F, G) sums of the cells less a point (G,), float64."""
        moved: np.ndarray = self.n_cells[:, :, None] * -point
        moved += self.sums
        return moved

    def half_weights(self) -> np.ndarray:
        """(2, groups, S, F): means of one half and of the other are these @ sums."""
        one = np.array(splits(self.n_cells.shape[1], self.seed), np.float64)
        halves = np.stack([one, 1 - one])[:, None]
        weights: np.ndarray = halves / (halves * self.n_cells[:, None]).sum(-1, keepdims=True)
        return weights

    def halves(self) -> np.ndarray:
        """(2, groups, S, G) means of one half and of the other."""
        means: np.ndarray = self.half_weights() @ self.sums
        return means


@dataclass(frozen=True, eq=False)
class Halves:
    """Half of the cells of every pair as a prediction of the other half: means over splits, of n pairs."""

    n_cells: np.ndarray  # (n,)
    pearson_delta: np.ndarray  # (n,); this and the next are NaN where the pair, or its controls, have too few cells
    mae: np.ndarray
    mae_controls: np.ndarray
    pds: float = float("nan")

    def first(self, n: int) -> Halves:
        """Those of the first pairs."""
        return replace(self, **{f.name: getattr(self, f.name)[:n] for f in fields(self) if f.name != "pds"})


def score_halves(
    controls: Folds,
    n_cells: np.ndarray,
    folds_of: Callable[[np.ndarray], Folds],
    perturbations: Sequence[str],
    genes: Sequence[str],
    *,
    all_scores: bool = True,
) -> Halves:
    """Compare the halves of the pairs of a cell type, some pairs at a time: of all of them the sums would be large.

    Args:
        controls: those of its controls, one group.
        n_cells: (n,) of every pair.
        folds_of: makes those of some of the pairs, by their places (m,).
        perturbations: names of the first pairs, which pds ranks; the others get none.
        all_scores: False: pearson_delta alone, the others are NaN; a quarter of the time.
    """
    scores = np.full((3, len(n_cells)), np.nan)
    enough = np.flatnonzero(_enough(controls, n_cells))
    if not len(enough):
        return Halves(n_cells, scores[0], scores[1], scores[2])
    half, centre = controls.half_weights(), controls.means[0]  # all is less this point: the scores are of differences
    of_controls = controls.about(centre)[0]
    c_one, c_other = half[:, 0] @ of_controls  # (S, G)
    ranked = int(np.count_nonzero(enough < len(perturbations))) if all_scores else 0
    n_ranked_splits = 0 if ranked > PDS_PAIRS else min(PDS_ROWS // max(ranked, 1) ** 2 + 1, len(c_one))
    effects = np.empty((n_ranked_splits, 2, ranked, len(centre)))
    at_once = max(BLOCK_BYTES // controls.sums[0].nbytes, 1)
    for start in range(0, len(enough), at_once):
        rows = enough[start : start + at_once]
        folds = folds_of(rows)
        sums, weights = folds.about(centre), folds.half_weights()
        both = np.concatenate([sums, np.broadcast_to(of_controls, sums.shape)], 1)
        x, y = np.concatenate([weights, np.broadcast_to(-half, weights.shape)], 3)
        here = np.zeros((3, len(rows)))
        here[0] = _correlations(x, y, both).sum(1)
        here[1:] = 0 if all_scores else np.nan
        for split in range(len(c_one) if all_scores else 0):
            one, other = (weights[:, :, split, None] @ sums)[:, :, 0]
            here[1] += mean_absolute_error(one, other)
            here[2] += mean_absolute_error(np.broadcast_to(c_one[split], one.shape), other)
            if split < n_ranked_splits:
                to = effects[split, :, start : start + len(rows)]  # shorter where others follow
                np.subtract(one[: to.shape[1]], c_one[split], out=to[0])
                np.subtract(other[: to.shape[1]], c_other[split], out=to[1])
        scores[:, rows] = here / len(c_one)
    names = [perturbations[row] for row in enough[:ranked]]
    pds = [mean_score("pds", discrimination_score(one, other, None, names, genes)) for one, other in effects if ranked]
    return Halves(n_cells, scores[0], scores[1], scores[2], float(np.mean(pds)) if pds else float("nan"))


def _correlations(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """(..., S) correlations over genes of x @ folds with y @ folds, from the products of the folds alone.

    x, y: (..., S, F); folds: (..., F, G), near zero. 0 where one is flat, as in `pearson_delta`.
    """
    n_genes, mean = folds.shape[-1], folds.mean(-1)
    gram = folds @ np.swapaxes(folds, -1, -2) - n_genes * mean[..., :, None] * mean[..., None, :]
    product, xx, yy = ((a @ gram * b).sum(-1) for a, b in ((x, y), (x, x), (y, y)))
    flat = np.minimum(xx, yy) < FLAT**2 * n_genes
    found: np.ndarray = np.where(flat, 0.0, product / np.sqrt(np.where(flat, 1.0, xx * yy)))
    return found


def ceiling(controls: Folds, halves: Halves, cell_type: str) -> Ceiling | None:
    """The ceiling of a cell type; None where too few cells can be halved. controls: as `score_halves` takes them."""
    enough = _enough(controls, halves.n_cells)
    if not enough.any():
        return None
    n_cells = halves.n_cells[enough]
    return Ceiling(
        cell_type=cell_type,
        n_perturbations=len(n_cells),
        n_cells=int(np.median(n_cells)),
        n_controls=int(controls.counts[0]),
        pearson_delta=float(halves.pearson_delta[enough].mean()),
        pearson_delta_se=_error_of_nothing(controls, n_cells),
        mae=float(halves.mae[enough].mean()),
        mae_controls=float(halves.mae_controls[enough].mean()),
        pds=halves.pds,
    )


def _enough(controls: Folds, n_cells: np.ndarray) -> np.ndarray:
    """(n,) bool: the pairs that can be halved, with their controls."""
    enough: np.ndarray = (n_cells >= LEAST_CELLS) & (controls.counts[0] >= LEAST_CELLS)
    return enough


def means_of_halves(ceilings: Sequence[Ceiling]) -> dict[str, float]:
    """pearson_delta, mae and pds of half of the real cells: means over the perturbations of all cell types.

    pds is that of the cell types that have one, NaN where none has.
    """
    result = {}
    for metric in ("pearson_delta", "mae", "pds"):
        scores = np.array([getattr(c, metric) for c in ceilings], np.float64)
        weights = np.array([c.n_perturbations for c in ceilings]) * ~np.isnan(scores)
        result[metric] = float(np.nansum(scores * weights) / weights.sum()) if weights.any() else float("nan")
    return result


def _error_of_nothing(controls: Folds, n_cells: np.ndarray) -> float:
    """Standard error of the mean correlation over perturbations of (n,) cells where none has an effect.

    One such correlation spreads as that of quarters of the controls against each other; noise is correlated between
    genes, so that this is far above 1 / sqrt(G). The mean over n perturbations spreads by 1 / sqrt(n) of that, and by
    the share of the noise that the controls bring into all of them: that part does not average out.
    """
    n, folds = controls.n_cells[0], controls.about(controls.means[0])[0]
    rng, weights = np.random.default_rng([controls.seed, 0x0E0]), np.zeros((DRAWS, 4, len(n)))
    for draw in weights:
        for quarter, part in zip(draw, rng.permutation(len(n)).reshape(4, -1), strict=True):
            quarter[part] = 1 / n[part].sum()
    a, b, c, d = np.moveaxis(weights, 1, 0)
    found = _correlations(a - b, c - d, folds)
    per_control = 1 / n.sum()
    shared = float(np.mean(per_control / (per_control + 1 / n_cells)))
    return float(np.sqrt(np.mean(np.square(found)) * (1 / len(n_cells) + shared**2)))


def independent_pearson_delta(
    folds: Folds,
    control: int,
    predicted: np.ndarray,
    observed: np.ndarray,
    own_control: np.ndarray,
    follows: float,
) -> np.ndarray:
    """(n,) pearson_delta where prediction and reality have different controls.

    A half of the real controls stands beside the real cells. A prediction that follows its own controls has their
    noise, which leaves it with them; of one that does not, the other half of the real ones is taken; and in between.

    Args:
        control: group of the real controls, which are halved, if there are enough (NaN otherwise).
        predicted, observed: (n, G) pseudobulks.
        own_control: (G,) mean of the controls that were predicted from.
        follows: how much of a change in that mean `predicted` follows: 1 of a baseline, which is the controls and an
            effect; 0 where it does not depend on them.
    """
    n = folds.n_cells[control].sum()
    if n < LEAST_CELLS:
        return np.full(len(predicted), np.nan)
    of_control = folds.some(np.array([control]))
    base = of_control.means[0]
    # All splits at once: a covariance of differences is the sum of four, and those with controls are matrix products.
    a, b = (_centred(half - base) for side in of_control.halves() for half in side)
    a = a * (1 - follows)
    x, y = _centred(predicted - (follows * own_control + (1 - follows) * base)), _centred(observed - base)
    floor = FLAT * np.sqrt(x.shape[1])
    size_x, size_y = _sizes(x, a), _sizes(y, b)
    flat = (size_x < floor) | (size_y < floor)  # as in pearson_delta
    product = (x * y).sum(1)[:, None] - x @ b.T - y @ a.T + (a * b).sum(1)
    mean: np.ndarray = np.where(flat, 0.0, product / np.where(flat, 1.0, size_x * size_y)).mean(1)
    return mean


def _centred(rows: np.ndarray) -> np.ndarray:
    """Rows (n, G) less their means, float64."""
    rows = np.asarray(rows, np.float64)
    centred: np.ndarray = rows - rows.mean(1, keepdims=True)
    return centred


def _sizes(x: np.ndarray, a: np.ndarray) -> np.ndarray:
    """(n, m) lengths of x_i - a_j."""
    squares = (x * x).sum(1)[:, None] - 2 * x @ a.T + (a * a).sum(1)
    sizes: np.ndarray = np.sqrt(np.maximum(squares, 0.0))
    return sizes
