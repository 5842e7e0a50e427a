"""`sest demo`: the commands it shows do what it did."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import Demo

from helpers.watching import Recorder
from sest.baselines.effects import BASELINES
from sest.cli.main import main
from sest.errors import InputError
from sest.pipeline import demo as demo_module
from sest.pipeline import stages
from sest.pipeline.demo import run_demo


def test_without_plotly_the_demo_is_refused_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else name)
    with pytest.raises(InputError, match="A report needs plotly"):
        run_demo(tmp_path / "out", quick=True)
    assert not (tmp_path / "out" / "cache.zarr").exists()


def test_the_demo_leaves_every_stage_in_its_folder(demo: Demo) -> None:
    assert {path.name for path in demo.folder.iterdir()} == {
        "cells.h5ad",
        "features.safetensors",
        "starter.toml",
        "cache.zarr",
        "run",
        "predicted.h5ad",
        "evaluation",
        "report.html",
    }
    summary = json.loads((demo.folder / "evaluation" / "summary.json").read_text())["metrics"]
    assert set(summary) == {"pearson_delta", "pearson_delta_independent", "mae", "pds", "energy_distance"}
    assert set(summary["mae"]) == {"model", *BASELINES, "real_half"}
    assert summary["mae"]["model"] == demo.evaluation.summary["mae"]["model"]
    assert demo.training.step == 20


def test_the_commands_shown_give_the_same_files(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [shlex.split(command)[1] for command in demo.commands] == (
        "simulate embed train predict evaluate report".split()
    )
    for command in demo.commands:
        words = shlex.split(command.replace(str(demo.folder), str(tmp_path)))
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 0, capsys.readouterr().err
    same = ["cells.h5ad", "features.safetensors", "starter.toml", "predicted.h5ad", "evaluation/results.csv"]
    for name in [*same, "run/best/model.safetensors"]:
        assert (tmp_path / name).read_bytes() == (demo.folder / name).read_bytes(), name


def test_another_seed_is_shown_in_the_commands_that_depend_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(demo_module, "write_screen", lambda *_, **__: None)
    monkeypatch.setattr(stages, "embed", lambda *_, **__: None)
    monkeypatch.setattr(stages, "train", stop)
    watcher = Recorder()
    with pytest.raises(Stop):
        run_demo(tmp_path / "out", seed=7, watcher=watcher)
    assert [command.count("--seed 7") for command in watcher.commands] == [1, 1, 1]


def test_an_older_folder_is_never_written_into(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    for out in (tmp_path, tmp_path / "x", str(tmp_path)):
        with pytest.raises(InputError, match="not an empty folder"):
            run_demo(out)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.slow
def test_an_older_demo_is_replaced_when_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    (out / "run" / "config.toml").write_text("older")
    (out / "cells.h5ad").write_text("older")
    with pytest.raises(InputError, match=r"Pass --force to replace"):
        run_demo(out, quick=True)
    run_demo(out, quick=True, force=True)
    assert {path.name for path in out.iterdir()} == {*demo_module.MADE} - {stages.STATE, "splits.toml"}
