"""Baselines made into cells for cell-eval, and what happens where cell-eval cannot score them."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp

from sest.evaluation.cell_eval_scores import (
    CONTROL,
    CellEvalFailed,
    cell_eval_scores,
    cells_with_mean,
    controls_of,
    stack,
)


def some_controls(n: int = 40) -> sp.csr_matrix:
    """Control cells (n, 30): gene 0 silent, gene 1 in one cell, the others in half of the cells at log1p 1 to 4."""
    rng = np.random.default_rng(3)
    values = rng.uniform(1, 4, (n, 30)) * (rng.random((n, 30)) < 0.5)
    values[:, 0] = 0.0
    values[1:, 1] = 0.0
    return sp.csr_matrix(values.astype(np.float32))


@pytest.mark.parametrize("n", [1, 25, 90], ids=["one cell", "fewer than controls", "more"])
def test_stand_in_cells_have_exactly_the_mean_they_stand_for(n: int) -> None:
    controls = some_controls()
    rng = np.random.default_rng(5)
    mean = np.asarray(controls.mean(axis=0)).ravel() * rng.uniform(0, 3, 30)
    mean[0], mean[1], mean[2] = 0.3, 2.0, 0.0  # silent in controls, nearly so, switched off
    made = cells_with_mean(mean, controls, n, rng)
    assert made.shape == (n, 30)
    np.testing.assert_allclose(np.asarray(made.mean(axis=0)).ravel(), mean, atol=1e-5)  # float32
    assert made.data.min() >= 0.0 and made.data.max() <= 14.0


def test_stand_in_cells_of_the_control_mean_are_control_cells() -> None:
    controls = some_controls()
    made = cells_with_mean(np.asarray(controls.mean(axis=0)).ravel(), controls, 40, np.random.default_rng(0))
    as_rows = [{tuple(row) for row in cells.toarray().round(4).tolist()} for cells in (made, controls)]
    assert as_rows[0] == as_rows[1]


def test_a_gene_that_falls_keeps_its_zeros() -> None:
    controls = some_controls()
    made = cells_with_mean(0.5 * np.asarray(controls.mean(axis=0)).ravel(), controls, 40, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(made.getnnz(axis=0)), np.sort(controls.getnnz(axis=0)))


def test_controls_and_tables_are_put_apart_and_together() -> None:
    cells = some_controls(4), np.array(["A", CONTROL, "B", CONTROL])
    rows, names = controls_of(cells)
    assert rows.shape == (2, 30) and set(names) == {CONTROL}
    rows, names = stack([cells, (rows, names)])
    assert rows.shape == (6, 30) and list(names[-2:]) == [CONTROL, CONTROL]


def test_values_that_cell_eval_takes_for_counts_are_not_given_to_it() -> None:
    cells = 5 * some_controls(4), np.array(["A", CONTROL, "B", CONTROL])
    with pytest.raises(CellEvalFailed, match="below 15, and the largest is"):
        cell_eval_scores(cells, {"model": cells}, [f"g{i}" for i in range(30)])


def test_what_cell_eval_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class MetricsEvaluator:
        def __init__(self, **options: object) -> None:
            raise KeyError("no\nsuch column")

    broken = ModuleType("cell_eval")
    broken.MetricsEvaluator = MetricsEvaluator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cell_eval", broken)
    cells = some_controls(4), np.array(["A", CONTROL, "B", CONTROL])
    with pytest.raises(CellEvalFailed) as failed:
        cell_eval_scores(cells, {"model": cells}, [f"g{i}" for i in range(30)])
    assert str(failed.value).startswith("KeyError: ") and "\n" not in str(failed.value)
