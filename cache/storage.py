"""Where a cache's files lie: a local folder, or any URL that fsspec knows (s3://, gs://, memory:// ...).

A file is written whole, from memory, or not at all. Locally that is: bytes aside, fsync, rename, fsync of the folders.
Object stores write whole objects anyway. Names are relative to the cache, with slashes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import zarr
from zarr.abc.store import Store

from sest.cache.disk import PARTIAL, append_durably, flush, sha256_file, write_aside
from sest.cache.schema import CacheError
from sest.errors import is_out_of_memory, one_line

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=.)")  # a scheme has two letters or more; pathlib makes s3:// to s3:/
# Protocols that lead on to a place named by what they read.
INDIRECT = ("reference", "generic", "filecache", "simplecache", "blockcache", "cached", "dir", "zip", "tar")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a network file system
T = TypeVar("T")
logger = logging.getLogger(__name__)
_BLOCK = 2**24  # bytes read at once where a file is only hashed


class Storage(Protocol):
    """The files of one cache."""

    url: str  # as the user may give it again: an absolute path, or a URL

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file; a start below 0 counts from its end. Raises FileNotFoundError."""

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file below a folder by name, without what unfinished writes left."""

    def here(self) -> list[str]:
        """Names of the files and folders directly in the cache; empty where there is none yet."""

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes. Raises FileNotFoundError."""

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write whole files; each is there afterwards, durably, whatever happens."""

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of a file that only this process writes, durably."""

    def remove(self, names: Iterable[str]) -> None:
        """Delete files that are there."""

    def remove_folder(self, name: str) -> None:
        """Delete a folder with all in it, if it is there."""

    def hold(self, name: str, *, alone: bool, text: str) -> Lock:
        """Lock a file of the cache while the result is open; raises Held if another process has it."""

    def sweep(self) -> None:
        """Delete what unfinished writes left, once no other process writes."""

    def zarr_store(self) -> Store:
        """For reading."""

    def reached(self) -> AbstractContextManager[None]:
        """Around what reads or writes: what an object store's package raises becomes a CacheError of one line."""


class Held(Exception):
    """Another process holds a lock. Args: what it wrote into the file."""


class Lock:
    """A file lock; nothing, where the storage has none. The kernel drops it with the process."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file

    def is_there(self) -> bool:
        """Whether its file still has its name: not where the cache was deleted or moved meanwhile."""
        return self._file is None or _is_there(self._file, Path(self._file.name))

    def is_alone(self) -> bool:
        """Whether no other process shares it; then none can have it until it is closed."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # there are no locks: the one that goes on without is alone
            return True
        return True

    def close(self) -> None:
        """Let go."""
        if self._file is not None:
            self._file.close()


def lock_file(path: Path, *, alone: bool, text: str) -> Lock:
    """Lock a local file while the result is open. Raises Held if another process has it, and OSError.

    Where the file system has no locks, a process that is to be alone goes on without one, which is said.
    """
    while True:
        file = open(path, "a+")  # noqa: SIM115 - the lock lasts as long as it is open
        try:
            try:
                fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except OSError as error:
                if not alone or error.errno not in NO_LOCKS:
                    raise
                logger.warning(f"{path.parent} has no locks of files: see to it that no other process writes there.")
            if not _is_there(file, path):  # deleted by the one who held it, since it was opened
                file.close()
                continue
            file.truncate(0)
            file.write(text)
            file.flush()
        except BlockingIOError as error:
            file.seek(0)
            held = file.read().strip()
            file.close()
            raise Held(held) from error
        except OSError:
            file.close()
            raise
        return Lock(file)


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_url(path: str | Path) -> bool:
    """Whether a cache's path is a URL, and not a local one (file:// is local)."""
    found = _URL.match(str(path))
    return found is not None and found[1] not in ("file", "local")


def leads_on(url: str) -> bool:
    """Whether a URL leads through one place to another, which can be any file the user may read: a::b, reference://."""
    return "::" in url or url.partition(":")[0] in INDIRECT


def storage_at(path: str | Path) -> Storage:
    """The storage of a path or URL. A URL that went through pathlib.Path (s3:/bucket) is understood.

    Raises:
        CacheError: a URL of a kind that is unknown, whose package is not installed, or that leads on to another.
    """
    text = str(path)
    if is_url(text):
        if leads_on(text):
            raise CacheError(
                f"{text} leads through one place to another, which is not followed. Give the cache's own URL."
            )
        return RemoteStorage(_URL.sub(r"\1://", text, count=1))
    return LocalStorage(Path(re.sub(r"^(file|local):/+", "/", text)))


def open_group(storage: Storage, name: str) -> zarr.Group:
    """Open a Zarr group of the cache for reading."""
    with storage.reached():
        return zarr.open_group(storage.zarr_store(), path=name, mode="r", zarr_format=3, use_consolidated=False)


# What zarr, numcodecs and anndata raise where bytes are not what they should be.
_UNREADABLE = (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, EOFError, OSError)


