"""Fixtures of the tests of sest.cells."""

from __future__ import annotations

import pytest

import sest.cells.matrix


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and reads of a few rows, so that small files have many boundaries."""
    monkeypatch.setattr(sest.cells.matrix, "READ_VALUES", 90)
    monkeypatch.setattr(sest.cells.matrix, "WINDOW_VALUES", 200)
