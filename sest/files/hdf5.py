"""HDF5 files that nobody vouches for, read without following what leads outside them.

A link, external storage or a virtual dataset can name any file the user may read; a damaged or hostile file can make
the reader allocate, crash or raise almost anything. Here that becomes an InputError of one line.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from sest.errors import InputError, one_line, shown

CHUNK_CACHE = 2**25  # bytes of decompressed chunks HDF5 keeps for each dataset
CHUNK_LIMIT = 2**29  # bytes of one HDF5 chunk, which can only be decompressed whole
# What h5py and AnnData's reader raise for a damaged file, wherever they first touch the damage.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError)


def open_hdf5(path: Path) -> h5py.File:
    """Open for reading. Raises InputError that says what else the file is, where its first bytes tell."""
    if not path.exists():
        raise InputError(f"No such file: {path}.")
    if path.is_dir():
        zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))
        convert = " It is a Zarr store: convert it with anndata.read_zarr(...).write_h5ad(...)." if zarr else ""
        raise InputError(f"{path} is a folder, not an .h5ad file.{convert}")
    try:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an .h5ad file (not HDF5){_looks_like(path)}.")
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        if "truncated" in str(error):
            raise InputError(f"{path} is truncated: copy or download it again.") from error
        raise InputError(f"{path} cannot be opened: {one_line(error)}.") from error


def other_format(file: h5py.File) -> str:
    """Say, as the end of a sentence, what an HDF5 file without obs and var is and how to convert it."""
    if "matrix" in file and "row_attrs" in file:
        return ": it is a loom file; convert it with anndata.io.read_loom(...).write_h5ad(...)"
    if "matrix" in file:
        return ": it is a 10x Genomics .h5; convert it with scanpy.read_10x_h5(...).write_h5ad(...)"
    if "mod" in file:
        return ": it is a MuData file; save one part with mudata.read(...).mod['rna'].write_h5ad(...)"
    return f"; it has {shown(sorted(file))}"


def _looks_like(path: Path) -> str:
    """Say, as the end of a sentence, what a file that is not HDF5 is; "" where its first bytes do not tell."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return ": it is empty"
    for start, words in (
        (b"\x1f\x8b", "it looks like gzip; unpack it with gunzip"),
        (b"PK\x03\x04", "it looks like a zip archive; unpack it"),
        (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file with git lfs pull"),
        (b"%%MatrixMarket", "it looks like Matrix Market; read it with scanpy.read_mtx or scanpy.read_10x_mtx"),
        (b"<", "it looks like an HTML or XML page; the download failed"),
    ):
        if head.lstrip().startswith(start):
            return f": {words}"
    return ""


@contextmanager
def damage_is_bad_input(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a damaged file into an InputError; an InputError passes as it is."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read; is it damaged? {type(error).__name__}: {one_line(error)}.") from error


def child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return a member of a group, refusing links: a link can name any file the user may read."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise bad(group, f"has {name!r} as a link, which is not followed; save a copy of the file with anndata")
    return group[name]


def _check_dataset(dataset: h5py.Dataset) -> None:
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise bad(dataset, "is no array")
    if dataset.external or dataset.is_virtual:
        raise bad(dataset, "is stored in another file, which is not read; save a copy of the file with anndata")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > CHUNK_LIMIT:
        raise bad(dataset, f"has chunks of more than {CHUNK_LIMIT >> 20} MiB; save the file again with anndata")
    filters = dataset.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, _, _, name = filters.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            label = _text(name) or "no name"
            raise bad(dataset, f"needs HDF5 filter {code} ({label}); save the file again with compression='gzip'")


def check_numbers(dataset: h5py.Dataset) -> None:
    """Refuse what is not an array of numbers that lies in this file and can be decompressed."""
    _check_dataset(dataset)
    if dataset.dtype.kind not in "fiub":
        raise bad(dataset, f"has type {dataset.dtype}; expected numbers")


def table_length(table: h5py.Group) -> int:
    """Rows of obs or var, read from the shape of its index."""
    index = attribute(table, "_index") or "_index"
    if "/" in index or index not in table:
        raise bad(table, f"has no index {index!r}")
    column = child(table, index)
    while isinstance(column, h5py.Group):  # categorical (codes) or nullable (values)
        column = child(column, "codes" if "codes" in column else "values")
    return int(column.shape[0]) if column.shape else 0


def read_table(table: h5py.Group, n_rows: int) -> pd.DataFrame:
    """Read obs or var whole, after walking all that AnnData's reader may open."""
    from anndata import OldFormatWarning  # anndata is slow to import
    from anndata._io.specs.registry import IORegistryError  # not public, but what read_elem raises
    from anndata.io import read_elem

    _walk(table, n_rows, set())
    columns = [_text(name) for name in np.ravel(table.attrs.get("column-order", ()))]
    if outside := [name for name in columns if name.startswith("/")]:
        raise bad(table, f"names columns outside itself: {shown(outside)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldFormatWarning)  # AnnData 0.7 and 0.8 files are read all the same
        try:
            frame = read_elem(table)
        except IORegistryError as error:  # an encoding newer than the installed AnnData
            raise bad(table, f"cannot be read: {one_line(error)}") from error
        except ValueError as error:
            for name in columns:
                column = table.get(name)
                if isinstance(column, h5py.Dataset) and column.ndim != 1:
                    what = f"is a table of shape {column.shape} and no column; save it as one, or without it"
                    raise bad(column, what) from error
            raise
    frame.index = frame.index.astype(str)
    return frame


def _walk(item: h5py.Group | h5py.Dataset, n_rows: int, seen: set[Any]) -> None:
    """Check every object under a table once: own storage, plausible size, an encoding that holds labels or numbers."""
    if item in seen:
        return
    seen.add(item)
    encoding = attribute(item, "encoding-type") or "array"
    allowed = ("array", "string-array", "categorical", *(("dataframe",) if len(seen) == 1 else ()))
    if encoding not in allowed and not encoding.startswith("nullable-"):
        raise bad(item, f"is stored as {encoding!r}, which is no column of labels or numbers")
    if "categories" in item.attrs:  # a categorical column as AnnData 0.7 wrote it
        target = item.attrs["categories"]
        if not isinstance(target, h5py.Reference):  # a name could lead through a link
            raise bad(item, "names its categories instead of referring to them")
        _walk(item.file[target], n_rows, seen)
    if isinstance(item, h5py.Group):
        for name in item:
            _walk(child(item, name), n_rows, seen)
        return
    _check_dataset(item)
    if item.size * item.dtype.itemsize > 1024 * max(n_rows, 2**16):
        raise bad(item, f"is too large for a column of {n_rows} rows: {item.size} entries")


def attribute(item: h5py.HLObject, name: str) -> str:
    """Return a text attribute, or "" where there is none."""
    return _text(item.attrs.get(name, ""))


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def bad(item: h5py.HLObject, problem: str) -> InputError:
    """The error that names a place in the file and its problem."""
    return InputError(f"{item.file.filename}: {item.name} {problem}.")
