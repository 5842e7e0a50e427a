"""Training that is killed, or whose disk fails, at any operation on files: resumed, it is the uninterrupted run.

OPERATIONS are all the calls by which training makes something last. Each is made to fail at its k-th use in this
process; and the command is killed at its k-th call of the C library. Every run that failed is resumed until it ends.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.forked import Command, Ended, Fault, Forked
from sest.config import TrainConfig
from sest.head.model import HeadSizes, new_model
from sest.runs.run_folder import CONFIG
from sest.training.train import train
from sest.training.window import MEASURED

logger = logging.getLogger(__name__)

OPERATIONS = ("fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir")
PARTS = 6  # of a sweep: none takes minutes
FATAL = ("fsync", "rename", "replace", "mkdir")  # others are lived with: files are copied, or left where they are


def config() -> TrainConfig:
    """6 steps; at 2, 4 and 6 a validation (each the best so far) and a kept checkpoint; last/ at the end."""
    return small_config(max_steps=6, checkpoint_every=2, val_every=2, log_every=2)


def write_config(path: Path) -> None:
    """`config`, for the command."""
    values = {k: v for k, v in config().to_values().items() if v != getattr(TrainConfig(), k)}
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))


def content(run: Path) -> dict[str, bytes]:
    """The files of a run but for config.toml (it says what was resumed); metrics without how fast the machine was."""
    found = {
        file.relative_to(run).as_posix(): file.read_bytes()
        for file in sorted([*run.glob("*"), *run.glob("[!.]*/*")])
        if file.is_file() and file.name != "config.toml"
    }
    lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = json.dumps(
        [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]
    ).encode()
    return found


def warm_up() -> None:
    """What PyTorch imports, for seconds, and makes in its caches at the first use of these."""
    new_model(HeadSizes(dim=2, n_features=2, n_genes=2, hidden=8), 0)


def failing_at(k: int, original: Callable[..., Any], fail: Callable[[], None]) -> Callable[..., Any]:
    """`original`, but for its k-th call: that fails first."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == k:
            fail()
        return original(*args, **kwargs)

    return call


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("store") / "s.zarr", [small_screen()])


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """An uninterrupted run, and how often it used each operation."""
    run, uses = tmp_path_factory.mktemp("whole") / "run", dict.fromkeys(OPERATIONS, 0)

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            uses[name] += 1
            return original(*args, **kwargs)

        return call

    warm_up()
    train(store, tmp_path_factory.mktemp("first") / "run", config())  # numba fills its cache, with os.replace
    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(mock.patch.object(os, name, counted(name, getattr(os, name))))
        train(store, run, config())
    assert all(uses.values()), uses
    return run, uses


@pytest.fixture(scope="module")
def whole(run: tuple[Path, dict[str, int]]) -> dict[str, bytes]:
    """The content of the uninterrupted run."""
    return content(run[0])


@pytest.fixture(scope="module")
def uses(run: tuple[Path, dict[str, int]]) -> dict[str, int]:
    """How often an uninterrupted run uses each operation."""
    return run[1]


def disk_fails_once(store: Path, run: Path, whole: dict[str, bytes], operation: str, k: int) -> bool:
    """Train with a disk that fails at the k-th use of an operation, then resume; whether it was used so often."""
    failed = False
    with mock.patch.object(os, operation, failing_at(k, getattr(os, operation), disk_full)):
        try:
            train(store, run, config())
        except (OSError, ValueError):  # InputError where the run folder cannot be made
            failed = True
    if failed:
        train(store, run, config(), resume="auto")
    assert content(run) == whole, (operation, k)
    return failed


@pytest.mark.parametrize("operation", ["rename", "replace", "link"])
def test_a_disk_that_fails_at_a_rename_or_link_costs_nothing(
    store: Path, whole: dict[str, bytes], uses: dict[str, int], tmp_path: Path, operation: str
) -> None:
    for k in range(1, uses[operation] + 1):
        assert disk_fails_once(store, tmp_path / str(k), whole, operation, k) == (operation in FATAL)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_a_disk_that_is_full_at_some_fsync_costs_nothing(
    store: Path, whole: dict[str, bytes], uses: dict[str, int], tmp_path: Path, share: float
) -> None:
    assert disk_fails_once(store, tmp_path / "run", whole, "fsync", 1 + round(share * (uses["fsync"] - 1)))


def test_the_lines_before_a_checkpoint_are_on_the_disk_when_it_takes_its_place(store: Path, tmp_path: Path) -> None:
    metrics, durable = tmp_path / "run" / "metrics.jsonl", -1
    fsync, rename = os.fsync, os.rename

    def note_fsync(file: int) -> None:
        nonlocal durable
        fsync(file)
        if metrics.exists() and os.path.samestat(os.fstat(file), metrics.stat()):
            durable = metrics.stat().st_size

    renamed = []

    def check_rename(source: Path, target: Path) -> None:
        step = json.loads((source / "state.json").read_text())["step"]
        lines = metrics.read_bytes().splitlines(keepends=True)  # some are of steps since, the last perhaps torn
        lines = [line for line in lines if line.endswith(b"\n")]
        assert durable >= sum(len(line) for line in lines if json.loads(line)["step"] <= step)
        renamed.append(target)
        rename(source, target)

    with mock.patch("os.fsync", note_fsync), mock.patch("os.rename", check_rename):
        train(store, tmp_path / "run", config())
    assert len(renamed) >= 6


@pytest.mark.full
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_fails_at_any_operation_costs_nothing(
    store: Path, whole: dict[str, bytes], uses: dict[str, int], tmp_path: Path, operation: str
) -> None:
    for k in range(1, uses[operation] + 1):
        assert disk_fails_once(store, tmp_path / str(k), whole, operation, k) == (operation in FATAL), k


