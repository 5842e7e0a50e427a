"""Write an .h5ad in blocks of rows, with bounded memory; the file appears under its name only when it is whole."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import pandas as pd
import scipy.sparse

from sest.cache.disk import file_aside
from sest.outputs import check_output

HDF5_CHUNK = 2**18  # stored values a chunk
SPARE = 2**23  # bytes kept free for HDF5's own tables and half-filled chunks
A_NAME = 64  # bytes, at most, that HDF5 adds to a string


class H5adWriter:
    """A context manager that takes rows of X block by block, then the tables.

    Args:
        path: the file to make; one that exists is replaced when the new one is whole.
        n_genes: columns of X.
        dtype: of the stored values.

    Raises:
        InputError: no file can be made there (see `check_output`).
        OSError: the disk is full; nothing is left of the new file.
    """

    def __init__(self, path: Path, n_genes: int, dtype: str) -> None:
        check_output(path, force=True)
        self._path, self._n_genes, self._dtype = path, n_genes, dtype
        self._stack = ExitStack()
        self._ends = [0]  # row ends among the stored values
        self._finished = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            aside = stack.enter_context(file_aside(self._path))
            self._disk = stack.enter_context(open(aside, "wb"))
            self._take_room(SPARE)
            self._file = h5py.File(aside, "w")
            stack.push(self._close)
            self._take_room(SPARE)  # again: opening empties the file
            self._stack = stack.pop_all()
        self._file.attrs["encoding-type"], self._file.attrs["encoding-version"] = "anndata", "0.1.0"
        x = self._file.create_group("X")
        x.attrs["encoding-type"], x.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        self._data, self._indices = (
            x.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(HDF5_CHUNK,), dtype=dtype)
            for name, dtype in (("data", self._dtype), ("indices", "int32"))
        )
        return self

    def _take_room(self, n_bytes: int) -> None:
        """Lengthen the file before HDF5 writes: it cannot close what it cannot write, and crashes at exit."""
        if hasattr(os, "posix_fallocate"):  # not on macOS
            try:
                os.posix_fallocate(self._disk.fileno(), 0, n_bytes)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _take_more(self, n_bytes: int) -> None:
        self._take_room(self._file.id.get_filesize() + n_bytes + SPARE)

    # Not by anndata's sparse append: it grows indptr and the shape in the file with every block, so that the file's
    # bytes would depend on the blocks; room on the disk would have to be taken here all the same.
    def add(self, rows: scipy.sparse.csr_matrix) -> None:
        """Append rows (n, n_genes); a row's genes are written in order, as other programs expect."""
        assert rows.shape[1] == self._n_genes, rows.shape
        if not rows.has_sorted_indices:
            rows = rows.sorted_indices()
        self._take_more(rows.data.nbytes + rows.indices.nbytes)
        first = self._ends[-1]
        for dataset, values in ((self._data, rows.data), (self._indices, rows.indices)):
            dataset.resize((first + rows.nnz,))
            dataset[first:] = values
        self._ends += (first + rows.indptr[1:].astype(np.int64)).tolist()

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
        """Write the tables; the file gets its name when the block ends."""
        from anndata.io import write_elem  # slow to import

        n_cells = len(self._ends) - 1
        assert (len(obs), len(var)) == (n_cells, self._n_genes), (len(obs), len(var), n_cells)
        self._take_more(8 * len(self._ends) + _n_bytes(obs) + _n_bytes(var) + _n_bytes(uns))
        # scipy sorts and sums only where both indices are of one type
        of_ends = np.int32 if self._ends[-1] < 2**31 else np.int64
        self._file["X"].create_dataset("indptr", data=np.asarray(self._ends, dtype=of_ends))
        self._file["X"].attrs["shape"] = (n_cells, self._n_genes)
        for name, value in (("obs", obs), ("var", var), ("uns", uns)):
            write_elem(self._file, name, value)
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            write_elem(self._file, name, {})
        self._finished = True

    def _close(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        size = self._file.id.get_filesize()
        self._file.close()
        self._disk.truncate(size)  # give back what was reserved for nothing
        assert self._finished or e is not None, "finish() was not called"

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, e, trace)


def _n_bytes(value: Any) -> int:
    """Bytes that a table, an array or a dictionary of them takes in the file, at most."""
    if isinstance(value, pd.DataFrame):
        return 2 * int(value.memory_usage(deep=True).sum()) + A_NAME * len(value) * (1 + value.shape[1])
    if isinstance(value, dict):
        return sum(A_NAME + _n_bytes(inner) for inner in value.values())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return int(value.nbytes)
    return sum(A_NAME + 4 * len(str(item)) for item in np.ravel(value))
