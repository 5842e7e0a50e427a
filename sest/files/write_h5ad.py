"""Write an .h5ad in blocks of rows, with bounded memory; the file appears under its name only when it is whole."""

from __future__ import annotations

import io
import re
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from sest.cache.disk import file_aside
from sest.errors import InputError
from sest.outputs import check_output

HDF5_CHUNK = 2**16  # stored values a chunk: what reading one row unpacks
ALIKE = 1 / 32  # share of bytes equal to the one before from which on packing pays; of random ones 1/256
WAITING = 4  # chunks that wait to be written, at most
CHECKED_AT_ONCE = 2**22  # bytes
SEAL_BYTES = len(b"\nsest crc32c 00000000 of 00000000000000000000\n")
_SEALED = re.compile(rb"\nsest crc32c [0-9a-f]{8} of [0-9]{20}\n")


class H5adWriter:
    """A context manager that takes rows of X block by block, then the tables.

    Args:
        path: the file to make; one that exists is replaced when the new one is whole.
        n_genes: columns of X.
        dtype: of the stored values.
        compress: deflate the values (see `_deflated`), which every reader of HDF5 undoes by itself.

    Raises:
        InputError: no file can be made there (see `check_output`).
        OSError: the disk is full, or fails otherwise; nothing is left of the new file.
    """

    def __init__(self, path: Path, n_genes: int, dtype: str, *, compress: bool = True) -> None:
        check_output(path, force=True)
        self._path, self._n_genes, self._dtype, self._compress = path, n_genes, dtype, compress
        self._stack = ExitStack()
        self._ends = [0]  # row ends among the stored values
        self._finished = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            aside = stack.enter_context(file_aside(self._path))
            self._disk = stack.enter_context(_Disk(aside, self._path))
            self._file = h5py.File(self._disk, "w")
            stack.push(self._close)
            self._packer = stack.enter_context(_Packer(_deflated if self._compress else np.ndarray.tobytes))
            self._stack = stack.pop_all()
        self._file.attrs["encoding-type"], self._file.attrs["encoding-version"] = "anndata", "0.1.0"
        x = self._file.create_group("X")
        x.attrs["encoding-type"], x.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        self._data, self._indices = (
            _Values(x, name, dtype, self._compress, self._packer)
            for name, dtype in (("data", self._dtype), ("indices", "int32"))
        )
        return self

    # Not by anndata's sparse append: it grows indptr and the shape in the file with every block, so that the file's
    # bytes would depend on the blocks.
    def add(self, rows: scipy.sparse.csr_matrix) -> None:
        """Append rows (n, n_genes); a row's genes are written in order, as other programs expect."""
        assert rows.shape[1] == self._n_genes, rows.shape
        if not rows.has_sorted_indices:
            rows = rows.sorted_indices()
        start = 0
        while start < rows.nnz:  # chunk by chunk: those of both lie in turns in the file, whatever the blocks
            stop = min(rows.nnz, start + self._data.room)
            self._data.add(rows.data[start:stop])
            self._indices.add(rows.indices[start:stop])
            start = stop
        self._disk.check()
        self._ends += (self._ends[-1] + rows.indptr[1:].astype(np.int64)).tolist()

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        """Write the tables; the file gets its name when the block ends."""
        from anndata.io import write_elem  # slow to import

        from sest.cache.layout import with_python_strings

        n_cells = len(self._ends) - 1
        assert (len(obs), len(var)) == (n_cells, self._n_genes), (len(obs), len(var), n_cells)
        self._data.end()
        self._indices.end()
        self._packer.write(0)
        # scipy sorts and sums only where both indices are of one type
        of_ends = np.int32 if self._ends[-1] < 2**31 else np.int64
        self._file["X"].create_dataset("indptr", data=np.asarray(self._ends, dtype=of_ends))
        self._file["X"].attrs["shape"] = (n_cells, self._n_genes)
        for name, table in (("obs", obs), ("var", var)):
            write_elem(self._file, name, with_python_strings(table))
        write_elem(self._file, "uns", uns)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(self._file, name, {})
        self._finished = True

    def _close(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        if e is None or isinstance(e, Exception):
            self._disk.check()  # what HDF5 or anndata then made of it says less
        if self._finished and e is None:
            self._disk.seek(size)
            self._disk.write(_seal(self._disk.path, size))
            self._disk.check()
        assert self._finished or e is not None, "finish() was not called"

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, e, trace)


class _Disk(io.FileIO):
    """The file that HDF5 writes into: it cannot close what it cannot write, and then crashes at exit.

    So the first error is kept, and whatever HDF5 writes from then on is dropped.
    """

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(path, "w+")
        self.path, self._target = path, target
        self._error: OSError | None = None

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        n_bytes = len(left)
        try:
            while self._error is None and left:
                left = left[super().write(left) :]
        except OSError as error:
            self._error = error
        return n_bytes

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        n_read = super().readinto(view) or 0
        view[n_read:] = bytes(len(view) - n_read)  # what was dropped
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        return super().truncate(size) if self._error is None else size or 0

    def check(self) -> None:
        """
        Raises:
            OSError: something could not be written.
        """
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._target)) from self._error


