"""Groups and arrays of an HDF5 or a Zarr file that nobody vouches for, read without following what leads outside.

A link, external storage or a virtual dataset can name any file the user may read; a codec can execute what it decodes;
a damaged or hostile file can make the reader allocate, crash or raise almost anything. Here that becomes an InputError
of one line. h5py and zarr agree on shape, dtype, attrs and slices; where they do not, this module decides.
"""

from __future__ import annotations

import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from sest.errors import InputError, one_line

Group = Any  # h5py.Group | zarr.Group, but h5py has no types
Array = Any  # h5py.Dataset | zarr.Array
Node = Any  # Group | Array

CHUNK_LIMIT = 2**29  # bytes of one chunk, which can only be decompressed whole
MAX_DEPTH = 8  # of groups below one that is read whole
MAX_NODES = 10_000  # groups and arrays below it
SMALL = 2**28  # bytes of an array that need not be in the file
MOST_COMPRESSED = 1100  # times, of which zlib reaches 1032
# What h5py, zarr and numcodecs raise for a damaged file, wherever they first touch the damage.
DAMAGE = (
    OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, EOFError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# What Zarr arrays may be stored with: codecs that turn bytes into numbers and text, and nothing that can run code.
ZARR_CODECS = frozenset(
    "bytes blosc zstd gzip zlib bz2 lzma lz4 shuffle delta bitround quantize fixedscaleoffset packbits astype "
    "transpose crc32 crc32c adler32 fletcher32 sharding_indexed vlen-utf8 vlen-bytes".split()
)
# HDF5 filters that the package hdf5plugin brings.
PLUGIN_FILTERS = frozenset({307, 32001, 32004, 32008, 32013, 32014, 32015, 32017, 32018, 32024, 32026, 32028})


@contextmanager
def damage_is_bad_input(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a damaged file into an InputError; an InputError passes as it is."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read; is it damaged? {type(error).__name__}: {one_line(error)}.") from error


def is_array(node: object) -> bool:
    """Whether it is an array, and not a group."""
    return isinstance(node, h5py.Dataset | zarr.Array)


def child(group: Group, name: str) -> Any:
    """Return a member of a group, refusing links: a link can name any file the user may read.

    `name` may lead through groups: AnnData writes a column "a/b" so. Returns a Node; Any, as mypy cannot tell which.
    """
    first, _, rest = name.partition("/")
    if isinstance(group, h5py.Group) and not isinstance(group.get(first, getlink=True), h5py.HardLink):
        raise bad(group, f"has {first!r} as a link, which is not followed; save a copy of the file with anndata")
    node = group[first]
    return child(node, rest) if rest else node


def check_stored(array: Array) -> None:
    """Refuse an array that does not lie in this file, or cannot be decompressed here."""
    if not is_array(array) or array.shape is None:
        raise bad(array, "is no array")
    chunks = array.chunks
    if chunks and math.prod(chunks) * array.dtype.itemsize > CHUNK_LIMIT:
        raise bad(array, f"has chunks of more than {CHUNK_LIMIT >> 20} MiB; save the file again with anndata")
    if isinstance(array, zarr.Array):
        if unknown := sorted(set(_codecs(array)) - ZARR_CODECS):
            raise bad(array, f"is stored with the codec {unknown[0]!r}, which is not read; save it again with anndata")
        return
    if array.external or array.is_virtual:
        raise bad(array, "is stored in another file, which is not read; save a copy of the file with anndata")
    filters = array.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, _, _, name = filters.get_filter(i)
        if not _filter_is_here(code):
            cure = "pip install hdf5plugin, or " if code in PLUGIN_FILTERS else ""
            label = _text(name) or "no name"
            raise bad(array, f"needs HDF5 filter {code} ({label}): {cure}save the file again with compression='gzip'")


def check_numbers(array: Array) -> None:
    """Refuse what is not an array of numbers that lies in this file and can be decompressed."""
    check_stored(array)
    if array.dtype.kind not in "fiub":
        raise bad(array, f"has type {array.dtype}; expected numbers")


def check_whole(array: Array) -> None:
    """Refuse an array that is going to be read whole and is large because its chunks were never written, or are alike.

    Such a file of some kilobytes can ask for any memory.
    """
    n_bytes = array.size * array.dtype.itemsize
    if n_bytes > SMALL:
        stored = array.nbytes_stored() if isinstance(array, zarr.Array) else array.id.get_storage_size()
        if n_bytes > MOST_COMPRESSED * stored:
            raise bad(array, f"says {array.size:,} entries, but has {stored:,} bytes in the file")


def check_below(node: Node, largest: int) -> None:
    """Check everything below a group that is going to be read whole; no array may have more than `largest` bytes."""
    waiting, n_nodes = [(node, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        n_nodes += 1
        if depth > MAX_DEPTH or n_nodes > MAX_NODES:  # a group can be a member of several, and of itself
            raise bad(node, "lies too deep" if depth > MAX_DEPTH else f"is one of more than {MAX_NODES:,} members")
        if is_array(node):
            check_stored(node)
            check_whole(node)
            if node.size * node.dtype.itemsize > largest:
                raise bad(node, f"is too large: {node.size} entries")
        else:
            waiting += [(child(node, name), depth + 1) for name in itertools.islice(node, MAX_NODES)]


def attribute(node: Node, name: str) -> str:
    """Return a text attribute, or "" where there is none; R's writers make arrays of one element of them."""
    value = node.attrs.get(name, "")
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    return _text(value)


def texts(node: Node, name: str) -> list[str]:
    """Return an attribute that is a list of texts; [] where there is none."""
    return [_text(value) for value in np.ravel(node.attrs.get(name, ()))]


def container(node: Node) -> str:
    """Path or URL of the file that a node lies in."""
    if not isinstance(node, zarr.Group | zarr.Array):
        return str(node.file.filename)
    store = node.store_path.store
    if isinstance(store, zarr.storage.FsspecStore):
        return str(store.fs.unstrip_protocol(store.path))
    return str(getattr(store, "root", None) or getattr(store, "path", store))


def bad(node: Node, problem: str) -> InputError:
    """The error that names a place in the file and its problem."""
    return InputError(f"{container(node)}: {node.name} {problem}.")


def _codecs(array: zarr.Array) -> Iterator[str]:
    """Names of all codecs an array is stored with, those within shards too; as numcodecs calls them."""
    metadata = array.metadata
    if metadata.zarr_format == 2:
        for stored in (*(metadata.filters or ()), metadata.compressor):
            if stored is not None:
                yield str(stored.codec_id)
        return
    waiting: list[Any] = list(metadata.codecs)
    while waiting:
        codec = waiting.pop()
        waiting += [*getattr(codec, "codecs", ()), *getattr(codec, "index_codecs", ())]
        yield str(codec.to_dict()["name"]).removeprefix("numcodecs.")


def _filter_is_here(code: int) -> bool:
    if not h5py.h5z.filter_avail(code) and code in PLUGIN_FILTERS:
        try:
            import hdf5plugin  # noqa: F401 - registers its filters
        except ImportError:
            return False
    return bool(h5py.h5z.filter_avail(code))


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
