"""`sest evaluate` overwrites nothing unasked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import Demo

from helpers.commands import Done


def test_an_older_evaluation_is_replaced_only_when_that_is_asked_for(
    sest: Callable[..., Done], refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.folder / "evaluation", tmp_path / "evaluation")
    words = ("evaluate", demo.folder / "predicted.h5ad", demo.cells, "--out", tmp_path / "evaluation")
    assert "not an empty folder. Pass --force" in refused(*words)
    assert sest(*words, "--no-cell-eval", "--force").code == 0


def test_a_folder_that_holds_what_is_evaluated_is_never_replaced(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.folder / "evaluation", tmp_path / "out")
    shutil.copy(demo.folder / "predicted.h5ad", tmp_path / "out" / "results.csv")
    words = ("evaluate", tmp_path / "out" / "results.csv", demo.cells, "--out", tmp_path / "out", "--force")
    assert "results.csv, which this command reads: never replaced" in refused(*words)