def _seal(path: Path, n_bytes: int) -> bytes:
    """What stands behind an HDF5 file: the CRC-32C of its bytes, as most of them have no checksum of their own.

    HDF5 leaves alone what is behind its end, and drops it when it opens the file to change it.
    """
    crc = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while data := file.read(min(CHECKED_AT_ONCE, n_bytes - file.tell())):
            crc.update(data)
    return b"\nsest crc32c %08x of %020d\n" % (int.from_bytes(crc.digest(), "big"), n_bytes)


def as_written(path: Path) -> Path:
    """The path itself, of a file that `H5adWriter` wrote once all of it is read; others, and changed ones, pass.

    Raises:
        InputError: its checksum does not match.
    """
    n_bytes = path.stat().st_size - SEAL_BYTES if path.is_file() else -1
    if n_bytes < 0:
        return path
    with open(path, "rb") as file:
        file.seek(n_bytes)
        found = file.read()
    if _SEALED.fullmatch(found) and found != _seal(path, n_bytes):
        raise InputError(f"{path} is damaged: it is not as sest wrote it (its CRC-32C differs). Make or copy it again.")
    return path


class _Packer:
    """Packs chunks in a thread of its own, while the next cells are made, and writes them in the order they came.

    Args:
        pack: a chunk's values to bytes.
    """

    def __init__(self, pack: Callable[[np.ndarray], bytes]) -> None:
        self._pack = pack
        self._waiting = deque[tuple[h5py.Dataset, int, int, Future[bytes]]]()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "pack")
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, dataset: h5py.Dataset, start: int, stop: int, chunk: np.ndarray) -> None:
        """Take a chunk, whose values are [start, stop) of a dataset; one that waited longest may be written."""
        self._waiting.append((dataset, start, stop, self._thread.submit(self._pack, chunk)))
        self.write(WAITING)

    def write(self, left: int) -> None:
        """Write chunks until at most so many wait."""
        while len(self._waiting) > left:
            dataset, start, stop, packed = self._waiting.popleft()
            dataset.resize((stop,))
            dataset.id.write_direct_chunk((start,), packed.result())


class _Values:
    """A dataset that grows, written chunk by chunk: its bytes do not depend on how the values come."""

    def __init__(self, group: h5py.Group, name: str, dtype: str, compress: bool, packer: _Packer) -> None:
        filters = {"shuffle": True, "compression": "gzip", "compression_opts": 1} if compress else {}
        self._dataset = group.create_dataset(
            name, shape=(0,), maxshape=(None,), chunks=(HDF5_CHUNK,), dtype=dtype, **filters
        )
        self._packer, self._chunk = packer, np.zeros(HDF5_CHUNK, dtype)
        self._start, self._filled = 0, 0  # values before the chunk, and in it

    @property
    def room(self) -> int:
        """How many values the chunk still takes, at least one."""
        return HDF5_CHUNK - self._filled

    def add(self, values: np.ndarray) -> None:
        """Take values, no more than there is room for."""
        stop = self._filled + len(values)
        self._chunk[self._filled : stop] = values
        self._filled = stop
        if not self.room:
            self.end()

    def end(self) -> None:
        """Hand on the chunk as far as there is one; what is behind its values is zero."""
        if self._filled:
            stop = self._start + self._filled
            self._packer.put(self._dataset, self._start, stop, self._chunk)
            self._chunk = np.zeros_like(self._chunk)
            self._start, self._filled = stop, 0


def _deflated(values: np.ndarray) -> bytes:
    """Values as HDF5's filters shuffle and deflate have them, which any reader undoes: one zlib stream.

    Shuffle puts the first bytes of all values before their second ones, and so on. Of these planes some are all but
    random (the low bytes of log1p values and of gene numbers), and on them HDF5 would spend most of its time in vain:
    here they are stored as they are. The others are packed by runs and Huffman codes alone, quicker than by looking for
    longer matches, and no larger. Source of the format: RFC 1950 and 1951.
    """
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)
    stream = bytearray(b"\x78\x01")
    for number, plane in enumerate(planes):
        level = int(np.count_nonzero(plane[1:] == plane[:-1]) > ALIKE * len(plane))  # 0: stored
        packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        stream += packer.compress(plane)
        stream += packer.flush(zlib.Z_FINISH if number == len(planes) - 1 else zlib.Z_FULL_FLUSH)
    return bytes(stream + zlib.adler32(planes.data).to_bytes(4, "big"))
