"""`sest` run in this process, and cells to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pytest
from conftest import Demo

from helpers.commands import Done, content
from sest.cli.main import main


@pytest.fixture
def sest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `sest` in this process."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sest", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Done(0 if code is None else int(code), *capsys.readouterr())

    return call


@pytest.fixture
def refused(sest: Callable[..., Done], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must end with code 2, one error line and not a byte changed in tmp_path."""

    def call(*words: object) -> str:
        before = content(tmp_path)
        done = sest(*words)
        assert done.code == 2, done
        lines = done.err.splitlines()
        assert lines[-1].startswith("Error: ") and done.err.count("Error") == 1
        assert "Traceback" not in done.err + done.out
        assert content(tmp_path) == before
        return lines[-1]

    return call


@pytest.fixture
def cells(demo: Demo, tmp_path: Path) -> Callable[..., Path]:
    """Writes 200 of the demo's cells with changes to cells.h5ad."""
    whole = ad.read_h5ad(demo.cells)

    def write(change: Callable[[ad.AnnData], ad.AnnData | None] = lambda some: None) -> Path:
        some = whole[:200].copy()
        some = change(some) or some
        some.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return write
