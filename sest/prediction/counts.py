"""Whole counts of predicted cells: control cells whose counts follow the predicted fold changes.

A prediction says how far the mean of log1p values moves. A rate of counts has such a mean under Poisson noise, so that
two means are two rates, and their ratio is the fold change: where counts are few it is the ratio of the means, where
they are many it is nearly exp(effect). A gene that is to be lower keeps each count with that chance (binomial
thinning); to one that is to be higher, Poisson distributed counts are added, by the cell's depth and the gene's share.
Both are what a Poisson distributed count does when its rate changes. So cells keep the depth and the spread that
sequenced cells have, the sum over cells changes by the fold change, and a cell of which nothing is predicted is a
control cell, count for count.

Shapes: n cells, G genes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import scipy.sparse

from sest.errors import InputError
from sest.prediction.cells import ROWS_AT_ONCE
from sest.prediction.controls import Pool
from sest.prediction.draws import COUNTS, random_of
from sest.prediction.requests import Request

# of what, from which control cells (n,), and how far the run's genes move (G,); None: these control cells themselves
Effect = tuple[Request, np.ndarray, np.ndarray | None]

LEAST, MOST = 1e-5, 1e6  # counts a cell, of the rates that are told apart
MOST_FOLD = 100.0  # a larger fold change is of a gene that is hardly there
RATES = 500


@lru_cache(maxsize=32)
def _means_of_rates(factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Rates (RATES,) of counts, and the mean of log1p(factor * count) at each, both rising."""
    from scipy.stats import poisson  # slow to import

    rates = np.geomspace(LEAST, MOST, RATES)
    middle = np.linspace(-8.0, 8.0, 161)  # standard errors
    means = np.empty(RATES)
    for i, rate in enumerate(rates):
        few = rate < 400
        counts = np.arange(int(rate + 12 * np.sqrt(rate) + 12)) if few else rate + middle * np.sqrt(rate)
        chances = poisson.pmf(counts, rate) if few else np.exp(-0.5 * middle**2)
        means[i] = np.average(np.log1p(factor * counts), weights=chances)
    return rates, means


def fold_changes(present: np.ndarray, effect: np.ndarray, factor: float) -> np.ndarray:
    """The fold change of each gene's counts.

    Args:
        present: (G,) mean of log1p(factor * count) over the control cells.
        effect: (G,) how far it is to move; where it ends below zero, the gene is switched off.
        factor: what a count is multiplied by, of a typical cell.

    Returns:
        (G,) at least 0 and at most 100; 1 where nothing moves.
    """
    rates, means = _means_of_rates(float(factor))
    before, after = (np.exp(np.interp(m, means, np.log(rates))) for m in (present, present + effect))
    fold = np.where(present + effect > 0, after / before, 0.0)
    return np.where(effect == 0, 1.0, np.minimum(fold, MOST_FOLD))


def changed_counts(
    counts: scipy.sparse.csr_matrix, fold: np.ndarray, share: np.ndarray, rng: np.random.Generator
) -> scipy.sparse.csr_matrix:
    """Counts after a fold change.

    Args:
        counts: (n, G) whole counts of control cells.
        fold: (G,) see `fold_changes`.
        share: (G,) of each gene in all counts of the control cells.
        rng: says which counts are dropped and where some are added.

    Returns:
        (n, G) float32, whole; zeros are not stored.
    """
    kept = counts.sorted_indices()  # with indices of its own
    chance = np.minimum(fold, 1.0)[kept.indices]
    fewer = chance < 1
    kept.data = kept.data.astype(np.float32)
    kept.data[fewer] = rng.binomial(kept.data[fewer].astype(np.int64), chance[fewer])
    higher = np.flatnonzero((fold > 1) & (share > 0))
    depth = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
    added = rng.poisson(np.outer(depth, (fold[higher] - 1) * share[higher]))
    cell, at = np.nonzero(added)
    more = scipy.sparse.csr_matrix((added[cell, at].astype(np.float32), (cell, higher[at])), shape=counts.shape)
    result = scipy.sparse.csr_matrix(kept + more)
    result.eliminate_zeros()
    return result


