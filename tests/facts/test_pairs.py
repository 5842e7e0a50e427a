"""Held-out pairs as a checkpoint predicts them, and their scores beside every baseline's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.pages import CELL_TYPE, HOSTILE, SIZES, Trained
from sest.baselines.effects import BASELINES
from sest.cells.split_file import VAL
from sest.data.dataset import read_dataset
from sest.evaluation.pairs import held_out, predicted_means
from sest.facts import pairs
from sest.facts.pairs import PairResults, predict_pairs
from sest.facts.run import read_runs
from sest.runs.checkpoint import Checkpoint
from sest.runs.run_folder import stored_features
from sest.training.train import train


def predicted(folder: Path, n_sets: int = 0) -> list[PairResults]:
    """The pairs of a run; n_sets 0: from every cell."""
    run = read_runs([folder])[0]
    assert run.checkpoint is not None
    data = read_dataset(run.cache, run.config, stored=stored_features(run.checkpoint), only_controls=True)
    return predict_pairs(run.checkpoint, run.config, data, n_sets, torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(trained: Trained) -> list[PairResults]:
    return predicted(trained.run)


def test_pairs_of_both_splits_are_predicted(whole: list[PairResults]) -> None:
    val, test = whole
    assert (val.split, test.split) == ("val", "test")
    assert sorted(zip(val.perturbations, val.cell_types, strict=True)) == [
        (HOSTILE, "x"),
        ("P", "x"),
        ("S", CELL_TYPE),
        ("T", "x"),
    ]
    assert (test.perturbations, test.cell_types, test.n_cells.tolist()) == (["Q"], ["x"], [SIZES["Q"]])


def test_scores_average_to_the_validation_of_that_checkpoint(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = read_runs([trained.run])[0].checkpoint
    assert checkpoint is not None and checkpoint.has_blend
    for part in ("head", "stack"):  # of what is blended, each alone; batches of another size
        blend = checkpoint.blend()
        means = {name: float(name == part) for name in blend.weights.means}
        alone = replace(blend, weights=replace(blend.weights, means=means))
        monkeypatch.setattr(Checkpoint, "blend", lambda _, alone=alone: alone)
        scores = predicted(trained.run)[0].scores
        for predictor in ("model", *BASELINES):
            of = f"_{part}" if predictor == "model" else f"_{predictor}"
            rows = scores[scores["predictor"] == predictor]
            for name in ("pearson_delta", "mae", "pds"):
                values = rows[name].dropna() if name == "pds" else rows[name]  # one pair has no pds
                expected = trained.best[f"{name}{of}".removesuffix("_head")]
                assert values.mean() == pytest.approx(expected, rel=1e-5), (part, predictor, name)


def test_parts_of_no_weight_are_not_predicted(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    blend = read_runs([trained.run])[0].checkpoint.blend()  # type: ignore[union-attr]
    counted = list[int]()

    def counting(*given: Any, **options: Any) -> np.ndarray:
        counted.append(1)
        return predicted_means(*given, **options)

    monkeypatch.setattr(pairs, "predicted_means", counting)
    for means, passes in (({"stack": 1.0}, 0), ({"head": 0.5}, 1), ({"anchored": 0.5}, 2)):
        weights = dict.fromkeys(blend.weights.means, 0.0) | means
        alone = replace(blend, weights=replace(blend.weights, means=weights))
        monkeypatch.setattr(Checkpoint, "blend", lambda _, alone=alone: alone)
        counted.clear()
        predicted(trained.run)
        assert len(counted) == passes * 2, means  # of two splits


def test_effects_are_those_of_the_raw_counts(trained: Trained, whole: list[PairResults]) -> None:
    counts = trained.group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    obs = trained.group.obs
    for result in whole:
        for k, (name, cell_type) in enumerate(zip(result.perturbations, result.cell_types, strict=True)):
            of = (obs["cell_type"] == cell_type).to_numpy()
            mine, control = (of & (obs["perturbation"] == label).to_numpy() for label in (name, "ctrl"))
            change = log1p[mine].mean(0) - log1p[control].mean(0)
            assert result.observed[k] == pytest.approx(change, rel=1e-5, abs=1e-6)  # float32 log1p
            assert result.effect[k] == pytest.approx(np.linalg.norm(change), rel=1e-5)


def test_a_limit_on_sets_is_kept_for_each_split(trained: Trained, tmp_path: Path) -> None:
    results = predicted(trained.run, n_sets=5)
    # val: 8, 7, 9 and 6 cells in sets of 4; 2 + 2 + 3 + 2 sets; test: 5 cells, 2 sets
    assert [(r.n_sets, r.of_sets) for r in results] == [(5, 9), (2, 2)]


def test_cell_types_of_several_datasets_are_named_with_theirs(tmp_path: Path) -> None:
    groups = [small_screen(path, sizes={"P": 4, "Q": 4}, cell_types=("x",), seed=i) for i, path in enumerate("ab")]
    train(write_cache(tmp_path / "s.zarr", groups), tmp_path / "run", small_config(max_steps=4, val_fraction=0.5))
    assert set(predicted(tmp_path / "run")[0].cell_types) <= {"a/x", "b/x"}


def test_pairs_of_which_nothing_can_be_learned_are_counted(
    trained: Trained, whole: list[PairResults], tmp_path: Path
) -> None:
    train(trained.cache, tmp_path / "run", small_config(max_steps=1, val_contexts="all"))
    result = predicted(tmp_path / "run")[0]
    assert result.n_not_learned == len(result.perturbations) > 0
    assert whole[0].n_not_learned == 0


def test_the_size_of_an_effect_is_less_the_noise_of_finite_cells(trained: Trained, whole: list[PairResults]) -> None:
    counts = trained.group.matrix.toarray().astype(float)
    log1p, obs = np.log1p(1e4 * counts / counts.sum(1, keepdims=True)), trained.group.obs
    test = whole[1]  # Q in x: 5 cells, 12 controls
    controls = log1p[((obs["cell_type"] == "x") & (obs["perturbation"] == "ctrl")).to_numpy()]
    noise = (controls.var(0) * (1 / 5 + 1 / 12)).sum()
    assert (test.noise(np.array([0])) ** 2).sum() == pytest.approx(noise, rel=1e-4)  # float32
    expected = np.sqrt(max(test.effect[0] ** 2 - noise, 0.0))
    assert test.sizes[0, 0] == pytest.approx(expected, rel=1e-4)
    assert test.sizes[1, 0] == pytest.approx(np.linalg.norm(test.predicted[0]), rel=1e-6)
    assert test.sizes[2, 0] == pytest.approx(np.linalg.norm(test.of_stack[0]), rel=1e-6)


def test_of_many_pairs_of_a_cell_type_some_are_ranked(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MOST_RANKED", 2)
    scores = predicted(trained.run)[0].scores
    mine = scores[(scores["predictor"] == "model") & (scores["cell_type"] == "x")]
    assert len(mine) == 3 and int(mine["pds"].notna().sum()) == 2


def test_sets_of_a_limited_report_share_controls_and_nothing_else_changes(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many draws of controls as sets, the values are those of sets with controls of their own."""
    run = read_runs([trained.run])[0]
    data = read_dataset(run.cache, run.config, only_controls=True)
    held = held_out(data, run.config, VAL, 5)
    context = data.labels.context[held.sets["targets"][:, 0]]
    monkeypatch.setattr(pairs, "CONTROL_SETS", 2)
    few = pairs._with_few_controls(data, held)
    for code in np.unique(context):
        mine = np.flatnonzero(context == code)
        assert len(np.unique(few.sets["controls"][mine], axis=0)) == min(2, len(mine))
    np.testing.assert_array_equal(few.sets["targets"], held.sets["targets"])

    blend = run.checkpoint.blend()  # type: ignore[union-attr]
    weights = replace(blend.weights, means={"stack": 0.5, "head": 0.2, "anchored": 0.3})
    monkeypatch.setattr(Checkpoint, "blend", lambda _: replace(blend, weights=weights))
    shared = predicted(trained.run, n_sets=5)[0]
    monkeypatch.setattr(pairs, "CONTROL_SETS", 100)
    apart = predicted(trained.run, n_sets=5)[0]
    assert shared.shares_controls and not predicted(trained.run)[0].shares_controls
    assert not np.array_equal(shared.predicted, apart.predicted)
    monkeypatch.setattr(pairs, "_with_few_controls", lambda _, held: held)
    np.testing.assert_array_equal(apart.predicted, predicted(trained.run, n_sets=5)[0].predicted)
