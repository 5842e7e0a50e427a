"""The table of effects, recomputed from the file that it belongs to; and files of other scales."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import Demo

from helpers.demo_cells import CONTROL, Predict, rows_of
from helpers.notes import Notes
from sest.config import EvaluateConfig, PredictConfig
from sest.evaluation.evaluate import evaluate
from sest.prediction.effects import COLUMNS, TESTED
from sest.prediction.predict import predict
from sest.progress import reporting


@pytest.fixture(params=["log1p", "counts"])
def written(request: pytest.FixtureRequest, demo: Demo, names: list[str], tmp_path: Path) -> tuple[ad.AnnData, Path]:
    """A prediction in two cell types, and its table."""
    out, table = tmp_path / "p.h5ad", tmp_path / "effects.csv"
    asked = PredictConfig(
        only=tuple(names[:2]), cell_type=("alpha", "beta"), n_cells=40, format=request.param, effects=str(table)
    )
    predict(demo.run, out, asked)
    return ad.read_h5ad(out), table


def log1p_of(cells: ad.AnnData) -> np.ndarray:
    """(n, G) float64, with 10,000 counts a cell where they are counts."""
    values = cells.X.toarray().astype(np.float64)
    return values if "sest" in cells.uns else np.log1p(1e4 * values / values.sum(1, keepdims=True))


def test_every_number_is_that_of_the_cells(written: tuple[ad.AnnData, Path], names: list[str]) -> None:
    cells, file = written
    table, values = pd.read_csv(file), log1p_of(written[0])
    assert list(table.columns)[: len(COLUMNS)] == list(COLUMNS)
    assert len(table) == 2 * 2 * cells.n_vars and not table.duplicated(["cell_type", "perturbation", "gene"]).any()
    for (kind, name), rows in table.groupby(["cell_type", "perturbation"]):
        mine, controls = rows_of(cells, str(name), str(kind)), rows_of(cells, CONTROL, str(kind))
        assert set(rows["n_cells"]) == {40} and set(rows["n_controls"]) == {len(controls)}
        assert rows["gene"].tolist() == list(cells.var_names)
        a, b = values[mine].mean(0), values[controls].mean(0)
        np.testing.assert_allclose(rows["change"], a - b, atol=1e-6)  # float32 values
        fold = (np.expm1(values[mine]).mean(0) + 1e-9) / (np.expm1(values[controls]).mean(0) + 1e-9)
        np.testing.assert_allclose(rows["fold_change"], fold, rtol=1e-5)
        np.testing.assert_allclose(rows["log2_fold_change"], np.log2(fold), atol=1e-4)


@pytest.mark.skipif(find_spec("pdex") is None, reason="pdex is not installed (sest[challenge])")
def test_the_test_is_wilcoxons_rank_sum_and_fdr_is_within_a_perturbation(written: tuple[ad.AnnData, Path]) -> None:
    cells, file = written
    table, values = pd.read_csv(file), log1p_of(written[0])
    near = 1e-6 if "sest" in cells.uns else 1e-2  # normalised counts that are equal in float32 are ties there
    for (kind, name), rows in table.groupby(["cell_type", "perturbation"]):
        mine, controls = rows_of(cells, str(name), str(kind)), rows_of(cells, CONTROL, str(kind))
        found = scipy.stats.mannwhitneyu(values[mine], values[controls], method="asymptotic")
        np.testing.assert_allclose(rows["p_value"], np.nan_to_num(found.pvalue, nan=1.0), rtol=near, atol=1e-12)
        np.testing.assert_allclose(rows["fdr"], scipy.stats.false_discovery_control(rows["p_value"]), rtol=1e-6)


def test_without_pdex_the_table_has_no_tests_and_says_so(
    demo: Demo, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sest.prediction.effects.find_spec", lambda name: None if name == "pdex" else find_spec(name))
    notes = Notes()
    with reporting(notes):
        asked = PredictConfig(only=names[0], cell_type="beta", n_cells=20, effects=str(tmp_path / "e.parquet"))
        predict(demo.run, tmp_path / "p.h5ad", asked)
    table = pd.read_parquet(tmp_path / "e.parquet")
    assert list(table.columns) == list(COLUMNS) and not set(TESTED) & set(table.columns)
    assert any("pip install 'sest[challenge]'" in note for note in notes.notes)


def test_a_table_that_cannot_be_written_is_refused_before_anything(
    refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    asked = {"only": names[0], "cell_type": "beta"}
    assert "must end in .csv or .parquet" in refusal(**asked, effects=str(tmp_path / "e.xlsx"))
    (tmp_path / "e.csv").write_text("mine")
    assert "exists" in refusal(**asked, effects=str(tmp_path / "e.csv"))
    assert (tmp_path / "e.csv").read_text() == "mine"
    submission = {"format": "vcc2026", "controls": "c.h5ad", "effects": str(tmp_path / "f.csv")}
    assert "leaves out" in refusal(**asked, **submission)
    assert "is of log1p values" in refusal(**asked, format="counts", target_sum=5000.0)


def test_counts_are_whole_and_controls_are_the_cells_of_the_file(
    predicted: Predict, real: ad.AnnData, names: list[str], demo: Demo, tmp_path: Path
) -> None:
    cells = predicted(only=names[0], cell_type="beta", n_cells=60, format="counts")
    values = cells.X.toarray()
    assert np.array_equal(values, np.rint(values)) and values.min() >= 0
    controls = rows_of(cells, CONTROL, "beta")
    np.testing.assert_array_equal(values[controls], real[cells.obs_names[controls]].X.toarray())
    scored = evaluate(tmp_path / "out.h5ad", demo.cells, EvaluateConfig(cell_eval=False))
    assert set(scored.summary["mae"]) >= {"model", "controls"}


def test_values_of_another_target_sum_are_those_of_the_same_counts(
    predicted: Predict, values: np.ndarray, real: ad.AnnData, names: list[str]
) -> None:
    asked = {"only": names[0], "cell_type": "beta", "n_cells": 30}
    usual, other = predicted(**asked), predicted(**asked, target_sum=2500.0)
    np.testing.assert_allclose(np.expm1(other.X.toarray()), np.expm1(usual.X.toarray()) / 4, rtol=1e-4, atol=1e-5)
    assert other.uns["sest"]["target_sum"] == pytest.approx(2500) and "baselines" not in other.uns["sest"]
    median = predicted(**asked, target_sum="median")
    controls = real[(real.obs["cell_type"] == "beta") & (real.obs["target_gene"] == CONTROL)]
    expected = float(np.median(np.asarray(controls.X.sum(1))))
    assert median.uns["sest"]["target_sum"] == pytest.approx(expected, rel=1e-5)