@contextmanager
def reading(storage: Storage, what: str) -> Iterator[None]:
    """Around what reads a file, or an array, of a cache: what goes wrong becomes a CacheError of one line."""
    try:
        with storage.reached():
            yield
    except CacheError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, OSError) and is_out_of_memory(error):
            raise
        if isinstance(error, FileNotFoundError) and not storage.here():
            raise CacheError(f"{storage} was deleted or moved while it was read.") from error
        if isinstance(error, FileNotFoundError):
            why = "it is not there any more"
        else:
            why = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise CacheError(
            f"{storage} is damaged: {what} cannot be read ({why}). Delete that, and the same `sest embed` command "
            "writes it again."
        ) from error


def unlike(storage: Storage, why: str) -> CacheError:
    """The error of a cache whose hashes are right and whose content is not."""
    return CacheError(
        f"{storage} is not a cache as sest writes it: {why}. Its checksums fit, so this is how it was made: get it "
        "again from where it comes from, or embed again."
    )


class LocalStorage:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root.absolute())

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with open(self.root / name, "rb", buffering=0) as file:
            file.seek(start, os.SEEK_SET if start >= 0 else os.SEEK_END)
            return file.readall() if stop is None else file.read(stop - start)

    def sizes(self, below: str = "") -> dict[str, int]:
        found = {}
        for folder, _, files in os.walk(self.root / below):
            for file in files:
                path = os.path.join(folder, file)
                if not file.endswith(PARTIAL):
                    found[os.path.relpath(path, self.root)] = os.stat(path).st_size
        return found

    def here(self) -> list[str]:
        return sorted(os.listdir(self.root)) if self.root.is_dir() else []

    def sha256(self, name: str) -> str:
        return sha256_file(self.root / name)

    def write(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            for folder in reversed(self._parents(name)[:-1]):  # never the cache's own, which somebody may have deleted
                folder.mkdir(exist_ok=True)
            write_aside(self.root / name, data)
        for folder in sorted({parent for name in files for parent in self._parents(name)}):
            flush(folder)

    def append(self, name: str, data: bytes) -> None:
        append_durably(self.root / name, data)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)
            flush((self.root / name).parent)

    def remove_folder(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def hold(self, name: str, *, alone: bool, text: str) -> Lock:
        try:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            return lock_file(self.root / name, alone=alone, text=text)
        except OSError as error:
            raise CacheError(f"Cannot write to {self.root}: {error.strerror}. Choose another --cache path.") from error

    def zarr_store(self) -> Store:
        return zarr.storage.LocalStore(self.root, read_only=True)

    def reached(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def sweep(self) -> None:
        for stray in self.root.rglob("*" + PARTIAL):
            stray.unlink(missing_ok=True)

    def _parents(self, name: str) -> list[Path]:
        return [self.root / parent for parent in Path(name).parents]


def _reaching(method: Callable[..., T]) -> Callable[..., T]:
    """Run a method of RemoteStorage within `reached`."""

    @functools.wraps(method)
    def call(self: RemoteStorage, *arguments: Any) -> T:
        with self.reached():
            return method(self, *arguments)

    return call


class RemoteStorage:
    """An object store, through fsspec. It has no locks: a process number (--rank) must run once only."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CacheError(f"{url} cannot be used as a cache: {error}") from error

    def __str__(self) -> str:
        return self.url

    @contextmanager
    def reached(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, CacheError, ValueError, KeyError, MemoryError):
            raise  # no such object; damage; not the storage's
        except Exception as error:  # packages for object stores have no error in common
            words = " ".join(str(error).split()) or type(error).__name__
            raise CacheError(f"{self.url} cannot be reached: {words}.") from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @_reaching
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data: bytes = self._fs.cat_file(self._path(name), start=start or None, end=stop)
        return data

    @_reaching
    def sizes(self, below: str = "") -> dict[str, int]:
        start = len(self._path(""))
        self._fs.invalidate_cache()  # listings are kept otherwise, and other processes write too
        return {
            path[start:]: int(about["size"])
            for path, about in self._fs.find(self._path(below), detail=True).items()
            if len(path) > start
        }

    @_reaching
    def here(self) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False))

    @_reaching
    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(self._path(name), "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    @_reaching
    def write(self, files: Mapping[str, bytes]) -> None:
        try:
            self._fs.pipe({self._path(name): data for name, data in files.items()})
        except FileNotFoundError as error:
            raise CacheError(f"{self.url} cannot be written: {error}.") from error

    def append(self, name: str, data: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            data = self.read(name) + data
        self.write({name: data})

    @_reaching
    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    @_reaching
    def remove_folder(self, name: str) -> None:
        if self._fs.exists(self._path(name)):
            self._fs.rm(self._path(name), recursive=True)

    def hold(self, name: str, *, alone: bool, text: str) -> Lock:
        return Lock()

    def sweep(self) -> None:
        """Nothing: an object is there whole or not at all."""

    def zarr_store(self) -> Store:
        store: Any = zarr.storage.FsspecStore.from_url(self.url, read_only=True)
        assert isinstance(store, Store)
        return store
