"""The trained runs that the tests of the report share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.configs import small_config
from helpers.pages import Opened, Trained, opened
from sest.report.write import write_report
from sest.training.train import train


@pytest.fixture(scope="session")
def page(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The whole report of that run."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    written = write_report([trained.run], out, n_sets=0)
    assert written.notes == [] and written.n_bytes == out.stat().st_size
    return opened(out)


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(trained.run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def other(trained: Trained) -> Path:
    """The same cells with a wider head and another learning rate."""
    config = small_config(splits=str(trained.run.parent / "splits.toml"), hidden=24, lr=3e-3)
    train(trained.cache, trained.run.parent / "wider", config)
    return trained.run.parent / "wider"
