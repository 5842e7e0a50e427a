"""Which control cells a prediction starts from and which are written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from sest.prediction.controls import Pool
from sest.prediction.draws import LEAST_CELLS, Draw, control_rows, draws_of
from sest.prediction.requests import Request


def pool(n: int, files: list[int] | None = None) -> Pool:
    names = np.array([f"c{i}" for i in range(n)])
    of_file = np.array(files or [0] * n)
    return Pool("x", np.zeros((n, 2), np.float16), sp.csr_matrix((n, 3), dtype=np.float32), names, names, of_file)


def draws(request: Request, seed: int = 0, set_size: int = 8, most_sets: int = 16) -> list[Draw]:
    return list(draws_of(request, set_size, most_sets, seed))


def sets_of(request: Request, seed: int = 0) -> np.ndarray:
    return np.concatenate([draw.sets for draw in draws(request, seed)])


def test_a_set_never_mixes_files_and_repeats_cells_only_where_a_file_has_too_few() -> None:
    files = [0] * 7 + [1] * 9
    sets = sets_of(Request(pool(16, files), "A", False, 90))
    assert sets.shape == (12, 8)
    of_set = np.array(files)[sets]
    assert (of_set == of_set[:, :1]).all() and set(of_set[:, 0]) == {0, 1}
    for row, file in zip(sets.tolist(), of_set[:, 0].tolist(), strict=True):
        assert len(set(row)) == 8 if file == 1 else len(set(row)) <= 7


@pytest.mark.parametrize(("n_cells", "distinct"), [(10, 10), (4, 4), (25, 10)])
def test_control_rows_are_all_of_the_pool_or_a_draw(n_cells: int, distinct: int) -> None:
    rows = control_rows(Request(pool(10), "ctrl", True, n_cells), seed=0)
    assert len(rows) == n_cells and (np.diff(rows) >= 0).all()
    assert len(set(rows.tolist())) <= distinct and (n_cells > 10 or len(set(rows.tolist())) == distinct)


def test_which_control_cells_are_drawn_depends_on_the_seed() -> None:
    asked, written = Request(pool(40), "A", False, 16), Request(pool(40), "ctrl", True, 12)
    for draw in (lambda seed: sets_of(asked, seed), lambda seed: control_rows(written, seed)):
        sets = [np.sort(draw(seed), axis=-1).tolist() for seed in (0, 0, 1, 2)]
        assert sets[0] == sets[1]
        assert sets[0] != sets[2] != sets[3] != sets[0]


def test_draws_depend_on_what_is_asked_and_not_on_its_place_or_number() -> None:
    """Twice as many cells begin with the same sets; another perturbation or cell type has others."""
    cells = pool(40)
    few, many = (sets_of(Request(cells, "A", False, n), 3) for n in (16, 32))
    np.testing.assert_array_equal(few, many[:2])
    others = [Request(cells, "B", False, 16), Request(replace(cells, cell_type="y"), "A", False, 16)]
    for other in others:
        assert not np.array_equal(few, sets_of(other, 3))
    real = control_rows(Request(cells, "A", True, 8), seed=3)  # real controls have a stream of their own
    assert not np.array_equal(real, np.sort(few[0]))


@pytest.mark.parametrize(("n_cells", "expected"), [(1, 1), (15, 1), (16, 2), (17, 2), (256, 2), (257, 3), (1000, 8)])
def test_a_request_has_two_draws_of_equal_size_where_it_has_the_cells(n_cells: int, expected: int) -> None:
    found = draws(Request(pool(200), "A", False, n_cells))
    sizes = [draw.n_cells for draw in found]
    assert len(found) == expected and sum(sizes) == n_cells and max(sizes) - min(sizes) <= 1
    assert n_cells < 2 * LEAST_CELLS or min(sizes) >= LEAST_CELLS
    for draw in found:
        assert draw.sets.size - 8 < draw.n_cells <= draw.sets.size <= 128
