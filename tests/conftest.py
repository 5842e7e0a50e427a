"""Where the real cells and upstream's numbers are, and the small files tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.forked import Forked
    from helpers.pages import Trained
    from sest.evaluation.results import Evaluation
    from sest.training.train import TrainResult


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def _no_signal_is_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP; what tests say must hold there too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Nothing waits for the disk; that fsync is called where it must be is noted by the tests of durable writes.

    A process that is killed loses nothing without it, and one that tests start calls it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with what numba compiles, and again with what takes its place where numba is not there."""
    if request.param == "plain":
        monkeypatch.setattr("sest.machine.jit.REASON", "not wanted")
        for module in [module for name, module in sys.modules.items() if name.startswith("sest.")]:
            for name, loop in list(vars(module).items()):
                if plain := getattr(loop, "plain", None):
                    monkeypatch.setattr(module, name, plain)
    return str(request.param)


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
def shared_cases() -> Path:
    """Inputs that went wrong once; never part of this repository."""
    return _folder("SEST_CASES", "cases")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """Numbers computed by upstream (arc-state 0.11.1), see shared/reference/README.md."""
    return _folder("SEST_REFERENCE", "reference")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run of 12 steps with a val and a test split and hostile names, which the tests of reports share."""
    from helpers.caches import small_screen, write_cache
    from helpers.configs import small_config
    from helpers.pages import CELL_TYPE, SIZES, SPLITS, Trained
    from sest.training.train import train

    folder = tmp_path_factory.mktemp("report")
    group = small_screen(sizes=SIZES, cell_types=("x", CELL_TYPE), n_controls=12)
    cache = write_cache(folder / "s.zarr", [group])
    (folder / "splits.toml").write_text(SPLITS)
    train(cache, folder / "run", small_config(splits=str(folder / "splits.toml")))
    return Trained(group, cache, folder / "run")


@dataclass(frozen=True)
class Demo:
    """`sest demo --quick` in `folder`: simulated cells, a cache, a trained run, its prediction and evaluation."""

    folder: Path
    commands: list[str]  # as shown
    training: TrainResult
    evaluation: Evaluation

    @property
    def cells(self) -> Path:
        return self.folder / "cells.h5ad"

    @property
    def cache(self) -> Path:
        return self.folder / "cache.zarr"

    @property
    def features(self) -> Path:
        return self.folder / "features.safetensors"

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One small trained run for all tests that only read it: 12 perturbations, 300 genes, 880 cells, two cell types."""
    from helpers.watching import Recorder
    from sest.pipeline.demo import run_demo  # imports torch

    folder, watcher = tmp_path_factory.mktemp("demo") / "out", Recorder()
    result = run_demo(folder, quick=True, watcher=watcher)
    assert result.training is not None and result.evaluation is not None
    return Demo(folder, watcher.commands, result.training, result.evaluation)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """Commands in which something fails, for the tests of faults."""
    from helpers.forked import Forked

    return Forked(tmp_path_factory.mktemp("forked"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of two groups, one below a folder, with several shards each. Tests work on copies."""
    from helpers.caches import continue_cache, small_shards

    path = tmp_path_factory.mktemp("finished") / "cache.zarr"
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_shards(monkeypatch)
        continue_cache(path)
    return path
