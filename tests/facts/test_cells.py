"""Predicted, real and control cells in one map: which cells, and where they are laid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.caches import GENES
from helpers.pages import SIZES, Trained
from sest.data.dataset import read_dataset
from sest.facts import cells
from sest.facts.cells import CellMap, map_pairs
from sest.facts.pairs import predict_pairs
from sest.facts.run import read_runs
from sest.runs.run_folder import stored_features


def mapped(trained: Trained) -> CellMap:
    run = read_runs([trained.run])[0]
    assert run.checkpoint is not None
    data = read_dataset(run.cache, run.config, stored=stored_features(run.checkpoint), only_controls=True)
    results = predict_pairs(run.checkpoint, run.config, data, 0, torch.device("cpu"))
    assert map_pairs(run.checkpoint, run.config, data, [], torch.device("cpu")) is None
    found = map_pairs(run.checkpoint, run.config, data, results[:1], torch.device("cpu"))
    assert found is not None
    return found


def test_real_cells_lie_on_the_components_of_real_cells_alone(trained: Trained) -> None:
    found, obs = mapped(trained), trained.group.obs
    assert (found.split, found.cell_type) == ("val", "x")  # three val pairs there, one in the other
    counts = trained.group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    here = (obs["cell_type"] == "x").to_numpy()
    rows = [np.flatnonzero(here & (obs["perturbation"] == name).to_numpy()) for name in ("ctrl", *found.perturbations)]
    real = log1p[np.concatenate(rows)]
    centred = real - real.mean(0)
    _, sizes, basis = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ basis[:2].T
    places = np.concatenate([found.controls, *found.real])
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=1e-4)  # float32 values; signs are free
    assert found.explained == pytest.approx(sizes[:2] ** 2 / (sizes**2).sum(), rel=1e-4)
    assert len(GENES) < cells.MOST_GENES


def test_each_pair_has_as_many_predicted_as_real_cells(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found = mapped(trained)
    for name, real, predicted in zip(found.perturbations, found.real, found.predicted, strict=True):
        assert real.shape == predicted.shape == (SIZES[name], 2) and np.isfinite(predicted).all()
    monkeypatch.setattr(cells, "MOST_PAIRS", 2)
    monkeypatch.setattr(cells, "MOST_CELLS", 4)
    monkeypatch.setattr(cells, "MOST_CONTROLS", 5)
    few = mapped(trained)
    assert few.perturbations == found.perturbations[:2] and few.controls.shape == (5, 2)
    assert [len(real) for real in few.real] == [len(predicted) for predicted in few.predicted] == [4, 4]
