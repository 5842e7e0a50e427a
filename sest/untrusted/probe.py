"""Whether HDF5's library survives a file: a child process reads its structure first.

A damaged file can crash the library or keep it busy for ever. In the child that is an answer, here it would be the end.
One child serves all files of a process; it ends with it. Of a file at a URL it asks this process for bytes, which
stay there for whoever reads them next.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sest.errors import InputError

SECONDS = 30.0  # for the structure of one file, which takes milliseconds
MOST_NODES = 4_000  # groups and arrays that are looked at
SMALL = 2**20  # bytes of an array that is read whole; of others the first and the last entry
SMALL_ELSEWHERE = 2**16  # of one at a URL
LARGEST_CHUNK = 2**29  # bytes; larger ones are refused later, unread
MEMORY = 2**32  # bytes that the child may take


class _Child:
    """The process that reads, started when it is first asked."""

    def __init__(self) -> None:
        self._lock, self._sound = threading.Lock(), set[tuple[int, ...]]()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def check(self, path: Path) -> None:
        about = os.stat(path)
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        with self._lock:
            if key not in self._sound:
                self._ask(str(path), os.fsencode(os.path.abspath(path)).hex(), None)
                self._sound.add(key)

    def check_bytes(self, name: str, file: io.RawIOBase) -> None:
        with self._lock:
            self._ask(name, str(file.seek(0, os.SEEK_END)), file)

    def _ask(self, name: str, line: str, file: io.RawIOBase | None) -> None:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        answer, data = b"", f"{'at' if file else 'path'} {line}\n".encode()
        try:
            while answer != b"read\n":
                with contextlib.suppress(BrokenPipeError):  # then no answer comes
                    self._process.stdin.write(data)
                    self._process.stdin.flush()
                there, _, _ = select.select([self._process.stdout], [], [], SECONDS)
                answer = self._process.stdout.readline() if there else b""
                if not answer:
                    what = "crashes HDF5's library" if there else f"keeps HDF5's library busy for {SECONDS:.0f} seconds"
                    raise InputError(f"{name} {what}: it is damaged. Copy or download it again.")
                if answer != b"read\n" and file is not None:
                    start, n = map(int, answer.split())
                    file.seek(start)
                    data = file.read(n) or b""
                    data = data.ljust(n, b"\0")  # a file that became shorter
        except BaseException:
            self.stop()  # in the middle of a file, of no use for another one
            raise

    def _start(self) -> None:
        self.stop()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sest.untrusted.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            self.stop()
            raise InputError(
                "No process could be started that reads HDF5 files first: too little memory, or files open?"
            )

    def stop(self) -> None:
        """End the process."""
        if self._process is None or self._owner != os.getpid():
            return
        process, self._process = self._process, None
        process.kill()
        process.communicate()


_child = _Child()
atexit.register(_child.stop)


def check_structure(path: Path) -> None:
    """Refuse an HDF5 file of this machine that HDF5's library does not survive; other damage is for those who read it.

    Raises:
        InputError: the library crashes, or does not come to an end.
    """
    _child.check(path)


def check_bytes(name: str, file: io.RawIOBase) -> None:
    """The same of a file that is read through `file`, and called `name`.

    Raises:
        InputError: as `check_structure`, and whatever reading raises.
    """
    _child.check_bytes(name, file)


class _Asked(io.RawIOBase):
    """A file whose bytes the other process has."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes, self._at = n_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._n_bytes)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        n = max(min(len(buffer), self._n_bytes - self._at), 0)
        if n:
            signal.alarm(0)  # how long a server takes is not the library's fault
            _say(f"{self._at} {n}")
            buffer[:n] = sys.stdin.buffer.read(n)
            signal.alarm(round(2 * SECONDS))
            self._at += n
        return n


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Answer a line to each line: a path in hexadecimal digits, or how long a file is whose bytes can be asked for."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _say("ready")
    while line := sys.stdin.buffer.readline():
        kind, value = line.split()
        signal.alarm(round(2 * SECONDS))  # ends this process if nobody is left to do so
        with contextlib.suppress(Exception):  # damage that is an error is said by who reads the file
            if kind == b"path":
                _look_at(bytes.fromhex(value.decode()), SMALL)
            else:
                _look_at(_Asked(int(value)), SMALL_ELSEWHERE)
        signal.alarm(0)
        _say("read")


def _look_at(source: bytes | io.RawIOBase, small: int) -> None:
    import h5py

    with h5py.File(source, "r", locking=False) as file:
        waiting, seen = [file], set[int]()
        while waiting and len(seen) < MOST_NODES:
            node = waiting.pop()
            address = h5py.h5o.get_info(node.id).addr
            if address in seen:
                continue
            seen.add(address)
            try:
                for name in node.attrs:
                    node.attrs[name]
                if isinstance(node, h5py.Dataset):
                    _read_some(node, small)
                else:
                    names = itertools.islice(node, MOST_NODES)
                    hard = (name for name in names if isinstance(node.get(name, getlink=True), h5py.HardLink))
                    waiting += [node[name] for name in hard]
            except Exception:  # noqa: BLE001 - as above; the others are still looked at
                continue


def _read_some(array: Any, small: int) -> None:
    plan = array.id.get_create_plist()
    [plan.get_filter(i) for i in range(plan.get_nfilters())]
    chunk = array.dtype.itemsize
    for n in array.chunks or ():
        chunk *= n
    if array.external or array.is_virtual or not array.size or chunk > LARGEST_CHUNK:
        return
    if array.nbytes <= small:
        array[()]
    else:
        array[(slice(0, 1),) * array.ndim]
        array[tuple(slice(n - 1, n) for n in array.shape)]


if __name__ == "__main__":
    main()
