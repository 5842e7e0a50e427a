"""A machine on which something fails or is missing, under the real commands: one line or none, and nothing is lost.

Disks fail at a call of the C library (full, quota, read-only), by a limit on the size of files, or by permissions.
Shared memory, locks of files and a steady clock may be missing; another process may write, or somebody deletes what is
in use.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Demo

from helpers.commands import content
from helpers.forked import NOBODY, Command, Ended, Fault, Forked
from sest.cache.disk import PARTIAL
from sest.runs.run_folder import CONFIG

SMALL = (
    "--max-steps 6 --checkpoint-every 2 --val-every 2 --log-every 1 --batch-size 3 --set-size 4 --hidden 16 "
    "--n-layers 1 --n-heads 2 --n-encoder-layers 2 --n-decoder-layers 2 --num-workers 2 --device cpu"
).split()
# What a command takes and has of its own, besides what it writes: {out} is a folder for that.
COMMANDS = {
    "embed": "embed {cells} --encoder pca --dim 4 --device cpu --cache {out}/new.zarr",
    "train": "train {cache} --run {out}/run",
    "predict": "predict {run} --cell-type beta --device cpu --out {out}/new.h5ad",
    "evaluate": "evaluate {predicted} {cells} --out {out}/scores",
    "report": "report {run} --no-model --out {out}/report.html",
    "simulate": "simulate {out}/new.h5ad --n-genes 60 --n-perturbations 4 --n-cells 5",
}
GOES_ON = ("embed", "train")  # what these finished stays, and the same command goes on
GROW = ("write", "fsync", "create", "length")  # what a full disk refuses; it renames and deletes
DISKS = {  # the error, and the calls that meet it
    "full": (errno.ENOSPC, GROW),
    "quota": (errno.EDQUOT, GROW),
    "read-only": (errno.EROFS, Fault.kinds),
    "broken": (errno.EIO, ("write", "fsync")),
}


class Work:
    """Commands over the cells, the cache and the run of the demo."""

    def __init__(self, forked: Forked, demo: Demo, folder: Path) -> None:
        self.forked, self.demo, self.folder, self.number = forked, demo, folder, 0
        self.places = {"cells": demo.cells, "cache": demo.cache, "run": demo.run}
        self.places["predicted"] = folder / "predicted.h5ad"
        words = COMMANDS["predict"].format(out=folder, **self.places).replace("new.h5ad", "predicted.h5ad").split()
        assert forked.run(*words).code == 0

    def new(self) -> Path:
        """An empty folder for what a command writes."""
        self.number += 1
        (self.folder / str(self.number)).mkdir()
        return self.folder / str(self.number)

    def words(self, name: str, out: Path) -> list[str]:
        words = COMMANDS[name].format(out=out, **self.places).split()
        if name == "train":
            words += ["--resume", "auto"] if (out / "run" / CONFIG).exists() else SMALL
        return words

    def run(self, name: str, out: Path, **options: Any) -> Ended:
        return self.forked.run(*self.words(name, out), **options)

    def fails(self, name: str, out: Path, words: str, leaves_files: bool = False, **options: Any) -> bool:
        """Run a command that may fail, in one line with these words; then without the fault; whether it failed."""
        ended = self.run(name, out, **options)
        if ended.code:
            said_in_one_line(ended, words)
            left = content(out)
            half = [name for name in left if PARTIAL in name]  # a whole one is there where its folder was not synced
            assert name in GOES_ON or leaves_files or not half, left
            replaced = ["--force"] if left and name not in GOES_ON else []
            assert (again := self.forked.run(*self.words(name, out), *replaced)).code == 0, again
        return bool(ended.code)


def said_in_one_line(ended: Ended, words: str) -> None:
    assert ended.code in (1, 2), ended
    lines = ended.err.splitlines()
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err, ended.err
    assert sum(line.startswith("Error: ") for line in lines) == 1 and lines[-1].startswith("Error: "), ended.err
    assert re.search(words, lines[-1]), lines[-1]


@pytest.fixture(scope="module")
def work(forked: Forked, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(forked, demo, tmp_path_factory.mktemp("machine"))


def disk_fails(work: Work, name: str, disk: str, share: float) -> None:
    number, kinds = DISKS[disk]
    calls = work.run(name, counted := work.new(), fault=Fault(str(counted), kinds)).calls
    out, said = work.new(), os.strerror(number)
    fault = Fault(str(out), kinds, 1 + round(share * (calls - 1)), "fail on", number)
    assert calls > 2
    work.fails(name, out, rf"{said}: /|Cannot write to /.*{said}|cannot be written", disk == "read-only", fault=fault)


@pytest.mark.parametrize(("name", "disk"), [("predict", "full"), ("train", "quota")])
def test_a_disk_that_fails_is_one_line_that_names_the_file(work: Work, name: str, disk: str) -> None:
    disk_fails(work, name, disk, 0.5)


@pytest.mark.full
@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_at_any_time_is_one_line_that_names_the_file(work: Work, name: str, disk: str) -> None:
    for share in (0.0, 0.4, 0.9):
        disk_fails(work, name, disk, share)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in COMMANDS if name != "train"])
@pytest.mark.parametrize("limit", [5_000, 40_000])  # what is printed goes into files too
def test_a_limit_on_the_size_of_files_is_one_line(work: Work, name: str, limit: int) -> None:
    failed = work.fails(name, work.new(), "File too large: /|Cannot write to /", limits={"FSIZE": limit})
    assert failed or name == "evaluate" or limit > 5_000


@pytest.mark.parametrize(
    "name", ["embed", *(pytest.param(n, marks=pytest.mark.full) for n in COMMANDS if n != "embed")]
)
def test_a_folder_of_somebody_else_is_one_line(work: Work, name: str) -> None:
    out = work.new()
    os.chmod(out, 0o555)
    if os.geteuid() == 0:
        os.chown(out, NOBODY, NOBODY)
    ended = work.run(name, out, user=True)
    said_in_one_line(ended, "ermission|Cannot write to /")
    assert not content(out)


@pytest.mark.parametrize("name", ["evaluate", pytest.param("embed", marks=pytest.mark.full)])
def test_a_file_of_somebody_else_is_one_line(work: Work, name: str) -> None:
    folder = work.new()
    places = {**work.places, "cells": shutil.copy(work.demo.cells, folder / "cells.h5ad")}
    os.chmod(places["cells"], 0)
    if os.geteuid() == 0:
        os.chown(places["cells"], NOBODY, NOBODY)
    words = COMMANDS[name].format(out=work.new(), **places).split()
    said_in_one_line(work.forked.run(*words, user=True), "ermission|not readable")


@pytest.mark.parametrize(
    "name", ["train", *(pytest.param(n, marks=pytest.mark.full) for n in COMMANDS if n != "train")]
)
def test_few_descriptors_are_enough_or_one_line(work: Work, name: str) -> None:
    for most in (20,) if name == "train" else (20, 48):
        work.fails(name, work.new(), "Too many open files|cannot be", limits={"NOFILE": most})


@pytest.mark.parametrize(
    "name",
    ["embed", "train", *(pytest.param(n, marks=pytest.mark.full) for n in COMMANDS if n not in ("embed", "train"))],
)
def test_what_a_machine_lacks_changes_nothing(work: Work, name: str) -> None:
    """No shared memory, no locks of files (as on some network file systems), and a clock that jumps by days."""
    usual, odd = work.new(), work.new()
    assert work.run(name, usual).code == 0
    ended = work.run(name, odd, fault=Fault(lacks=("flock", "shm", "clock")))
    assert ended.code == 0 and "Traceback" not in ended.err, ended
    assert ("has no locks of files" in ended.err) == (name == "embed"), ended  # which keeps others out by one
    assert not re.search(r"-\d+ (s|it|cells)|\d{5,} (s|h|min)\b", ended.err), ended.err  # of times that jumped
    assert same(usual) == same(odd)


@pytest.mark.full
def test_a_umap_is_drawn_where_neither_home_nor_its_package_can_be_written(work: Work) -> None:
    """umap-learn caches what numba compiles beside its source or below HOME, and cannot be imported without either."""
    packages = Path(pytest.importorskip("umap").__file__).parents[1]
    read_only = Fault(str(packages), ("create",), 1, "fail on", errno.EROFS)
    out = work.new()
    words = ("report", work.demo.run, "--umap", "--device", "cpu", "--out", out / "report.html")
    nobody = {"HOME": "/proc/nobody", "XDG_CACHE_HOME": ""}
    ended = work.forked.run(*words, fault=read_only, environment=nobody, seconds=300)
    assert ended.code == 0 and ended.calls, ended
    assert "UMAP 1" in (out / "report.html").read_text()


def same(out: Path) -> dict[str, str]:
    """What two runs of a command have in common: all but where and when they ran, and how fast."""
    apart = ("config.toml", "metrics.jsonl", "summary.json", "report.html")
    return {name: digest for name, digest in content(out).items() if not name.endswith(apart)}


def test_a_second_writer_is_refused_and_the_first_one_ends_well(work: Work) -> None:
    for name, more, words in (
        ("train", ["--resume", "auto"], "Another process trains in"),
        ("embed", [], "is being written by process"),
    ):
        out = work.new()
        command = Command(work.words(name, out), fault=Fault(str(out), at=20, how="pause"))
        first, second = work.forked.together([command, Command([*work.words(name, out), *more])])
        assert first.code == 0, first
        said_in_one_line(second, words)


def once_there(path: Path, do: Callable[[], object]) -> threading.Thread:
    """Do something as soon as a path is there."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("name", "sign", "gone"),
    [
        ("train", "run/checkpoint-step-2/state.json", "run"),
        ("embed", "new.zarr/cells/X/data/c/0", "new.zarr"),
    ],
)
def test_a_folder_that_is_deleted_while_it_is_written_ends_the_command_and_stays_deleted(
    work: Work, name: str, sign: str, gone: str
) -> None:
    out = work.new()
    more = ["--max-steps", "4000"] if name == "train" else []
    thread = once_there(out / sign, lambda: os.rename(out / gone, work.new() / gone))
    ended = work.forked.run(*work.words(name, out), *more)
    thread.join()
    if name == "train" or ended.code:
        said_in_one_line(ended, "was deleted or moved while it")
    assert not (out / gone).exists(), content(out)


@pytest.mark.full
@pytest.mark.parametrize("name", ["train", "embed"])
def test_a_command_that_is_suspended_goes_on(work: Work, name: str) -> None:
    usual, odd = work.new(), work.new()
    assert work.run(name, usual).code == 0
    ended = work.run(name, odd, signals=[(0.3, signal.SIGTSTP), (3.0, signal.SIGCONT)])
    assert ended.code == 0 and ended.seconds > 3, ended
    assert same(usual) == same(odd)
    if name == "train":
        lines = (odd / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