def counts_of(values: scipy.sparse.csr_matrix, factor: np.ndarray) -> scipy.sparse.csr_matrix:
    """The counts (n, G) that real cells had, float32.

    Args:
        values: (n, G) log1p(count * factor), float32: exact for counts below a million.
        factor: (n,).
    """
    data = np.rint(np.expm1(values.data.astype(np.float64)) / np.repeat(factor, np.diff(values.indptr)))
    return scipy.sparse.csr_matrix((data.astype(np.float32), values.indices, values.indptr), shape=values.shape)


class CountedControls:
    """Control cells of a pool as counts of the output's genes (G,).

    Args:
        pool: with the totals of its cells.
        places: where the output's genes stand among the pool's; None: all, in order.
        target_sum: counts a cell that the pool's values are normalised to.
    """

    def __init__(self, pool: Pool, places: np.ndarray | None, target_sum: float) -> None:
        assert pool.totals is not None
        self._pool, self._places, some = pool, places, pool.totals > 0  # a cell without counts has no values either
        self._factor = np.divide(target_sum, pool.totals, out=np.ones_like(pool.totals), where=some)
        self._typical = float(np.median(self._factor[some]))
        parts = np.array_split(np.arange(len(pool)), -(-len(pool) // ROWS_AT_ONCE))
        sums, stored, self.most = np.zeros(len(pool.moments[0]) if places is None else len(places)), 0, 0.0
        for counts in map(self.counts, parts):
            sums += np.asarray(counts.sum(0, dtype=np.float64)).ravel()
            stored += counts.nnz
            self.most = max(self.most, float(counts.sum(1).max()))  # counts of a cell
        self._share, self.stored_a_cell = sums / max(sums.sum(), 1.0), stored / len(pool)

    def counts(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """(n, G) of the cells `rows`."""
        values = self._pool.whole(rows, self._pool.expression[rows])
        return counts_of(values if self._places is None else values[:, self._places], self._factor[rows])

    def changed(self, rows: np.ndarray, effect: np.ndarray, rng: np.random.Generator) -> scipy.sparse.csr_matrix:
        """(n, G) of the cells `rows` after an effect on the run's genes."""
        fold = fold_changes(self._pool.moments[0], effect, self._typical)
        if self._places is not None:
            n_extra = 0 if self._pool.extra is None else self._pool.extra.shape[1]
            fold = np.concatenate([fold, np.ones(n_extra)])[self._places]
        return changed_counts(self.counts(rows), fold, self._share, rng)


def counted(requests: Sequence[Request], places: np.ndarray | None, target_sum: float) -> dict[int, CountedControls]:
    """The pools of the requests as counts, by their id.

    Raises:
        InputError: control cells without counts.
    """
    pools = {id(request.pool): request.pool for request in requests}
    if without := [pool.cell_type for pool in pools.values() if pool.totals is None]:
        raise InputError(f"The control cells of {without[0]} are log1p values, so there are no counts to write.")
    return {key: CountedControls(pool, places, target_sum) for key, pool in pools.items()}


def count_blocks(
    effects: Iterable[Effect], controls: dict[int, CountedControls], seed: int
) -> Iterator[tuple[Request, np.ndarray, scipy.sparse.csr_matrix]]:
    """What is written, in blocks of cells: of what, from which control cells (n,), and the counts (n, G)."""
    current, rng = None, np.random.default_rng(seed)
    for request, rows, effect in effects:
        if request is not current:
            current, rng = request, random_of(request, seed, COUNTS)
        of_pool = controls[id(request.pool)]
        yield request, rows, of_pool.counts(rows) if effect is None else of_pool.changed(rows, effect, rng)
