"""Whether HDF5's library survives a file: a child process reads its structure first.

A damaged file can crash the library or keep it busy for ever. In the child that is an answer, here it would be the end.
One child serves all files of a process; it ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
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
                self._ask(path)
                self._sound.add(key)

    def _ask(self, path: Path) -> None:
        if self._process is None or self._owner != os.getpid():
            self._start()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(os.fsencode(os.path.abspath(path)).hex().encode() + b"\n")
        self._process.stdin.flush()
        there, _, _ = select.select([self._process.stdout], [], [], SECONDS)
        if there and self._process.stdout.readline():
            return
        self.stop()
        what = "crashes HDF5's library" if there else f"keeps HDF5's library busy for more than {SECONDS:.0f} seconds"
        raise InputError(f"{path} {what}: it is damaged. Copy or download it again.")

    def _start(self) -> None:
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sest.untrusted.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
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


def main() -> None:
    """Answer a line to every path, in hexadecimal digits a line, as long as somebody asks."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.alarm(round(2 * SECONDS))  # ends this process if nobody is left to do so
        with contextlib.suppress(Exception):  # damage that is an error is said by who reads the file
            _look_at(bytes.fromhex(line.strip()))
        signal.alarm(0)
        sys.stdout.write("read\n")
        sys.stdout.flush()


def _look_at(path: bytes) -> None:
    import h5py

    with h5py.File(path, "r") as file:
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
                    _read_some(node)
                else:
                    names = itertools.islice(node, MOST_NODES)
                    hard = (name for name in names if isinstance(node.get(name, getlink=True), h5py.HardLink))
                    waiting += [node[name] for name in hard]
            except Exception:  # noqa: BLE001 - as above; the others are still looked at
                continue


def _read_some(array: Any) -> None:
    plan = array.id.get_create_plist()
    [plan.get_filter(i) for i in range(plan.get_nfilters())]
    chunk = array.dtype.itemsize
    for n in array.chunks or ():
        chunk *= n
    if array.external or array.is_virtual or not array.size or chunk > LARGEST_CHUNK:
        return
    if array.nbytes <= SMALL:
        array[()]
    else:
        array[(slice(0, 1),) * array.ndim]
        array[tuple(slice(n - 1, n) for n in array.shape)]


if __name__ == "__main__":
    main()
