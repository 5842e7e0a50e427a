"""What is computed from all cells of a cache, kept beside it: whoever needs it next reads it instead of every cell.

    OUT.zarr/.derived/<name>-<digest of the key>/about.json  the key, and of each array its type, shape and CRC-32C
    OUT.zarr/.derived/<name>-<digest of the key>/<array>.bin

What is larger than memory is appended block by block (`write_once`), in a hidden folder until it is whole. Every GB it
is flushed and about.json says how long the arrays are: the process that goes on after a kill starts there. Of several
processes one writes and the others wait. Of these arrays only the sizes are checked when they are mapped.

It is no part of the cache: not journalled, made again where it is missing or damaged, and free to be deleted. It is not
kept where the cache lies on an object store, in a folder that cannot be written, or on a disk that is nearly full.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import mmap
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np

from sest.cache.disk import NEW, flush, folder_aside, name_folder, sha256, write_durably, write_flushed
from sest.cache.locks import in_turn
from sest.cache.schema import DERIVED, parsed
from sest.cache.storage import LocalStorage, Storage, lock_file

logger = logging.getLogger(__name__)

ABOUT = "about.json"
SPARE = 2**30  # bytes of the disk that stay free
DURABLE = 2**30  # appended bytes after which they are flushed: what a kill may lose
_BLOCK = 2**22  # bytes checked at one time
ROWS = 8  # copied at one time


@dataclass(frozen=True)
class Blocks:
    """An array that is made a block of rows at a time, in their order; all of it need not be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """Made in memory."""
        made, at = np.empty(self.shape, self.dtype), 0
        for block in self.make():
            made[at : at + len(block)] = block
            at += len(block)
        assert at == len(made)
        return made


def is_derived(storage: Storage, name: str, key: Mapping[str, Any]) -> bool:
    """Whether something is kept under this name and key; whether it is sound shows when it is read."""
    folder = folder_of(storage, name, key)
    return folder is not None and (folder / ABOUT).is_file()


def read_derived(
    storage: Storage, name: str, key: Mapping[str, Any], arrays: Collection[str]
) -> dict[str, np.ndarray] | None:
    """Arrays that `keep_derived` kept under this name and key, mapped read-only; None where they are not there."""
    folder = folder_of(storage, name, key)
    if folder is None or not (folder / ABOUT).exists():
        return None
    if (found := read_folder(folder, key, arrays)) is not None:
        return found
    with _alone_in(folder.parent):  # damaged, if it still is so
        return read_folder(folder, key, arrays, clear=True)


def forget_derived(storage: Storage, name: str, key: Mapping[str, Any]) -> None:
    """Delete what is kept under this name and key, and say that it is made again."""
    if (folder := folder_of(storage, name, key)) is not None:
        with _alone_in(folder.parent):
            _clear(folder)


def read_folder(
    folder: Path, key: Mapping[str, Any], arrays: Collection[str], *, clear: bool = False
) -> dict[str, np.ndarray] | None:
    """The arrays in a folder, mapped; None where they are not there or not sound. `clear`: say so and delete them."""
    try:
        about = parsed((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(about, dict) or about.get("key") != _plain(key):
        return None
    found = {}
    for array in arrays:
        file = folder / f"{array}.bin"
        try:
            dtype, shape, checksum = about["arrays"][array]
            values = _mapped(file, dtype, shape)
            sound = checksum is None or _checksum(file) == checksum
        except (OSError, ValueError, TypeError, LookupError):
            sound = False
        if not sound:
            if clear:
                _clear(folder, file.name)
            return None
        found[array] = values
    return found


def keep_derived(
    storage: Storage, name: str, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray | Blocks]
) -> None:
    """Keep arrays, whole or not at all. Nothing depends on it: where it cannot be done, that is said and no error."""
    folder = folder_of(storage, name, key)
    if folder is None:
        return
    try:
        folder.parent.mkdir(exist_ok=True)
        with _alone_in(folder.parent):
            if read_folder(folder, key, arrays) is None:  # no other process has kept the same meanwhile
                _keep(folder, key, arrays)
    except OSError as error:
        logger.debug(f"{folder.parent} keeps no {name}: {error.strerror}.")


def _keep(folder: Path, key: Mapping[str, Any], arrays: Mapping[str, np.ndarray | Blocks]) -> None:
    if shutil.disk_usage(folder.parent).free < sum(array.nbytes for array in arrays.values()) + SPARE:
        logger.info(f"{folder} is not kept: its disk is nearly full.")
        return
    about: dict[str, Any] = {"key": _plain(key), "arrays": {}}
    with folder_aside(folder) as aside:
        for array, values in arrays.items():
            blocks = values.make() if isinstance(values, Blocks) else iter([values])
            checksum = Checksum()
            write_flushed(aside / f"{array}.bin", parts=map(checksum.add, map(_bytes, blocks)))
            about["arrays"][array] = [str(values.dtype), list(values.shape), checksum.value]
        write_flushed(aside / ABOUT, json.dumps(about).encode())


def copied(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows in memory; what the system read around them no longer counts as memory of this process."""
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for start in range(0, len(rows), ROWS):
        taken[start : start + ROWS] = array[rows[start : start + ROWS]]
        if isinstance(array, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
    return taken


def derived_bytes(storage: Storage) -> int:
    """Bytes of all that is kept beside a cache."""
    total = 0
    if isinstance(storage, LocalStorage):
        for file in (storage.root / DERIVED).rglob("*.bin"):
            with suppress(OSError):
                total += file.stat().st_size
    return total


def folder_of(storage: Storage, name: str, key: Mapping[str, Any], place: Path | None = None) -> Path | None:
    """Where something of this name and key is kept: beside the cache, or in `place`. None on an object store."""
    if place is None and isinstance(storage, LocalStorage):
        place = storage.root / DERIVED
    return None if place is None else place / f"{name}-{sha256(json.dumps(_plain(key)).encode())[:16]}"


class Unfinished:
    """Arrays that get longer block by block, in a hidden folder beside the one that they are for.

    Only the process that holds the lock of `write_once` makes one. A kill loses what came after the last `save`.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], types: Mapping[str, np.dtype]) -> None:
        self.folder, self._key, self._types = _aside(folder), _plain(key), dict(types)
        self.n = self._begun()  # entries of each array
        self._since_save = 0
        self._open = ExitStack()
        self._files: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Unfinished:
        for name, dtype in self._types.items():
            self._files[name] = file = self._open.enter_context(open(self.folder / f"{name}.bin", "ab"))
            file.truncate(self.n[name] * dtype.itemsize)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def append(self, **arrays: np.ndarray) -> None:
        """Add to the ends of arrays what belongs together: a kill leaves all of it or nothing."""
        for name, values in arrays.items():
            values = np.ascontiguousarray(values, self._types[name])
            self._files[name].write(values.view(np.uint8).data)
            self.n[name] += len(values)
            self._since_save += values.nbytes
        if self._since_save >= DURABLE:
            self.save()

    def save(self) -> None:
        """Make sure of what was appended."""
        for name, file in self._files.items():
            file.flush()
            flush(self.folder / f"{name}.bin")
        arrays = {name: [str(dtype), [self.n[name]], None] for name, dtype in self._types.items()}
        write_durably(self.folder / ABOUT, json.dumps({"key": self._key, "arrays": arrays}).encode())
        self._since_save = 0

    def _begun(self) -> dict[str, int]:
        """What an earlier process made sure of, if it is all there; else an empty folder."""
        try:
            about = parsed((self.folder / ABOUT).read_bytes())
            if about["key"] == self._key:
                n = {name: int(about["arrays"][name][1][0]) for name in self._types}
                if all(_size(self.folder, name) >= n[name] * dtype.itemsize for name, dtype in self._types.items()):
                    return n
        except (OSError, ValueError, TypeError, LookupError):
            pass
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        flush(self.folder.parent)
        return dict.fromkeys(self._types, 0)


