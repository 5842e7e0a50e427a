"""Move cells to another mean, exactly, so that they still look like cells: zeros stay zeros where they can.

Shapes: n cells, G genes. Space: log1p, not below zero.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from sest.cells.scale import LARGEST_PREDICTED_LOG1P


def move_to_mean(
    cells: np.ndarray,
    mean: np.ndarray,
    donors: np.ndarray,
    rng: np.random.Generator,
    *,
    present: np.ndarray | None = None,
    beside: int = 0,
) -> np.ndarray:
    """Cells (n, G) whose mean is `mean` (G,), gene by gene, by switching values off and on.

    A gene that is to be lower is switched off in some of the cells, drawn, each with probability 1 - mean / its mean;
    one that is to be higher is switched on in some of those where it is zero, with a value that it has elsewhere. What
    is left to the exact mean, little, is made up for by one factor on the gene's values. So the share of zeros moves
    with the mean, as it does in counts, where a factor alone would keep it and a shift would leave none.

    Args:
        donors: (m, G) cells whose values above zero a gene takes that is zero in all of `cells`. Where it is zero in
            these too, as few cells as can have it at values of 1 or less.
        present: (G,) mean that the cells have now, where they are a sample of more cells that are moved together.
        beside: so many others of these, which are not made: the mean is that of all, so that a sample of 64 of 300
            scatters around it as such samples do.

    Returns:
        (n, G) float32 within [0, 14]; the mean is that asked for to float32 rounding, where it is within that range
        and there are no others.
    """
    x, wanted = cells.astype(np.float32), np.clip(mean, 0.0, LARGEST_PREDICTED_LOG1P)
    now = x.mean(0, dtype=np.float64) if present is None else present
    lower, higher = np.flatnonzero(wanted < now), np.flatnonzero(wanted > now)
    keep = rng.random((len(x), len(lower)), np.float32) < (wanted[lower] / now[lower]).astype(np.float32)
    x[:, lower] *= keep
    x[:, higher] = _switched_on(x[:, higher], wanted[higher] - now[higher], donors[:, higher], rng)
    if beside:
        total = x.sum(0, dtype=np.float64) + beside * wanted  # the others have the mean that was asked for, about
        x *= np.divide(wanted * (len(x) + beside), total, out=np.ones(len(total)), where=total > 0).astype(np.float32)
        return np.minimum(x, np.float32(LARGEST_PREDICTED_LOG1P))
    return _scaled_to(x, wanted, rng)


def _switched_on(x: np.ndarray, missing: np.ndarray, donors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same (n, G) with some zeros switched on, so that the means rise by about `missing` (G,) where they can."""
    own = scipy.sparse.csc_array(x)
    counts = np.diff(own.indptr)
    without = np.flatnonzero(counts == 0)  # these take the values of the donors
    others = scipy.sparse.csc_array(donors[:, without])
    values = np.concatenate([own.data, others.data])
    first, n_values, sums = own.indptr[:-1].copy(), counts, np.asarray(own.sum(0), np.float64)
    first[without], n_values[without] = own.nnz + others.indptr[:-1], np.diff(others.indptr)
    sums[without] = others.sum(0)
    average = np.divide(sums, n_values, out=np.zeros(len(missing)), where=n_values > 0)
    room = average * (x == 0).sum(0)  # what switching all zeros on would add to the sum
    chance = np.divide(missing * len(x), room, out=np.zeros(len(missing)), where=room > 0)
    cell, gene = np.nonzero((rng.random(x.shape, np.float32) < chance) & (x == 0))
    x[cell, gene] = values[first[gene] + (rng.random(len(gene)) * n_values[gene]).astype(np.int64)]
    return x


def _scaled_to(x: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same with every gene's values times one factor, so that the means are exact; cut at the largest value."""
    now = x.mean(0, dtype=np.float64)
    for gene in np.flatnonzero((now == 0) & (wanted > 0)):  # no cell has it, or chance has left none
        n = min(int(np.ceil(wanted[gene] * len(x))), len(x))
        x[rng.choice(len(x), n, replace=False), gene] = np.float32(wanted[gene] * len(x) / n)
        now[gene] = wanted[gene]
    x *= np.where(now > 0, wanted / np.where(now > 0, now, 1.0), 1.0).astype(np.float32)
    for gene in np.flatnonzero((x > LARGEST_PREDICTED_LOG1P).any(0)):
        x[:, gene] = _filled_up(x[:, gene].astype(np.float64), float(wanted[gene]))
    return x


def _filled_up(values: np.ndarray, wanted: float) -> np.ndarray:
    """Values (n,) cut at the largest; what that takes is given to the others, in parts of the room they have."""
    room = LARGEST_PREDICTED_LOG1P - np.minimum(values, LARGEST_PREDICTED_LOG1P)
    for cells in (values > 0, np.ones(len(values), bool)):  # cells without the gene only where the others are full
        values = np.minimum(values, LARGEST_PREDICTED_LOG1P)
        missing, there = wanted * len(values) - values.sum(), float((room * cells).sum())
        if missing > 0 and there > 0:
            values = values + room * cells * min(missing / there, 1.0)
        room = LARGEST_PREDICTED_LOG1P - values
    return values
