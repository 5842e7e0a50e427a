"""Processes that start at once: forked from a Python that has imported what `sest` needs, which takes seconds.

Each is a process of its own, with its memory, environment, signals and exit code. Only what libraries decide while they
are imported (which kernels, how many threads) is as in the environment in which the `Server` was started. Where the
start itself is tested, tests start Python anew. forked.py has processes in which something fails.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

TESTS = Path(__file__).resolve().parents[1]
IMPORTED = """
typer rich.live rich.progress anndata.io sest.pipeline.stages sest.embedding.embed sest.training.train
sest.prediction.predict sest.prediction.submission sest.evaluation.evaluate sest.facts.run sest.report.write
sest.runs.known sest.simulation.simulation torch._dynamo torch.distributed.run
""".split()
LARGEST_REQUEST = 2**20  # bytes


class Process:
    """A process that was forked, with what of `subprocess.Popen` tests use."""

    def __init__(self, channel: socket.socket, out: IO[str], err: IO[str]) -> None:
        self._channel, self._out, self._err = channel, out, err
        self.pid = int(channel.recv(64))
        self.returncode: int | None = None
        self.megabytes = self.seconds = 0.0  # at its end: memory beyond the server's at most, time of a processor

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self._channel.settimeout(timeout)
            try:
                code, kilobytes, seconds = self._channel.recv(64).split()
            except (BlockingIOError, TimeoutError) as error:
                raise subprocess.TimeoutExpired(str(self.pid), timeout) from error
            self.returncode, self.megabytes, self.seconds = int(code), int(kilobytes) / 1024, float(seconds)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """What it wrote, after its end; one that does not end is killed."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        self._channel.close()
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


class Server:
    """A Python that has imported `IMPORTED`; it ends with this process."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = {**(os.environ if environment is None else environment), "OMP_NUM_THREADS": "1"}
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [str(TESTS), str(TESTS.parent), self.environment.get("PYTHONPATH", "")]
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=self.environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(self._close)

    def _close(self) -> None:
        self._ours.close()
        self._server.wait()

    def start(
        self,
        words: Sequence[object],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        terminal: int | None = None,
        first: tuple[str, str, object] | None = None,
    ) -> Process:
        """Start `python *words`, which begin with -m MODULE or -c CODE.

        Args:
            terminal: what it writes to.
            first: (module, function, argument) to call in the process before.
        """
        out, err = (tempfile.TemporaryFile("w+", errors="backslashreplace") for _ in "oe")  # noqa: SIM115 - see communicate
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = dict(self.environment if env is None else env)
        request = json.dumps([[str(word) for word in words], str(cwd or Path.cwd()), environment, first])
        with theirs:
            written = (out.fileno(), err.fileno()) if terminal is None else (terminal, terminal)
            socket.send_fds(self._ours, [request.encode()], [theirs.fileno(), *written])
        return Process(channel, out, err)

    def run(
        self, words: Sequence[object], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Start a process and wait for its end."""
        process = self.start(words, cwd=cwd, env=env)
        out, err = process.communicate()
        assert process.returncode is not None
        return subprocess.CompletedProcess([str(word) for word in words], process.returncode, out, err)


@cache
def server() -> Server:
    """The server of this process, in its environment."""
    return Server()


def start_ranks(n: int, words: Sequence[object]) -> list[Process]:
    """Start `python *words` n times, with the environment that torchrun gives to n processes of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = {"TORCHELASTIC_RUN_ID": "t", "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**team, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n} for rank in range(n)]
    return [server().start(words, env={**os.environ, **{k: str(v) for k, v in rank.items()}}) for rank in ranks]


# --- the server


def _serve(channel: socket.socket) -> list[str]:
    """Fork for every request; returns the words of it in a process that is to run them."""
    for name in IMPORTED:
        importlib.import_module(name)
    _use()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C ends pytest, and so this
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, files, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 3)
        if not request:
            sys.exit()
        if not os.fork():
            break
        for file in files:
            os.close(file)
    channel.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answers = socket.socket(fileno=files[0])
    if child := os.fork():
        answers.send(str(child).encode())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, status, used = os.wait4(child, 0)
        took = f"{max(used.ru_maxrss - before, 0)} {used.ru_utime + used.ru_stime}"
        answers.send(f"{os.waitstatus_to_exitcode(status)} {took}".encode())
        os._exit(0)
    answers.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files[1:], start=1):
        os.dup2(file, number)
        os.close(file)
    words, folder, environment, first = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if first is not None:
        module, function, argument = first
        getattr(importlib.import_module(module), function)(argument)
    return words


def _use() -> None:
    """What Typer, PyTorch and numba import, and make, when they are first used."""
    import numba
    import typer
    from typer.testing import CliRunner

    from sest.head.model import HeadSizes, new_model

    new_model(HeadSizes(dim=2, n_features=2, n_genes=2, hidden=8), 0)
    numba.njit(lambda x: x)(1)
    app = typer.Typer()
    app.command()(_options)
    CliRunner().invoke(app, ["--n", "1"])


def _options(n: int = 0) -> None:
    """A command with an option."""


def _run(words: list[str]) -> None:
    """Do what `python *words` does."""
    kind, what, *arguments = words
    sys.argv[:] = [kind, *arguments]
    sys.path[0] = os.getcwd()
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _end(code: list[int]) -> None:
    """End a process that exits by itself here: that Python takes all modules apart costs half a second."""
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])


if __name__ == "__main__":
    CODE: list[int] = []
    atexit.register(_end, CODE)  # the first one: it is called last
    REQUEST = _serve(socket.socket(fileno=int(sys.argv[1])))
    try:
        _run(REQUEST)
        CODE.append(0)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            CODE.append(ended.code or 0)
        raise
