"""The cells of a prediction: which parts count, means that are exact, and averages of several runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import Predict
from helpers.notes import Notes
from sest.blend.blend import Blend
from sest.blend.weights import Weights
from sest.config import PredictConfig
from sest.errors import InputError
from sest.head.model import StateTransition
from sest.prediction.cells import Followed
from sest.prediction.predict import predict, predict_cells
from sest.progress import reporting
from sest.runs.checkpoint import add_blend, open_checkpoint, save_checkpoint
from sest.training.train import train

SPLITS = '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q"]\ntest = ["P", "S"]\n'
ASKED: dict[str, Any] = {"cell_type": "x", "only": "P", "n_cells": 9}  # cut from three sets of 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache and two runs on it that differ in their seed."""
    folder = tmp_path_factory.mktemp("cells")
    write_cache(folder / "cache.zarr", [small_screen("d", n_controls=30)])
    (folder / "s.toml").write_text(SPLITS)
    for seed in (0, 1):
        config = small_config(splits=str(folder / "s.toml"), seed=seed, max_steps=40, val_every=40)
        train(folder / "cache.zarr", folder / "run" / f"seed-{seed}", config)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy of the first run."""
    return Path(shutil.copytree(folder / "run" / "seed-0", tmp_path / "run"))


def mean_of(cells: ad.AnnData, name: str = "P") -> np.ndarray:
    return np.asarray(cells[cells.obs["gene"] == name].X.mean(0, dtype=np.float64)).ravel()


def control_of(cells: ad.AnnData) -> np.ndarray:
    return mean_of(cells, "ctrl")


def set_weights(run: Path, **weights: float) -> Blend:
    """Give the run's best/ a blend of other weights."""
    best = open_checkpoint(run / "best")
    means = {"stack": 0.0, "head": 0.0, "anchored": 0.0} | weights
    blend = Blend(best.blend().baselines, Weights(means, dict.fromkeys(means, 0.0), 1))
    add_blend(best.folder, blend)
    return blend


