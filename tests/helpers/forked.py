"""The real commands in forked processes, whose disk, memory or machine can be made to fail at a chosen call.

A server process has imported everything once, and forks one child a command: a command then takes a fraction of a
second, and what happens in it (a kill, a limit, a signal) happens to a process of its own. faulty_libc.c stands before
the C library there, so that calls of HDF5, safetensors and NumPy count as those of Python do.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import json
import mmap
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

TESTS = Path(__file__).resolve().parent.parent
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
            the call alone fails with `error`; "fail on": so do all later ones.
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
    folder: str = ""  # to run in


@dataclass(frozen=True)
class Ended:
    """How it ended: the exit code (negative: the signal), what was printed, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float  # more than the server had
    calls: int  # that counted


class Forked:
    """The server, as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("cc") is None or sys.platform != "linux":
            pytest.skip("no C compiler, or not Linux")
        library = self._folder / "faulty_libc.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "LD_PRELOAD": str(library),
                "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
                "OMP_NUM_THREADS": "1",
            },
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._server.communicate(timeout=60)

    def together(self, commands: Sequence[Command], seconds: float = 60) -> list[Ended]:
        """Run commands at one time; those that have not ended after so many seconds are killed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        job = {"seconds": seconds, "commands": [dataclasses.asdict(command) for command in commands]}
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server has ended"
        return [Ended(**one) for one in json.loads(answer)]

    def run(self, *words: object, seconds: float = 60, **command: Any) -> Ended:
        """Run one command; see `Command`."""
        return self.together([Command([str(word) for word in words], **command)], seconds)[0]


# ---- the server


class Plan(ctypes.Structure):
    """`struct plan` of faulty_libc.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("count", "at", "how", "kinds", "error", "without")),
        ("below", ctypes.c_char * 4096),
    )


def main() -> None:
    """Answer a line to every job."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    library = ctypes.CDLL(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            children = [_Child(Path(folder), i, command, library) for i, command in enumerate(job["commands"])]
            answers.write(json.dumps(_ends(children, job["seconds"])) + "\n")
        answers.flush()


def _warm_up() -> None:
    """All imports, and what PyTorch makes at the first use of these."""
    import anndata.io  # noqa: F401
    import torch
    import torch.distributed

    import sest
    import sest.cli.main
    import sest.embedding.embed
    import sest.report.write
    import sest.training.train  # noqa: F401
    from sest.head.model import HeadSizes, new_model

    new_model(HeadSizes(dim=2, n_features=2, n_genes=2, hidden=8), 0)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)


class _Child:
    """A process with one command."""

    def __init__(self, folder: Path, number: int, command: dict[str, Any], library: ctypes.CDLL) -> None:
        self.command, self.began = command, time.monotonic()
        self.out, self.err = folder / f"{number}.out", folder / f"{number}.err"
        self.plan = Plan.from_buffer(mmap.mmap(-1, ctypes.sizeof(Plan)))
        self.end: dict[str, Any] | None = None
        self.waiting = sorted(command["signals"])
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setpgid(0, 0)
                for path, stream in ((os.devnull, 0), (self.out, 1), (self.err, 2)):
                    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
                self._prepare(library)
                code = _run(command["words"])
            except BaseException:  # noqa: BLE001 - as Python itself shows it
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _prepare(self, library: ctypes.CDLL) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(self.command["environment"])
        for module, name, value in self.command["constants"]:
            setattr(importlib.import_module(module), name, _nothing if value == NOTHING else value)
        if self.command["folder"]:
            os.chdir(self.command["folder"])
        for name, value in self.command["limits"].items():
            if name == "DATA":
                value += _data_bytes()
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        if self.command["user"]:
            _drop_rights()
        ctypes.c_void_p.in_dll(library, "plan").value = ctypes.addressof(self.plan)
        if (fault := self.command["fault"]) is not None:
            self.plan.at, self.plan.how, self.plan.error = fault["at"], HOW[fault["how"]], fault["error"]
            self.plan.kinds = sum(KINDS[kind] for kind in fault["kinds"])
            self.plan.without = sum(LACKS[name] for name in fault["lacks"])
            self.plan.below = fault["below"].encode()

    def look(self, seconds: float) -> bool:
        """Send what is due; whether it has ended."""
        passed = time.monotonic() - self.began
        while self.waiting and self.waiting[0][0] <= passed:
            os.kill(self.pid, self.waiting.pop(0)[1])
        if passed > seconds:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        pid, status, used = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            return False
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.end = {
            "code": os.waitstatus_to_exitcode(status),
            "out": self.out.read_text(errors="backslashreplace"),
            "err": self.err.read_text(errors="backslashreplace"),
            "seconds": time.monotonic() - self.began,
            "megabytes": max(used.ru_maxrss - base, 0) / 1024,
            "calls": self.plan.count,
        }
        return True


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


def _run(words: list[str]) -> int:
    """The command line, as `sest` starts it."""
    from sest.cli.main import main as sest_main

    sys.argv = ["sest", *words]
    try:
        sest_main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _ends(children: list[_Child], seconds: float) -> list[dict[str, Any]]:
    """How all ended; looks every few milliseconds."""
    left = list(children)
    while left:
        left = [child for child in left if not child.look(seconds)]
        if left:
            select.select([], [], [], 0.005)
    return [child.end for child in children if child.end is not None]


if __name__ == "__main__":
    main()
