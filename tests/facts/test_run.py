"""What a run folder says of itself: names, the best validation, and where its files are by now."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from helpers.pages import Trained, facts, validation
from sest.errors import InputError
from sest.facts.run import read_runs


def test_runs_of_the_same_name_are_told_apart_and_one_given_twice_is_refused(trained: Trained, tmp_path: Path) -> None:
    same = shutil.copytree(trained.run, tmp_path / "again" / "run")
    assert [run.name for run in read_runs([trained.run, same])] == [f"{trained.run.parent.name}/run", "again/run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs([trained.run, trained.run / ".." / "run"])


def test_a_run_that_is_read_says_what_its_folder_holds(trained: Trained) -> None:
    run = read_runs([trained.run])[0]
    assert (run.name, run.step, run.best_step) == ("run", 12, trained.best["step"])
    assert run.config.set_size == 4 and run.cache == str(trained.cache)
    assert run.checkpoint is not None and run.checkpoint.folder.name == "best"
    assert run.state["step"] == trained.best["step"] and run.lines == trained.lines
    assert run.scores()[0].model == trained.best["val_loss"]


def test_files_that_have_moved_are_read_where_they_are_now(trained: Trained) -> None:
    run = read_runs([trained.run], cache="s3://bucket/cells.zarr", perturbations="features.npz")[0]
    assert run.cache == "s3://bucket/cells.zarr" and run.config.perturbations == "features.npz"


def test_a_run_without_a_checkpoint_says_so(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.toml", "splits.toml", "metrics.jsonl"):
        shutil.copy(trained.run / name, run)
    found = read_runs([run])[0]
    assert found.checkpoint is None and found.problem == f"{run} has no checkpoint yet." and found.state == {}


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="Name one run folder at least"):
        read_runs([])


def test_a_validation_that_is_nan_is_never_the_best() -> None:
    run = facts("a", [validation(4, math.nan), validation(8, 1.5), validation(12, 2.5)])
    assert run.best_step == 8 and run.scores()[0].baselines == {"perturbation_mean": 2.0, "controls": 3.0}
    assert math.isnan(run.scores()[1].model)  # pearson_delta, which no line has
    nothing = facts("b", [validation(4, math.nan)])
    assert nothing.best_step is None and nothing.scores() == []


def test_the_best_validation_is_a_scoreboard_that_says_when_it_measures_nothing() -> None:
    board = facts("a", [validation(4, 1.5), validation(8, 2.5)]).validation()
    assert board is not None and board.by == "the head alone at the best val_loss, step 4" and not board.no_measure
    assert board.scores[0].model == 1.5 and board.verdict()[0].startswith("Better than every baseline on")
    nothing = facts("b", [validation(4, 1.5) | {"val_pairs": 3, "val_pairs_not_measurable": 3}]).validation()
    assert nothing is not None and nothing.verdict() == (nothing.no_measure, "")
    assert "no measurable effect" in nothing.no_measure and "no score there is a win or a loss" in nothing.no_measure
    assert facts("c").validation() is None


def test_the_last_value_of_a_key_is_that_of_the_last_line_that_has_it() -> None:
    run = facts("a", [{"step": 1, "memory_bytes": 5}, {"step": 2, "memory_bytes": None}, {"step": 3}])
    assert run.last("memory_bytes") == 5 and run.last("limit_it_per_s") is None and run.step == 3
    assert facts("b").step == 0
