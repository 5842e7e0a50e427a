"""Runs that several test modules of this room compare with."""

from __future__ import annotations

import pytest

from helpers.runs import cache, quick_disk, whole

__all__ = ["cache", "quick_disk", "whole"]


@pytest.fixture(autouse=True)
def _quick_disk(quick_disk: None) -> None:
    """In every test of this room."""
