"""What a prediction stores for its evaluation: the baselines, and the scale it is in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import Demo

from helpers.demo_cells import CONTROL, SMALL, Predict, rows_of
from sest.baselines.effects import BASELINES
from sest.cells.columns import Columns
from sest.config import EmbedConfig, EvaluateConfig, PredictConfig, TrainConfig
from sest.data.dataset import Dataset
from sest.embedding.embed import embed
from sest.evaluation.evaluate import evaluate
from sest.evaluation.record import DRAW, SOURCE
from sest.prediction.controls import CachedPools
from sest.prediction.predict import predict_cells
from sest.prediction.record import labels_of
from sest.prediction.requests import Request
from sest.training.train import train


def effects(
    real: ad.AnnData, values: np.ndarray, held_out: dict[str, list[str]], names: list[str]
) -> dict[str, np.ndarray]:
    """What each perturbation does in training, on average over the cell types it is trained in."""
    unseen = {*held_out["val"], *held_out["test"]}
    found = {}
    for name in names:
        of_type = [
            values[rows_of(real, name, cell_type)].mean(0) - values[rows_of(real, CONTROL, cell_type)].mean(0)
            for cell_type in ("alpha", "beta")
            if (cell_type, name) not in {("beta", x) for x in unseen}
        ]
        found[name] = np.mean(of_type, axis=0)
    return found


def test_written_rows_are_labelled_by_template_or_by_their_controls(tiny_data: Dataset) -> None:
    pool = CachedPools(tiny_data)["x"]
    columns = Columns("gene", "kind", "plate", "ctrl", ())
    real, draws = [np.array([4, 0])], [np.array([2, 1]), np.array([3])]
    given = pd.DataFrame({"any": [1, 2, 3]}, index=["a", "b", "c"])
    controls, cells = Request(pool, "ctrl", True, 2), Request(pool, "P", False, 3)
    table = labels_of([(controls, real), (cells, draws), (cells, draws)], columns)
    assert list(table.columns) == ["gene", "kind", "plate", DRAW, SOURCE] and table.index.is_unique
    assert table[DRAW].tolist() == [-1, -1, 0, 0, 1, 2, 2, 3]  # counted on, as of a pair in two files
    assert table[SOURCE].tolist() == [-1, -1, *[2, 1, 3] * 2]
    assert table.index[:5].tolist() == [*pool.names[real[0]], "x_P_0", "x_P_1", "x_P_2"]
    assert table["plate"].tolist() == [*pool.batches[real[0]], *[*pool.batches[np.concatenate(draws)]] * 2]
    assert table["gene"].tolist() == ["ctrl", "ctrl", *["P"] * 6] and set(table["kind"]) == {"x"}
    assert list(table["gene"].cat.categories) == ["P", "ctrl"]
    table = labels_of([(replace(cells, obs=given), draws)], columns)
    assert table.index.tolist() == ["a", "b", "c"] and list(table.columns) == ["any", DRAW, SOURCE]
    assert table[DRAW].tolist() == [0, 0, 1] and list(given.columns) == ["any"]


def test_a_prediction_says_which_cells_were_predicted_together_and_how_far_they_follow_the_controls(
    whole: ad.AnnData,
) -> None:
    told = whole.obs[whole.uns["sest"]["columns"]["perturbation"]]
    is_control = told == whole.uns["sest"]["columns"]["control"]
    assert (whole.obs.loc[is_control, DRAW] == -1).all()
    for _, draws in whole.obs.loc[~is_control, DRAW].groupby([whole.obs["cell_type"], told], observed=True):
        assert sorted(set(draws)) == [0, 1] and abs(draws.mean() - 0.5) < 0.01
    assert -1 < float(whole.uns["sest"]["follows_controls"]) < 2


@pytest.mark.parametrize("of_template", [False, True])
def test_a_stored_baseline_has_its_learned_effect_around_all_controls(
    predicted: Predict,
    template: ad.AnnData,
    whole: ad.AnnData,
    real: ad.AnnData,
    values: np.ndarray,
    held_out: dict[str, list[str]],
    names: list[str],
    tmp_path: Path,
    of_template: bool,
) -> None:
    """`sest evaluate` subtracts these means again: of all 80, also where a template asks for 12."""
    cells = predicted(template=str(tmp_path / "template.h5ad")) if of_template else whole
    told, learned = cells.uns["sest"], effects(real, values, held_out, names)
    pairs = list(zip(*(told["pairs"][key] for key in ("cell_type", "perturbation")), strict=True))
    assert len(pairs) == (4 if of_template else 3)
    for i, (cell_type, name) in enumerate(pairs):
        control = values[rows_of(real, CONTROL, cell_type)].mean(0)
        stored = told["controls"]["mean"][list(told["controls"]["cell_type"]).index(cell_type)]
        np.testing.assert_allclose(stored, control, atol=1e-6)
        expected = np.maximum(control + learned[name], 0)
        np.testing.assert_allclose(told["baselines"]["perturbation_mean"][i], expected, atol=1e-5)  # float32


def test_evaluate_scores_the_stored_baselines(
    demo: Demo, real: ad.AnnData, values: np.ndarray, held_out: dict[str, list[str]], names: list[str]
) -> None:
    summary, learned = demo.evaluation.summary, effects(real, values, held_out, names)
    assert list(summary["mae"]) == ["model", *BASELINES, "real_half"]
    control = values[rows_of(real, CONTROL, "beta")].mean(0)
    errors = [
        np.abs(np.maximum(control + learned[name], 0) - values[rows_of(real, name, "beta")].mean(0)).mean()
        for name in held_out["test"]
    ]
    assert summary["mae"]["perturbation_mean"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert summary["pearson_delta"]["controls"] == 0.0


def test_another_seed_writes_other_controls_for_a_template_and_scores_stay(
    predicted: Predict, template: ad.AnnData, demo: Demo, tmp_path: Path
) -> None:
    """Effects are from all controls, whichever are written: those of the model and of the baselines alike."""
    written, scores = [], []
    for seed in (0, 1):
        cells = predicted(template=str(tmp_path / "template.h5ad"), seed=seed, blend="stack")
        written.append(cells[cells.obs["gene"] == "ctrl"].X.toarray())
        cells.write_h5ad(tmp_path / "cells.h5ad")
        scores.append(evaluate(tmp_path / "cells.h5ad", demo.cells, EvaluateConfig(cell_eval=False)).summary)
    assert written[0].shape == written[1].shape and (written[0] != written[1]).any()
    for metric in ("pearson_delta", "mae"):
        for one in scores:
            assert one[metric]["model"] == pytest.approx(one[metric]["stack"], abs=1e-5)
        assert scores[0][metric] == pytest.approx(scores[1][metric], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(("total", "scale"), [(1e4, "counts"), (1e6, "mixed")])
def test_a_run_on_counts_and_log1p_says_mixed_unless_their_totals_agree(
    real: ad.AnnData, names: list[str], tmp_path: Path, total: float, scale: str
) -> None:
    real.write_h5ad(tmp_path / "a.h5ad")
    logged, counts = real.copy(), real.X.toarray().astype(np.float64)
    logged.X = sp.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * total).astype(np.float32))
    logged.write_h5ad(tmp_path / "b.h5ad")
    allowed = "allow" if scale == "mixed" else "refuse"
    config = EmbedConfig(encoder="pca", dim=8, device="cpu", mixed_scales=allowed)
    embed([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "c.zarr", config)
    train(tmp_path / "c.zarr", tmp_path / "run", TrainConfig(**SMALL, mixed_scales=allowed))
    asked = PredictConfig(only=names[0], cell_type="alpha", n_cells=4, device="cpu")
    assert predict_cells(str(tmp_path / "run"), config=asked).uns["sest"]["scale"] == scale
