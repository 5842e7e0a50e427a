"""Which control cells a prediction starts from, and which are written: a function of the seed and of what is asked."""

from __future__ import annotations

import hashlib

import numpy as np

from sest.prediction.requests import Request

_SETS, _CONTROLS, MOVES, COUNTS = 5, 6, 12, 13  # what a random stream is for


def draw_sets(request: Request, set_size: int, seed: int) -> np.ndarray:
    """Sets of control cells to predict from, as in training: (sets, S) rows of the pool, a set within one file."""
    files, rng = request.pool.files, random_of(request, seed)
    sets = []
    for _ in range(-(-request.n_cells // set_size)):
        of_file = np.flatnonzero(files == files[rng.integers(len(files))])
        sets.append(rng.choice(of_file, set_size, replace=len(of_file) < set_size))
    return np.stack(sets)


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