def write_once(
    folder: Path, key: Mapping[str, Any], types: Mapping[str, np.dtype], write: Callable[[Unfinished], None]
) -> dict[str, np.ndarray]:
    """Arrays (of one dimension) in a folder, mapped; what is missing of them `write` appends.

    Another process that writes them is waited for.

    Raises:
        OSError: they cannot be written there.
    """
    folder.parent.mkdir(parents=folder.parent.name != DERIVED, exist_ok=True)  # none in a cache that was deleted
    lock = partial(lock_file, folder.with_name(f".{folder.name}.lock"), alone=True, text=str(os.getpid()))
    wait = "Waiting for {}, which writes {}.".format
    with closing(in_turn(lock, lambda held: logger.info(wait(f"process {held}" if held else "another", folder)))):
        if (found := read_folder(folder, key, types, clear=True)) is not None:
            return found
        with Unfinished(folder, key, types) as unfinished:
            write(unfinished)
            unfinished.save()
        name_folder(unfinished.folder, folder)
        found = read_folder(folder, key, types)
    assert found is not None
    return found


def lacking_bytes(folder: Path, needed: int) -> int:
    """By how much a disk is too small for `needed` bytes in a folder on it; part of them may be written already."""
    for file in _aside(folder).glob("*.bin"):
        with suppress(OSError):
            needed -= file.stat().st_size
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    return max(needed - shutil.disk_usage(there).free, 0)


def _clear(folder: Path, file: str = "") -> None:
    logger.warning(f"{folder / file} is damaged; it is made again.")
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone_in(place: Path) -> Iterator[None]:
    """While no other process keeps or deletes anything there; no wait where folders cannot be locked (NFS)."""
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(place, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{NEW}")


def _size(folder: Path, name: str) -> int:
    return (folder / f"{name}.bin").stat().st_size


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return plain


def _mapped(file: Path, dtype: str, shape: list[int]) -> np.ndarray:
    """A file's numbers; ValueError where it has more or fewer of them, or they are none."""
    of = np.dtype(dtype)
    size = math.prod(shape)
    if of.kind not in "biuf" or min(shape, default=0) < 0 or file.stat().st_size != size * of.itemsize:
        raise ValueError(f"{file} is not what is said of it")
    return np.memmap(file, of, "r", shape=tuple(shape)) if size else np.zeros(shape, of)


def _bytes(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class Checksum:
    """CRC-32C of the bytes that were added."""

    value = 0

    def add(self, data: memoryview) -> memoryview:
        """The same bytes."""
        for start in range(0, len(data), _BLOCK):
            self.value = int(google_crc32c.extend(self.value, np.frombuffer(data[start : start + _BLOCK], np.uint8)))
        return data


def _checksum(file: Path) -> int:
    """That of a file, which is not read through its mapping: what was mapped once counts as memory of the process."""
    checksum = Checksum()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            checksum.add(memoryview(block))
    return checksum.value
