"""Files made to do harm, given to the real commands: a line or an answer in seconds and a gigabyte; nothing runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.forked import Ended, Forked
from helpers.hostile import CELLS, RUNS, SETTINGS, VECTORS, canary

SECONDS, MEGABYTES = 15.0, 1000.0  # of a processor
QUICK = (  # in `make test`; most kinds have tests of what reads them as well
    *("cycle of hard links", "row starts of 64 GB", "labels that a terminal obeys", "zarr with a pickle filter"),
    *("pt that runs", "pickle of 10^40 lists", "200,000 brackets", "sizes of 10^12"),
)
READ = (  # harmless
    *("groups without end", "30,000 columns", "labels that a terminal obeys", "a label of a megabyte"),
    *("counts of 10^30", "an encoding from elsewhere"),
)


def some(names: Iterable[str]) -> list[object]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


def check(ended: Ended, name: str) -> None:
    said = ended.out + ended.err
    assert ended.processor < SECONDS and ended.megabytes < MEGABYTES, ended
    assert "Traceback" not in said and "Exception" not in said, said
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", said), said
    assert max(map(len, said.splitlines()), default=0) < 3000, said[:3000]
    assert ended.code == (0 if name in READ else 2), ended
    if ended.code:
        assert sum(line.startswith("Error: ") for line in ended.err.splitlines()) == 1, ended.err


@pytest.mark.parametrize("name", some(CELLS))
def test_cells(forked: Forked, tmp_path: Path, name: str) -> None:
    cells = CELLS[name](tmp_path / "x")
    cache = tmp_path / "new.zarr"
    ended = forked.run("embed", cells, "--encoder", "pca", "--dim", 4, "--device", "cpu", "--cache", cache)
    check(ended, name)
    assert cache.exists() == (not ended.code) and not canary(tmp_path / "x").exists()
    told = forked.run("info", cells)
    assert told.code in (0, 2) and told.processor < SECONDS and told.megabytes < MEGABYTES, told
    assert "Traceback" not in told.err and "\x1b" not in told.out + told.err and "\u202e" not in told.out + told.err


@pytest.mark.parametrize("name", some(VECTORS))
def test_vectors(forked: Forked, demo: Demo, tmp_path: Path, name: str) -> None:
    words = ("train", demo.cache, "--run", tmp_path / "run", "--perturbations", VECTORS[name](tmp_path / "x"))
    check(forked.run(*words, "--device", "cpu"), name)
    assert not (tmp_path / "run").exists() and not canary(tmp_path / "x").exists()


@pytest.mark.parametrize("name", some(SETTINGS))
def test_settings(forked: Forked, demo: Demo, tmp_path: Path, name: str) -> None:
    words = ("train", demo.cache, "--run", tmp_path / "run", "--config", SETTINGS[name](tmp_path / "x"))
    check(forked.run(*words, "--device", "cpu"), name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", some(RUNS))
def test_runs(forked: Forked, demo: Demo, tmp_path: Path, name: str) -> None:
    run = RUNS[name](demo.run, tmp_path / "x")
    for words in (
        ("predict", run, "--cell-type", "beta", "--out", tmp_path / "new.h5ad"),
        ("train", demo.cache, "--run", run, "--resume", "auto", "--max-steps", 10**6, "--max-time", "1s"),
        ("info", run),
        ("report", run, "--no-model", "--out", tmp_path / "new.html"),
    ):
        ended = forked.run(*words)
        said = ended.out + ended.err
        assert ended.processor < SECONDS and ended.megabytes < MEGABYTES, (words, ended)
        assert "Traceback" not in said and "\x1b" not in said, (words, said)
        assert ended.code in (0, 2, 142), (words, ended)
    shutil.rmtree(run)
