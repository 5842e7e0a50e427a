"""What a user can do wrong with `sest predict`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Demo


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--checkpoint", "checkpoint-step-7")
    assert "no checkpoint 'checkpoint-step-7'" in line and "checkpoint-step-10" in line and "best" in line


def test_new_control_cells_are_one_file_of_cells(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    line = refused("predict", demo.run, "--out", tmp_path / "o.h5ad", "--controls", demo.folder / "starter.toml")
    assert "--controls takes one .h5ad or .h5 file" in line
