"""What a user can do wrong with `sest demo`; tests/test_demo.py runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_a_folder_that_is_in_use_and_a_seed_that_is_none_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    assert "is not an empty folder" in refused("demo", "--quick", "--out", tmp_path / "there")
    assert "seed is -1; it must be at least 0" in refused("demo", "--quick", "--out", tmp_path / "new", "--seed", "-1")
