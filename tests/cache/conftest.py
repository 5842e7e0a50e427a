"""A cache to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache."""
    return Path(shutil.copytree(finished, tmp_path / "cache.zarr"))
