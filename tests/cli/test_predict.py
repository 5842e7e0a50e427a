"""What a user can do wrong with `sest predict`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from conftest import Demo

from helpers.commands import Done, content


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--checkpoint", "checkpoint-step-7")
    assert "no checkpoint 'checkpoint-step-7'" in line and "checkpoint-step-10" in line and "best" in line


def test_tf32_is_refused_where_there_is_none(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--device", "cpu", "--precision", "tf32")
    assert "Precision tf32 needs a GPU with TF32 units (Ampere or newer). Use --precision fp32." in line


def test_new_control_cells_are_one_file_of_cells(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--controls", demo.folder / "starter.toml")
    assert "starter.toml is not an .h5ad file" in line


@pytest.fixture
def copied(demo: Demo, tmp_path: Path) -> Path:
    """Cells, a cache and a run of them, without a splits file: nothing says where the cells are."""
    shutil.copytree(demo.folder, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    text = (run / "config.toml").read_text().replace(str(demo.folder), str(tmp_path / "copy"))
    (run / "config.toml").write_text(text)
    return tmp_path / "copy"


def test_a_file_that_is_there_is_replaced_only_when_that_is_asked_for(
    sest: Callable[..., Done], refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    out = tmp_path / "p.h5ad"
    out.write_text("older")
    words = ("predict", demo.run, "--cell-type", "beta", "--out", out)
    assert f"{out} exists. Pass --force to replace it" in refused(*words)
    for _ in range(2):  # over something else, and over a prediction
        assert sest(*words, "--force").code == 0
    assert "sest" in ad.read_h5ad(out).uns


def test_what_a_prediction_is_made_from_is_never_replaced(
    refused: Callable[..., str], copied: Path, tmp_path: Path
) -> None:
    """The case first_hour/predict_overwrites, and everything else that the run says it was made from."""
    names = "cells.h5ad starter.toml features.safetensors run/config.toml run/best/state.json cache.zarr/zarr.json"
    os.link(copied / "cells.h5ad", tmp_path / "cells-too.h5ad")
    for path in [*(copied / name for name in names.split()), tmp_path / "cells-too.h5ad", copied / "cache.zarr"]:
        for force in ((), ("--force",)):
            for run in (copied / "run", copied / "run" / "best"):
                line = refused("predict", run, "--out", path, *force)
                assert "never replaced" in line, line
    list_ = tmp_path / "list.csv"
    list_.write_text("target_gene,n_cells\n")
    genes = tmp_path / "genes.txt"
    genes.write_text("")
    for option, path in (("--list", list_), ("--genes", genes), ("--template", copied / "predicted.h5ad")):
        line = refused("predict", copied / "run", "--out", path, option, path, "--force")
        assert "is used by this command already" in line


def test_the_cells_of_the_cache_are_known_by_what_they_hold(
    sest: Callable[..., Done], refused: Callable[..., str], copied: Path, tmp_path: Path
) -> None:
    """A cache does not say where its cells were; the splits file that does is gone."""
    (copied / "starter.toml").unlink()
    moved = (copied / "cells.h5ad").rename(tmp_path / "mine.h5ad")
    line = refused("predict", copied / "run", "--out", moved, "--force")
    assert "has the cells that" in line and "never replaced" in line
    template = sest("predict", copied / "run", "--template", moved, "--out", tmp_path / "p.h5ad")
    assert template.code == 0
    assert sest("predict", copied / "run", "--template", moved, "--out", tmp_path / "p.h5ad", "--force").code == 0
    assert content(tmp_path)["p.h5ad"]


def test_a_cache_is_no_run(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    line = refused("predict", demo.cache, "--out", tmp_path / "o.h5ad")
    assert f"is a cache, no run. `sest train {demo.cache} --run RUN` makes one from it." in line
    assert "is a cache of `sest embed`" in refused(
        "embed", demo.cache, "--encoder", "pca", "--cache", tmp_path / "c.zarr"
    )


def test_features_of_other_names_are_shown_beside_those_of_the_cells(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    vectors: dict[str, Any] = {f"ENSG0000000{i}": np.ones(4, np.float32) for i in range(5)}
    np.savez(tmp_path / "ensembl.npz", **vectors)
    line = refused("train", demo.cache, "--run", tmp_path / "run", "--perturbations", tmp_path / "ensembl.npz")
    assert "has no features for 12 of 12 perturbations" in line
    assert "It has, for example: ENSG00000000, ENSG00000001, ENSG00000002 and 2 more; the data has: GENE" in line
