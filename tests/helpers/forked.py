"""The real commands in forked processes, whose disk, memory or machine can be made to fail at a chosen call.

faulty_libc.c stands before the C library there, so that calls of HDF5, safetensors and NumPy count as those of Python
do.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import Server

SOURCE = Path(__file__).with_name("faulty_libc.c")
KINDS = {"write": 1, "fsync": 2, "rename": 4, "create": 8, "remove": 16, "length": 32, "open": 64}
HOW = {"count": 0, "kill": 1, "tear": 2, "fail": 3, "fail on": 4, "pause": 5}
LACKS = {"flock": 1, "shm": 2, "clock": 4}
NOBODY = 65534
NOTHING = "()"  # as a constant: a function that does nothing


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a command.

    Args:
        below: files whose calls count.
        kinds: of calls: of KINDS; "open" are those for reading, all others change something.
        at: number of the call, from 1.
        how: "count": nothing happens; "kill": SIGKILL before the call; "tear": SIGKILL after half of a write; "fail":
            the call alone fails with `error`; "fail on": so do all later ones; "pause": it waits until those after
            it have ended.
        lacks: what the machine has not: of LACKS ("clock": one that stands still).
    """

    below: str = ""
    kinds: tuple[str, ...] = tuple(KINDS)[:-1]
    at: int = 0
    how: str = "count"
    error: int = 0
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """One command and the process that it runs in."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    limits: Mapping[str, int] = field(default_factory=dict)  # by names as "NOFILE"; "DATA" is on top of what is there
    user: bool = False  # somebody who may not do what root may
    constants: Sequence[tuple[str, str, Any]] = ()  # (module, name, value)
    signals: Sequence[tuple[float, int]] = ()  # (seconds after the start, signal)


@dataclass(frozen=True)
class Ended:
    """How it ended: the exit code (negative: the signal), what was printed, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    processor: float  # seconds, without those of its own processes
    megabytes: float  # more than the server had
    calls: int  # that counted


class Forked:
    """Starts commands; the library is compiled in a folder."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("cc") is None or sys.platform != "linux":
            pytest.skip("no C compiler, or not Linux")
        library = folder / "faulty_libc.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self._server = Server({**os.environ, "LD_PRELOAD": str(library)})

    def together(self, commands: Sequence[Command], seconds: float = 120) -> list[Ended]:
        """Run commands at one time; those that have not ended after so many seconds are killed.

        The one after a command with a pause starts when that has come to it.
        """
        with tempfile.TemporaryDirectory() as folder:
            left: list[_Running] = []
            ended: dict[_Running, Ended] = {}
            while len(ended) < len(commands):
                if len(left) < len(commands) and not (left and left[-1].is_on_the_way(seconds)):
                    left.append(_Running(self._server, commands[len(left)], Path(folder) / str(len(left))))
                for i, one in enumerate(left):
                    if len(left) == len(commands) and all(later in ended for later in left[i + 1 :]):
                        one.go_on()
                    if one not in ended and one.has_ended(seconds):
                        ended[one] = one.end()
                time.sleep(0.005)
            return [ended[one] for one in left]

    def run(self, *words: object, seconds: float = 120, **command: Any) -> Ended:
        """Run one command; see `Command`."""
        return self.together([Command([str(word) for word in words], **command)], seconds)[0]


class _Plan(ctypes.Structure):
    """`struct plan` of faulty_libc.c, in a file that both processes map."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "at", "how", "kinds", "error", "without")),
        ("below", ctypes.c_char * 4096),
    )


def _plan(file: Path) -> _Plan:
    with open(file, "r+b") as opened:
        return _Plan.from_buffer(mmap.mmap(opened.fileno(), ctypes.sizeof(_Plan)))


class _Running:
    """A process with one command."""

    def __init__(self, server: Server, command: Command, file: Path) -> None:
        file.write_bytes(bytes(_Plan()))
        self.plan, self.waiting, self.began = _plan(file), sorted(command.signals), time.monotonic()
        if (fault := command.fault) is not None:
            self.plan.at, self.plan.how, self.plan.error = fault.at, HOW[fault.how], fault.error
            self.plan.kinds = sum(KINDS[kind] for kind in fault.kinds)
            self.plan.without = sum(LACKS[name] for name in fault.lacks)
            self.plan.below = fault.below.encode()
        self.process = server.start(
            ["-m", "sest", *command.words],
            env={**server.environment, **command.environment},
            first=("helpers.forked", "prepare", [str(file), dataclasses.asdict(command)]),
        )

    def has_ended(self, seconds: float) -> bool:
        """Send what is due; whether it has ended."""
        passed = time.monotonic() - self.began
        while self.waiting and self.waiting[0][0] <= passed:
            self.process.send_signal(self.waiting.pop(0)[1])
        if passed > seconds:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.poll() is not None

    def is_on_the_way(self, seconds: float) -> bool:
        """Whether it has not come to its pause yet."""
        pauses = self.plan.how == HOW["pause"]
        return pauses and self.plan.count < self.plan.at and not self.has_ended(seconds)

    def go_on(self) -> None:
        """End its pause."""
        if self.plan.how == HOW["pause"]:
            self.plan.how = HOW["count"]

    def end(self) -> Ended:
        seconds, code = time.monotonic() - self.began, self.process.wait(0)
        out, err = self.process.communicate()
        return Ended(code, out, err, seconds, self.process.seconds, self.process.megabytes, self.plan.count)


# ---- in the process


def prepare(arguments: tuple[str, dict[str, Any]]) -> None:
    """Make the process the one that a `Command` asks for: limits, rights, and a library that fails as planned."""
    file, command = arguments
    os.setpgid(0, 0)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    for module, name, value in command["constants"]:
        setattr(importlib.import_module(module), name, _nothing if value == NOTHING else value)
    for name, value in command["limits"].items():
        most = value + (_data_bytes() if name == "DATA" else 0)
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    plan = _plan(Path(file))
    if command["user"]:
        _drop_rights()
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    ctypes.c_void_p.in_dll(library, "plan").value = ctypes.addressof(plan)
    _KEPT.append(plan)


_KEPT: list[_Plan] = []  # mapped as long as the process is there


def _drop_rights() -> None:
    """As root: read and write no files of others any more. Without another user, who could not read Python itself."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    ctypes.CDLL(None).capset(header, none)


def _nothing(*_: object) -> None:
    """What is put in the place of a function."""


def _data_bytes() -> int:
    """Bytes of data that the process has, for RLIMIT_DATA."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()
