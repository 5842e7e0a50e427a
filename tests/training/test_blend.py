"""The blend of a run: fitted when training ends, or later; on validation pairs that can be learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.config import BlendConfig
from sest.errors import InputError
from sest.runs.checkpoint import open_checkpoint
from sest.runs.schema import BLEND, STATE
from sest.training.blend import blend_run
from sest.training.train import TrainResult, train

SPLITS = '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q", "T"]\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    folder = tmp_path_factory.mktemp("blend")
    write_cache(folder / "cache.zarr", [small_screen("d")])
    (folder / "s.toml").write_text(SPLITS)
    result = train(folder / "cache.zarr", folder / "run", small_config(splits=str(folder / "s.toml")))
    return folder, result


@pytest.fixture
def run(trained: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0] / "run", tmp_path / "run"))


def test_the_end_of_training_leaves_a_blend_in_best_and_says_what_counts(trained: tuple[Path, TrainResult]) -> None:
    folder, result = trained
    best = open_checkpoint(folder / "run" / "best")
    assert best.has_blend and not open_checkpoint(folder / "run" / "last").has_blend
    weights = best.blend().weights
    assert set(weights.means) == {"stack", "head", "anchored"} and weights.n_pairs == 2
    assert all(0 <= value <= 1 for value in weights.means.values()) and sum(weights.means.values()) <= 1 + 1e-9
    assert result.blend[0].startswith("d/x (new pair): stack ")
    assert result.blend[-1].startswith("Fitted on 2 validation pairs (spread over resamples: stack ± ")
    assert "These are few, so the head counts little whatever it is worth: hold out more" in result.blend[-1]


def test_the_same_blend_is_fitted_later_and_changes_nothing_else(run: Path) -> None:
    whole = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    state = json.loads(whole[STATE])
    (run / "best" / BLEND).unlink()
    for key in ("blend", "sha256"):
        del state[key]
    del state["files"][BLEND]
    from sest.runs.checkpoint import _state_sha256

    state["sha256"] = _state_sha256(state)
    (run / "best" / STATE).write_text(json.dumps(state, sort_keys=True, indent=1) + "\n")
    assert not open_checkpoint(run / "best").has_blend
    folder, said = blend_run(run, BlendConfig())
    assert folder == run / "best" and said[0].startswith("d/x (new pair)")
    now = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    assert now.keys() == whole.keys()
    assert now["model.safetensors"] == whole["model.safetensors"]
    one, other = (json.loads(files[STATE])["blend"]["weights"] for files in (now, whole))
    assert one == pytest.approx(other, abs=1e-4)  # the head once in batches of another size


def test_another_checkpoint_gets_one_when_that_is_asked_for(run: Path) -> None:
    folder, _ = blend_run(run, BlendConfig(checkpoint="last"))
    assert folder == run / "last" and open_checkpoint(run / "last").has_blend
    open_checkpoint(run / "last").require_optimizer()


def test_perturbations_that_cannot_be_learned_do_not_speak_for_the_head(tmp_path: Path) -> None:
    """Held out of all contexts a one-hot perturbation has no trained column: the stack is taken as it is."""
    write_cache(tmp_path / "cache.zarr", [small_screen("d")])
    (tmp_path / "s.toml").write_text(SPLITS + '[fewshot."d.y"]\nval = ["Q", "T"]\n')
    train(tmp_path / "cache.zarr", tmp_path / "run", small_config(splits=str(tmp_path / "s.toml"), max_steps=4))
    weights = open_checkpoint(tmp_path / "run" / "best").blend().weights
    assert weights.means == {"stack": 1.0, "head": 0.0, "anchored": 0.0} and weights.n_pairs == 0


def test_a_checkpoint_whose_training_cells_are_not_known_is_refused(
    run: Path, trained: tuple[Path, TrainResult]
) -> None:
    moved = run.parent / "moved"
    shutil.copytree(run / "last", moved)
    with pytest.raises(InputError, match="does not say which cells"):
        blend_run(moved, BlendConfig(cache=str(trained[0] / "cache.zarr")))


def test_a_resumed_run_fits_it_anew(run: Path, trained: tuple[Path, TrainResult]) -> None:
    before = open_checkpoint(run / "best").blend().weights
    config = small_config(splits=str(trained[0] / "s.toml"), max_steps=16, lr=1e-2)
    train(trained[0] / "cache.zarr", run, config, resume="auto")
    best = open_checkpoint(run / "best")
    assert best.has_blend
    if best.state["step"] == 16:
        assert best.blend().weights != before  # at least their spread is another
