"""Durable writes: the one place that renames and flushes. A file or folder appears whole under its name, or not at all.

Always in this order: written aside, flushed to the disk, renamed, and the folder that holds the name flushed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

PARTIAL = ".partial"  # ends the name of a file that is being written
NEW, OLD = ".new", ".old"  # end the hidden names of folders that are being written, or being replaced
GONE = ".gone"  # ends that of a folder that is being deleted


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file's bytes, or a folder's names (new files, renames), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around writes to an open file: an error of the disk says of which file it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_flushed(path: Path, *data: bytes | memoryview, parts: Iterable[bytes | memoryview] = ()) -> None:
    """Write a file and flush its bytes; its name is the caller's to make durable (see `folder_aside`).

    Args:
        data: all of it.
        parts: what follows, made as it is written.
    """
    _write(path, chain(data, parts), "wb")


def append_durably(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file, which need not exist."""
    new = not path.exists()
    _write(path, [data], "ab")
    if new:
        flush(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file of which this process is the only writer."""
    write_aside(path, data)
    flush(path.parent)


def write_aside(path: Path, data: bytes) -> None:
    """Write a file aside and rename it, or leave nothing; the caller flushes the folder, once for many files."""
    aside = path.with_name(path.name + PARTIAL)
    try:
        write_flushed(aside, data)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, of this process alone. It becomes `path` at the end of the block, or goes."""
    aside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask says, which some writers do not ask
        aside.unlink()
        yield aside
        os.chmod(aside, mode)
        flush(aside)
        os.replace(aside, path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(folder: Path, *, parents: bool = False) -> Iterator[Path]:
    """An empty folder to write files in with `write_flushed`. It becomes `folder` at the end of the block, or goes.

    Folders above it that are not there are made with `parents`. An older folder is replaced. A kill between the two
    renames leaves it as `.<name>.old`.
    """
    aside = folder.with_name(f".{folder.name}{NEW}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=parents)
    try:
        yield aside
        name_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def name_folder(aside: Path, folder: Path) -> None:
    """Give a folder of flushed files its name; an older folder of that name is replaced (see `folder_aside`)."""
    old = folder.with_name(f".{folder.name}{OLD}")
    flush(aside)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(aside, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder that no other process writes. Its name goes first: a kill leaves it whole, or as `.<name>.gone`.

    Raises:
        OSError: it is still there, or what could not be deleted of it is as `.<name>.gone`.
    """
    gone = folder.with_name(f".{folder.name}{GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    flush(folder.parent)
    shutil.rmtree(gone)


def _write(path: Path, parts: Iterable[bytes | memoryview], mode: str) -> None:
    with naming(path), open(path, mode) as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
