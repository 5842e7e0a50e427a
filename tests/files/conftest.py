"""Fixtures of the tests of sest.cells."""

from __future__ import annotations

import pytest

import sest.files.matrix


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and reads of a few rows, so that small files have many boundaries."""
    monkeypatch.setattr(sest.files.matrix, "READ_VALUES", 90)
    monkeypatch.setattr(sest.files.matrix, "WINDOW_VALUES", 200)
