"""`sest evaluate` overwrites nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import Demo


def test_an_older_evaluation_is_not_overwritten(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    shutil.copytree(demo.folder / "evaluation", tmp_path / "evaluation")
    words = ("evaluate", demo.folder / "predicted.h5ad", demo.cells, "--out", tmp_path / "evaluation")
    assert "not an empty folder" in refused(*words)
