"""`sest blend`, and the commands that lead to several runs or to none with a head, as a user sees them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.commands import Done
from sest.runs.checkpoint import open_checkpoint

SHORT = (
    "--max-steps 2 --batch-size 2 --set-size 4 --hidden 8 --n-layers 1 --n-heads 1 --val-every 2 --num-workers 0"
).split()


def test_a_blend_is_fitted_and_what_counts_is_said(sest: Callable[..., Done], demo: Demo, tmp_path: Path) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    done = sest("blend", run)
    assert done.code == 0 and "Weights in predictions" in done.out and "(new pair): stack " in done.out
    assert "validation pairs (spread over resamples: " in done.out and f"Kept in {run / 'best'}" in done.out
    assert open_checkpoint(run / "best").has_blend


def test_it_refuses_what_is_no_run(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist" in refused("blend", tmp_path / "no")


def test_seeds_are_trained_one_after_another_continued_and_averaged(
    sest: Callable[..., Done], refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    words = ("train", demo.cache, "--run", tmp_path / "runs", "--splits", demo.folder / "starter.toml", *SHORT)
    done = sest(*words, "--seeds", 2, "--seed", 5)
    assert done.code == 0 and "2 runs: " in done.out
    seeds = [
        json.loads((tmp_path / "runs" / f"seed-{i}" / "best" / "state.json").read_text())["config"] for i in (0, 1)
    ]
    assert [config["seed"] for config in seeds] == [5, 6]
    assert "exists. Continue it with --resume auto" in refused(*words, "--seeds", 2)
    done = sest(*words, "--seeds", 3, "--seed", 5, "--resume", "auto")
    assert done.code == 0 and (tmp_path / "runs" / "seed-2" / "best").is_dir()
    done = sest("predict", tmp_path / "runs", "--out", tmp_path / "p.h5ad")
    assert done.code == 0 and "and 2 more." in done.out
    assert "is a run itself" in refused("train", demo.cache, "--run", tmp_path / "runs" / "seed-0", "--seeds", 2)


def test_a_first_answer_without_a_head(sest: Callable[..., Done], demo: Demo, tmp_path: Path) -> None:
    words = ("--splits", demo.folder / "starter.toml", "--perturbations", demo.features)
    done = sest("train", demo.cache, "--run", tmp_path / "run", "--head", "none", *words)
    assert done.code == 0 and "No head: the stack of baselines" in done.out and "Weights in predictions" in done.out
    assert sest("predict", tmp_path / "run", "--out", tmp_path / "p.h5ad").code == 0
    done = sest("evaluate", tmp_path / "p.h5ad", demo.cells, "--out", tmp_path / "e", "--no-cell-eval")
    assert done.code == 0 and "kernel" in done.out
    assert sest("report", tmp_path / "run").code == 0 and "step 0" in sest("info", tmp_path / "run").out


def test_several_processes_train_one_seed(
    refused: Callable[..., str], demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    line = refused("train", demo.cache, "--run", tmp_path / "runs", "--seeds", 2)
    assert "--seeds trains in one process" in line and not (tmp_path / "runs").exists()
