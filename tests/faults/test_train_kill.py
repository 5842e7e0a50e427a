"""Training that is killed, or whose disk fails, at any operation on files: resumed, it is the uninterrupted run.

OPERATIONS are all the calls by which training makes something last. Each is made to fail at its k-th use, in two ways:
with an error of the disk, in this process, and with SIGKILL, in a child of `_kill_server` (this file run as a script:
it imports everything once and forks, so that a kill costs little). Every run that failed is resumed until it ends.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.config import TrainConfig
from sest.head.model import HeadSizes, new_model
from sest.training.train import train
from sest.training.window import MEASURED

TESTS = Path(__file__).resolve().parent.parent
OPERATIONS = ("fsync", "rename", "replace", "link", "mkdir", "unlink", "rmdir")
FATAL = ("fsync", "rename", "replace", "mkdir")  # others are lived with: files are copied, or left where they are


def config() -> TrainConfig:
    """6 steps; at 2, 4 and 6 a validation (each the best so far) and a kept checkpoint; last/ at the end."""
    return small_config(max_steps=6, checkpoint_every=2, val_every=2, log_every=2)


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
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)


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


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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


def _kill_server(store: Path, runs: Path, jobs: list[tuple[str, int]]) -> None:
    """For each (operation, k): train in a child that kills itself there, then in another one."""
    warm_up()
    for operation, k in jobs:
        run = runs / f"{operation}-{k}"
        assert _child(store, run, operation, k), f"{operation} is not used {k} times"
        assert not _child(store, run, None, 0)


def _child(store: Path, run: Path, operation: str | None, k: int) -> bool:
    """Train in a forked child; whether it was killed."""
    child = os.fork()
    if child == 0:
        if operation is not None:
            setattr(os, operation, failing_at(k, getattr(os, operation), kill_itself))
        train(store, run, config(), resume="auto")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    ended_well = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    assert ended_well or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
    return not ended_well


def kill_at(store: Path, runs: Path, whole: dict[str, bytes], jobs: list[tuple[str, int]]) -> None:
    arguments = [sys.executable, "-W", "error", __file__, str(store), str(runs), json.dumps(jobs)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
    }  # also of the sest beside
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for operation, k in jobs:
        assert content(runs / f"{operation}-{k}") == whole, (operation, k)


def test_a_run_killed_at_some_rename_or_fsync_and_resumed_is_the_uninterrupted_run(
    store: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    kill_at(store, tmp_path, whole, [("rename", 3), ("rename", 5), ("rename", 8), ("fsync", 17), ("unlink", 2)])


@pytest.mark.full
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_run_killed_at_any_operation_and_resumed_is_the_uninterrupted_run(
    store: Path, whole: dict[str, bytes], uses: dict[str, int], tmp_path: Path, operation: str
) -> None:
    kill_at(store, tmp_path, whole, [(operation, k) for k in range(1, uses[operation] + 1)])


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_command_stopped_at_any_moment_and_resumed_is_the_uninterrupted_run(
    store: Path, whole: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    """`sest train` as a user starts it, signalled after 0, 0.3, 0.6 ... s of training until it ends by itself."""
    run = tmp_path / "run"
    values = {k: v for k, v in config().to_values().items() if v != getattr(TrainConfig(), k)}
    (tmp_path / "config.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
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


if __name__ == "__main__":
    _kill_server(Path(sys.argv[1]), Path(sys.argv[2]), [(name, k) for name, k in json.loads(sys.argv[3])])
