"""Where the real cells and upstream's numbers are, and the small files tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _folder(variable: str, name: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not path.is_dir():
        pytest.skip(f"no {variable}: {path} is not there")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real cells (PerturBench, Papalexi); never part of this repository."""
    return _folder("SEST_DATA", "data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """Numbers computed by upstream (arc-state 0.11.1), see shared/reference/README.md."""
    return _folder("SEST_REFERENCE", "reference")
