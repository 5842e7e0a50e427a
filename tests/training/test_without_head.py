"""A run without a head: fitted at once, and predicted, evaluated and reported like any run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.baselines.effects import BASELINES
from sest.config import PredictConfig
from sest.describe import describe
from sest.errors import InputError
from sest.prediction.predict import predict_cells
from sest.report.write import write_report
from sest.runs.checkpoint import open_checkpoint
from sest.runs.curves import METRICS
from sest.runs.run_folder import METRICS as FILE
from sest.training.train import TrainResult, train

SPLITS = '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q", "T"]\ntest = ["P", "S"]\n'


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("no_head")
    write_cache(folder / "cache.zarr", [small_screen("d", n_controls=30)])
    (folder / "s.toml").write_text(SPLITS)
    config = small_config(splits=str(folder / "s.toml"), head="none")
    return folder, train(folder / "cache.zarr", folder / "run", config)


def test_it_is_validated_and_kept_at_once(fitted: tuple[Path, TrainResult]) -> None:
    folder, result = fitted
    (line,) = [json.loads(line) for line in (folder / "run" / FILE).read_text().splitlines()]
    assert line["step"] == 0 and all(line[metric] == line[f"{metric}_stack"] for metric in METRICS)
    assert {f"mae_{name}" for name in BASELINES} <= set(line)
    best = open_checkpoint(folder / "run" / "best")
    assert not best.has_head and best.has_blend and set(best.blend().weights.means) == {"stack"}
    assert (result.reason, result.step, result.n_parameters) == ("no_head", 0, 0)
    with pytest.raises(InputError, match="without a head"):
        best.model()
    facts, damaged = describe(folder / "run", verify=True)
    assert (facts["kind"], facts["step"], facts["trainable_parameters"], damaged) == ("run", 0, 0, [])


def test_it_predicts_control_cells_moved_to_the_mean_of_the_stack(fitted: tuple[Path, TrainResult]) -> None:
    folder, _ = fitted
    cells = predict_cells(folder / "run")
    assert dict(cells.obs["gene"].value_counts()) == {"P": 8, "S": 6, "ctrl": 30}
    told, weight = cells.uns["sest"], open_checkpoint(folder / "run" / "best").blend().weights.means["stack"]
    control = np.asarray(cells[cells.obs["gene"] == "ctrl"].X.mean(0, dtype=np.float64)).ravel()
    for i, name in enumerate(told["pairs"]["perturbation"]):
        mean = np.asarray(cells[cells.obs["gene"] == name].X.mean(0, dtype=np.float64)).ravel()
        stacked = told["baselines"]["stack"][i]
        inside = stacked > 0  # elsewhere the stack's effect was cut
        np.testing.assert_allclose(mean[inside], (control + weight * (stacked - control))[inside], atol=1e-5)


def test_its_report_shows_the_stack(fitted: tuple[Path, TrainResult], tmp_path: Path) -> None:
    folder, _ = fitted
    written = write_report(folder / "run", tmp_path / "r.html")
    text = written.path.read_text()
    assert "Stack of baselines" in text and "State Transition head" not in text and written.notes == []


def test_it_is_not_resumed_and_never_written_over(fitted: tuple[Path, TrainResult]) -> None:
    folder, _ = fitted
    config = small_config(splits=str(folder / "s.toml"), head="none")
    with pytest.raises(InputError, match="nothing to resume"):
        train(folder / "cache.zarr", folder / "run", config, resume="auto")
    with pytest.raises(InputError, match="exists"):
        train(folder / "cache.zarr", folder / "run", config)


def test_controls_alone_and_the_head_that_is_not_there(fitted: tuple[Path, TrainResult]) -> None:
    folder, _ = fitted
    asked: dict[str, Any] = {"cell_type": "x", "only": "P", "n_cells": 5}
    nothing = predict_cells(folder / "run", config=PredictConfig(**asked, blend="controls"))
    assert isinstance(nothing, ad.AnnData)
    with pytest.raises(InputError, match="without a head"):
        predict_cells(folder / "run", config=PredictConfig(**asked, blend="head"))
