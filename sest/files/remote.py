"""Files at a URL: what fsspec opens (https://, s3://, gs:// ...), spoken of as a path and read as HDF5 needs it."""

from __future__ import annotations

import gc
import io
import re
from pathlib import Path
from typing import Any

from sest.cache.storage import is_url, leads_on
from sest.errors import InputError, one_line

BLOCK = 2**22  # bytes asked for at once
BLOCKS = 32  # blocks of a file that are kept


class UrlPath(type(Path())):  # type: ignore[misc]
    """A URL as a path, for its name and ending; as text it is the URL, of which pathlib keeps one slash only."""

    def __str__(self) -> str:
        return re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", super().__str__())

    @property
    def name(self) -> str:
        """The last part, without a query."""
        return re.sub(r"[?#].*", "", super().name)


def located(path: str | Path) -> Path:
    """A path, or the URL it is; file:// is a path."""
    return UrlPath(path) if is_url(path) else Path(re.sub(r"^(file|local):/+", "/", str(path)))


def check_url(url: str) -> None:
    """Refuse a URL that leads on to another place, which can be any file the user may read.

    Raises:
        InputError: a chain (a::b), or a protocol that reads elsewhere.
    """
    if leads_on(url):
        raise InputError(f"{url} leads through one place to another, which is not followed. Give the file's own URL.")


def reason(error: BaseException) -> str:
    """Why a URL cannot be read, as one line says it."""
    words = one_line(error) or type(error).__name__
    return "nothing is there, or no server answers" if isinstance(error, FileNotFoundError) else words


class RemoteFile(io.RawIOBase):
    """The bytes of a URL, a block at a time; h5py reads from it, and calls it by its URL.

    Raises:
        InputError: an unknown protocol, a package that is not installed, nothing there, no permission, or a server
            that only sends whole files.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url
        self._file: Any = io.BytesIO()  # what `close` finds, which Python calls too where nothing could be opened
        check_url(url)
        try:
            fs, path = fsspec.core.url_to_fs(url)
            options = {"block_size": BLOCK, "cache_type": "blockcache", "cache_options": {"maxblocks": BLOCKS}}
            self._file = fs.open(path, "rb", **({} if "memory" in fs.protocol else options))
        except Exception as error:  # packages for object stores have no error in common
            raise InputError(f"{url} cannot be opened: {reason(error)}.") from error
        try:
            self._file.seek(1)
            self._file.seek(0)
        except (ValueError, OSError) as error:
            self._file.close()
            raise InputError(f"{url} is on a server that only sends whole files. Download it first.") from error

    def __repr__(self) -> str:
        return self.url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        # h5py holds its lock while it waits here for fsspec's thread. A garbage collection in that thread may come upon
        # objects of h5py, which take the lock to go: both would wait for ever.
        collects = gc.isenabled()
        gc.disable()
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # see above
            raise InputError(f"{self.url} cannot be read: {reason(error)}.") from error
        finally:
            if collects:
                gc.enable()
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
