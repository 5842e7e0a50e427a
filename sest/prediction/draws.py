"""Which control cells a prediction starts from, and which are written: a function of the seed and of what is asked.

A draw is what is predicted together: a head sees all cells of a set, and the sets of a draw are moved to one mean.
Draws of a request know nothing of each other, so that cells of different draws are as far apart as independent ones.
Shapes: S cells a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sest.prediction.requests import Request

_SETS, _CONTROLS, MOVES, COUNTS = 5, 6, 12, 13  # what a random stream is for


LEAST_CELLS = 8  # of a draw, where there are several: fewer cannot be moved to a mean and still look like cells


@dataclass(frozen=True, eq=False)
class Draw:
    """Control cells to predict from, as in training."""

    sets: np.ndarray  # (sets, S) rows of the pool, a set within one file
    n_cells: int  # that are written, the first of these


def draws_of(request: Request, set_size: int, most_sets: int, seed: int) -> Iterator[Draw]:
    """Two draws of a request or more, of equal size and at most `most_sets`; one where it has too few cells for two."""
    files, rng = request.pool.files, random_of(request, seed)
    n_draws = max(-(-request.n_cells // (most_sets * set_size)), min(2, request.n_cells // LEAST_CELLS), 1)
    for n_cells in np.diff(np.arange(n_draws + 1) * request.n_cells // n_draws).tolist():
        sets = []
        for _ in range(-(-n_cells // set_size)):
            of_file = np.flatnonzero(files == files[rng.integers(len(files))])
            sets.append(rng.choice(of_file, set_size, replace=len(of_file) < set_size))
        yield Draw(np.stack(sets), n_cells)


def control_rows(request: Request, seed: int) -> np.ndarray:
    """Which cells of the pool are written for real controls (n,): all, or as many as the template has."""
    n_pool = len(request.pool)
    if request.n_cells == n_pool:
        return np.arange(n_pool)
    return np.sort(random_of(request, seed).choice(n_pool, request.n_cells, replace=request.n_cells > n_pool))


def random_of(request: Request, seed: int, stream: int | None = None) -> np.random.Generator:
    """Randomness of a request depends on the seed and on what is asked, not on its place among others.

    `stream`: MOVES, of moving its cells; COUNTS, of rounding their counts; None: of choosing them.
    """
    name = hashlib.sha256(f"{request.pool.cell_type}\n{request.perturbation}".encode()).digest()
    if stream is None:
        stream = _CONTROLS if request.is_control else _SETS
    return np.random.default_rng([seed, stream, int.from_bytes(name[:8], "little")])
