"""What a user can do wrong with `sest train`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo
from safetensors.numpy import load_file, save_file

from helpers.commands import Done
from sest.cli.options import whole_or_auto


def test_features_that_are_missing_or_of_another_width_are_refused(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    vectors = load_file(demo.features)
    name = next(iter(vectors))
    save_file({key: row for key, row in vectors.items() if key != name}, tmp_path / "fewer.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    save_file({key: row[:-1].copy() for key, row in vectors.items()}, narrow)
    words = ("train", demo.cache, "--run", tmp_path / "run", "--perturbations")
    line = refused(*words, tmp_path / "fewer.safetensors")
    assert f"no features for 1 of 12 perturbations: {name}" in line and "--missing-perturbations" in line
    line = refused(
        "predict", demo.run, "--out", tmp_path / "o.h5ad", "--perturbations", tmp_path / "narrow.safetensors"
    )
    assert "width 63; the checkpoint takes 64" in line
    words_of_more = ("train", demo.cache, "--run", demo.run, "--resume", "auto", "--max-steps", "30")
    assert "n_features: 64 there, 63 now" in refused(*words_of_more, "--perturbations", narrow)


@pytest.mark.parametrize(
    ("old", "new", "nearest"),
    [
        ('cells = "train"', 'cels = "train"', "'cells'"),
        ("cells.beta", "cells.betta", "'beta'"),
        ('test = [\n    "GENE', 'test = [\n    "GENW', "'GENE"),
    ],
    ids=["dataset", "cell type", "perturbation"],
)
def test_a_misspelt_name_in_the_splits_is_answered_with_the_nearest(
    refused: Callable[..., str], demo: Demo, tmp_path: Path, old: str, new: str, nearest: str
) -> None:
    text = (demo.folder / "starter.toml").read_text()
    assert text.count(old) >= 1
    (tmp_path / "splits.toml").write_text(text.replace(old, new, 1))
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--splits", tmp_path / "splits.toml")
    assert "Did you mean" in line and nearest in line


def test_a_misspelt_option_in_a_configuration_file_is_answered_with_the_nearest(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("max-step = 5\n")
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--config", tmp_path / "run.toml")
    assert "Unknown key 'max_step'" in line and "'max_steps'" in line


def test_a_renamed_option_in_a_configuration_file_is_answered_with_its_new_name(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('controls = "batch"\n')
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--config", tmp_path / "run.toml")
    assert line == f"Error: {tmp_path}/run.toml: controls is now match_controls."


def test_config_toml_of_a_run_of_an_earlier_version_is_read_as_it_was_meant(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(
        'controls = "batch"\ntarget_sum = "10000"\ndevice = "toaster"\n[provenance]\ncache = "x"\n'
    )
    assert "toaster" in refused("train", demo.cache, "--run", tmp_path / "run", "--config", tmp_path / "config.toml")


def test_the_command_line_wins_over_a_configuration_file(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('hidden = 30\ndevice = "toaster"\n')
    words = ("train", demo.cache, "--run", tmp_path / "run", "--config", tmp_path / "run.toml")
    assert "toaster" in refused(*words)
    assert "hidden (30) must divide by n-heads (4)" in refused(*words, "--device", "cpu", "--n-heads", "4")


def test_a_batch_size_is_a_number_or_auto(sest: Callable[..., Done], demo: Demo, tmp_path: Path) -> None:
    done = sest("train", demo.cache, "--run", tmp_path / "run", "--batch-size", "all")
    assert done.code == 2 and "'all' is neither a whole number nor 'auto'" in " ".join(done.err.split())
    assert whole_or_auto("auto") == 0 and whole_or_auto("12") == 12


def test_an_older_run_is_not_overwritten(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    words = ("train", demo.cache, "--run", run, "--perturbations", demo.features)
    assert "exists. Continue it with --resume auto" in refused(*words)
    assert "would make another run" in refused(*words, "--resume", "auto", "--set-size", "8")
    assert "nothing to resume" in refused("train", demo.cache, "--run", tmp_path / "new", "--resume", "auto")