# ---- SIGKILL


class Training:
    """`sest train` in a process that can be killed at any of its calls."""

    def __init__(self, forked: Forked, store: Path, folder: Path) -> None:
        self.forked, self.store, self.folder = forked, store, folder
        write_config(folder / "config.toml")

    def command(self, run: Path, fault: Fault | None, *more: object, **options: Any) -> Command:
        begun = (run / CONFIG).exists()
        start = ("--resume", "auto") if begun else ("--config", self.folder / "config.toml", *more)
        return Command([str(w) for w in ("train", self.store, "--run", run, *start)], fault=fault, **options)

    def team(self, run: Path, killed: int | None = None, fault: Fault | None = None) -> list[Ended]:
        """Train with two processes, of which one may be killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = {"TORCHELASTIC_RUN_ID": "t", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        more = ("--batch-size", 2)
        return self.forked.together(
            [
                self.command(
                    run,
                    fault if rank == killed else None,
                    *more,
                    environment={**torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(2)
            ],
            seconds=90,
        )

    def calls(self, *kinds: str) -> int:
        """How often an uninterrupted run makes calls of these kinds."""
        run = self.folder / "counted"
        ended = self.forked.together([self.command(run, Fault(str(run), kinds))])[0]
        assert ended.code == 0, ended
        shutil.rmtree(run)
        return ended.calls

    def kill_and_resume(self, whole: dict[str, bytes], how: str, at: int, kinds: tuple[str, ...]) -> None:
        run = self.folder / f"{how}-{at}-{len(kinds)}"
        ended = self.forked.together([self.command(run, Fault(str(run), kinds, at, how))])[0]
        assert ended.code == -signal.SIGKILL, (at, ended)
        ended = self.forked.together([self.command(run, None)])[0]
        assert ended.code == 0, (at, ended)
        assert content(run) == whole, (how, at)
        shutil.rmtree(run)


@pytest.fixture(scope="module")
def training(forked: Forked, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(forked, store, tmp_path_factory.mktemp("training"))


def test_a_run_killed_at_some_rename_fsync_or_write_and_resumed_is_the_uninterrupted_run(
    training: Training, whole: dict[str, bytes]
) -> None:
    for how, at, kinds in (
        ("kill", 9, ("rename",)),
        ("kill", 31, ("fsync",)),
        ("tear", 12, ("write",)),
    ):
        training.kill_and_resume(whole, how, at, kinds)


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_a_run_killed_at_any_call_and_resumed_is_the_uninterrupted_run(
    training: Training, whole: dict[str, bytes], part: int
) -> None:
    """Also inside checkpoints, which most of the calls write."""
    n = training.calls(*Fault.kinds)
    logger.info(f"{n} calls")  # shown with --log-cli-level=INFO
    for at in range(1 + part, n + 1, PARTS):
        training.kill_and_resume(whole, "kill", at, Fault.kinds)


@pytest.mark.full
def test_a_run_killed_in_the_middle_of_any_write_and_resumed_is_the_uninterrupted_run(
    training: Training, whole: dict[str, bytes]
) -> None:
    n = training.calls("write")
    for at in range(1, n + 1):
        training.kill_and_resume(whole, "tear", at, ("write",))


def kill_one_of_two(training: Training, killed: int, at: int) -> Path:
    """The run of two processes of which one was killed; only the first one writes, the other is killed as it reads."""
    run = training.folder / f"team-{killed}-{at}"
    below, kinds = (str(run), Fault.kinds) if killed == 0 else (str(training.store), ("open",))
    ended = training.team(run, killed, Fault(below, kinds, at, "kill"))
    other = ended[1 - killed]
    assert ended[killed].code == -signal.SIGKILL, ended
    assert other.code in (0, 1) and other.seconds < 60 and "Traceback" not in other.err, (at, other)
    if other.code:  # else it was done before the first one wrote its last files
        assert "Another of the 2 processes has ended" in other.err.splitlines()[-1], (at, other)
    return run


def test_one_of_two_processes_that_is_killed_ends_the_other_with_a_line(training: Training) -> None:
    kill_one_of_two(training, 1, 1)


@pytest.mark.full
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_killed_at_any_call_ends_the_other_and_the_team_resumes(
    training: Training, killed: int
) -> None:
    run = training.folder / f"team-{killed}"
    assert [ended.code for ended in training.team(run)] == [0, 0]
    whole = content(run)
    for at in range(5, 150, 8) if killed == 0 else range(1, 24, 4):
        run = kill_one_of_two(training, killed, at)
        assert [ended.code for ended in training.team(run)] == [0, 0], at
        assert content(run) == whole, at


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_stopped_at_any_moment_and_resumed_is_the_uninterrupted_run(
    store: Path, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    """`sest train` as a user starts it, signalled after 0, 0.3, 0.6 ... s of training until it ends by itself."""
    run = tmp_path / "run"
    write_config(tmp_path / "config.toml")
    command = [sys.executable, "-m", "sest", "train", str(store), "--run", str(run)]
    first = [*command, "--config", str(tmp_path / "config.toml")]
    stops = 0
    while True:
        begun = run.exists()
        process = subprocess.Popen(
            [*command, "--resume", "auto"] if begun else first, stderr=subprocess.PIPE, text=True
        )
        before = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0
        while process.poll() is None:  # wait until training has begun
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_mtime_ns != before:
                time.sleep(0.3 * stops)
                process.send_signal(number)
                break
            time.sleep(0.01)
        _, said = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode in (-number, 128 + number), said
        assert "Traceback" not in said, said
        stops += 1
    assert stops >= 1
    assert content(run) == whole