def test_heads_predict_in_tf32_where_that_is_asked_for_and_nothing_after_them_does(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which passes for a GPU, the numbers stay those of float32."""
    products, forward = torch.backends.cuda.matmul, StateTransition.forward
    before, seen = products.fp32_precision, list[str]()

    def noted(self: StateTransition, *given: Any) -> torch.Tensor:
        seen.append(products.fp32_precision)
        return forward(self, *given)

    monkeypatch.setattr(StateTransition, "forward", noted)
    monkeypatch.setattr("sest.prediction.predict.choose_precision", lambda name, device, training: name)
    exact, tf32 = (
        predict_cells(run, config=PredictConfig(blend="head", precision=precision, **ASKED))
        for precision in ("fp32", "tf32")
    )
    half = len(seen) // 2
    assert seen == half * [before] + half * ["tf32"] and half and products.fp32_precision == before != "tf32"
    np.testing.assert_array_equal(exact.X.toarray(), tf32.X.toarray())


def test_cells_have_the_mean_that_the_weights_say(run: Path) -> None:
    whole: dict[str, Any] = {
        "only": "P",
        "cell_type": "x",
        "n_cells": 12,
    }  # three whole sets, so that the head's mean is theirs
    alone = {name: predict_cells(run, config=PredictConfig(**whole, blend=name)) for name in ("head", "stack")}
    control = control_of(alone["head"])
    effects = {name: mean_of(cells) - control for name, cells in alone.items()}
    set_weights(run, stack=0.5, head=0.3)
    cells = predict_cells(run, config=PredictConfig(**whole))
    expected = np.maximum(control + 0.5 * effects["stack"] + 0.3 * effects["head"], 0)
    # the stack's cells stand at max(controls + effect, 0), so that where it is cut its effect is not known from them
    known = control + effects["stack"] > 0.01
    np.testing.assert_allclose(mean_of(cells)[known], expected[known], atol=1e-5)
    told = cells.uns["sest"]["blend"]
    assert {name: pytest.approx(told[name]) for name in told} == {
        "stack": 0.5, "head": 0.3, "anchored": 0.0, "controls": 0.2
    }  # fmt: skip


def test_the_stack_alone_is_the_baseline_of_that_name_and_controls_alone_are_controls(run: Path) -> None:
    stack = predict_cells(run, config=PredictConfig(**ASKED, blend="stack"))
    np.testing.assert_allclose(mean_of(stack), stack.uns["sest"]["baselines"]["stack"][0], atol=1e-5)
    nothing = predict_cells(run, config=PredictConfig(**ASKED, blend="controls"))
    np.testing.assert_allclose(mean_of(nothing), control_of(nothing), atol=1e-5)


def test_an_anchored_head_is_held_against_what_it_predicts_for_controls(run: Path) -> None:
    """A head whose output does not depend on the perturbation has no anchored effect, whatever it predicts."""
    set_weights(run, anchored=1.0)
    path = run / "best" / "model.safetensors"
    before = mean_of(predict_cells(run, config=PredictConfig(**ASKED)))
    best = open_checkpoint(run / "best")
    tensors = best.model_tensors()
    for name, values in tensors.items():
        if name.startswith("pert_encoder"):
            values.zero_()
    state = {k: v for k, v in best.state.items() if k not in ("files", "sha256", "format_version", "blend")}
    blend = best.blend()
    save_checkpoint(run / "best", state, tensors, blend=blend)
    cells = predict_cells(run, config=PredictConfig(**ASKED))
    assert path.exists() and np.abs(before - mean_of(cells)).max() > 1e-3
    np.testing.assert_allclose(mean_of(cells), control_of(cells), atol=1e-4)  # float32 sums


def test_how_far_a_prediction_follows_its_controls_is_what_its_parts_do(run: Path) -> None:
    """A stack and the controls wholly; a head by a line through what it predicts from other controls."""
    asked: dict[str, Any] = ASKED | {"n_cells": 40}  # two draws of five sets

    def share(**options: Any) -> float:
        return float(predict_cells(run, config=PredictConfig(**asked, **options)).uns["sest"]["follows_controls"])

    assert share(blend="stack") == share(blend="controls") == 1.0
    of_head = share(blend="head")
    set_weights(run, stack=0.5, head=0.3)
    assert share() == pytest.approx(0.7 + 0.3 * of_head, rel=1e-6) and of_head != 0
    few = predict_cells(run, config=PredictConfig(**ASKED))  # one draw
    assert "follows_controls" not in few.uns["sest"] and set(few.obs["sest_draw"]) == {-1, 0}


def test_a_share_is_the_slope_between_draws_of_one_request() -> None:
    rng = np.random.default_rng(0)
    followed = Followed(())
    for _ in range(20):  # requests
        base, before = rng.normal(size=50), None
        for _ in range(3):
            control = base + rng.normal(size=50)
            draw = (control, 0.4 * control + 0.01 * rng.normal(size=50))
            followed.add(draw, before)
            before = draw
    assert followed.product / followed.square == pytest.approx(0.4, abs=0.005)


def test_a_checkpoint_without_a_blend_predicts_the_head_s_cells_and_says_so(run: Path) -> None:
    notes = Notes()
    with reporting(notes):
        last = predict_cells(run, config=PredictConfig(**ASKED, checkpoint="last"))
        head = predict_cells(run, config=PredictConfig(**ASKED, checkpoint="last", blend="head"))
    np.testing.assert_array_equal(last.X.toarray(), head.X.toarray())
    assert any("has no blend: cells are the head's alone" in note for note in notes.notes)
    assert last.uns["sest"]["blend"] == {"head": 1.0, "controls": 0.0}


def test_what_counts_is_said_for_each_kind_of_pair(run: Path) -> None:
    set_weights(run, stack=0.25, head=0.5)
    notes = Notes()
    with reporting(notes):
        predict_cells(run, config=PredictConfig(**ASKED))
    (said,) = [note for note in notes.notes if "controls 0.25" in note]
    assert said.startswith("d/x (new pair): stack 0.25 (") and "head 0.50" in said


def test_several_runs_are_averaged(folder: Path, predicted: Predict) -> None:
    runs = [folder / "run" / f"seed-{seed}" for seed in (0, 1)]
    whole: dict[str, Any] = {"only": "P", "cell_type": "x", "n_cells": 12, "blend": "head"}
    one, other = (predict_cells(run, config=PredictConfig(**whole)) for run in runs)
    both = predict_cells(runs, config=PredictConfig(**whole))
    expected = np.maximum((mean_of(one) + mean_of(other)) / 2, 0)
    np.testing.assert_allclose(mean_of(both), expected, atol=1e-5)
    assert list(both.uns["sest"]["provenance"]["ensemble"]) == ["seed-0/best", "seed-1/best"]
    of_folder = predict_cells(folder / "run", config=PredictConfig(**whole))
    np.testing.assert_array_equal(of_folder.X.toarray(), both.X.toarray())


def test_runs_of_other_cells_are_not_averaged_and_none_counts_twice(folder: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", [small_screen("d", seed=5)])
    train(other, tmp_path / "run", small_config(max_steps=1))
    first = folder / "run" / "seed-0"
    with pytest.raises(InputError, match="was trained on another cache than"):
        predict([first, tmp_path / "run"], tmp_path / "o.h5ad", PredictConfig(**ASKED))
    with pytest.raises(InputError, match="each once"):
        predict([first, first], tmp_path / "o.h5ad", PredictConfig(**ASKED))
    assert not (tmp_path / "o.h5ad").exists()


def test_baselines_of_a_run_whose_training_is_not_known_are_refused(
    folder: Path, refusal: Callable[..., str], tmp_path: Path
) -> None:
    moved = shutil.copytree(folder / "run" / "seed-0" / "last", tmp_path / "moved")
    line = refusal(moved, cache=str(folder / "cache.zarr"), blend="stack", **ASKED)
    assert "--blend stack has nothing to go by. Pass --blend head" in line
