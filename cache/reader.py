"""Read a finished cache, none of whose files is trusted.

On opening: COMPLETE, the journal's sha256, the size of every file, the sha256 of all files but shards, and all that
metadata says (sest.cache.schema). On reading: the checksum of every chunk of a shard, and that row starts, gene numbers
and values are such as sest writes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numcodecs
import numpy as np
import pandas as pd
import scipy.sparse
import zarr

from sest.cache import journal, schema
from sest.cache.disk import sha256
from sest.cache.journal import Entries
from sest.cache.schema import CacheError
from sest.cache.shards import Shards, shards_of
from sest.cache.storage import LocalStorage, Storage, open_group, reading, storage_at, unlike
from sest.errors import nearest_file, what_it_is

COUNT = 4  # bytes at the beginning of a chunk of names: how many they are


@dataclass(frozen=True)
class Group:
    """One input file's cells: an AnnData group of the cache."""

    storage: Storage
    path: str  # group path, such as "replogle/rpe1"
    attributes: dict[str, Any]  # dataset, columns, control, scale, fingerprint, n_cells, n_genes, dim ...
    _opened: dict[str, Shards | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_cells(self) -> int:
        return int(self.attributes["n_cells"])

    @property
    def n_genes(self) -> int:
        return int(self.attributes["n_genes"])

    @property
    def dataset(self) -> str:
        return str(self.attributes["dataset"])

    @cached_property
    def obs(self) -> pd.DataFrame:
        """(n_cells, 3) perturbation, cell_type and batch (categorical); the index has the original names."""
        with reading(self.storage, f"{self.path}/obs"):
            table = self._zarr["obs"]
            columns: Any = table.attrs["column-order"]
            self._check_names(f"obs/{table.attrs['_index']}", *(f"obs/{name}/categories" for name in columns))
            return anndata.io.read_elem(table)

    def read_labels(self) -> pd.DataFrame:
        """The columns of `obs` without the cells' names, which take most of its memory."""
        with reading(self.storage, f"{self.path}/obs"):
            table = self._zarr["obs"]
            columns: Any = table.attrs["column-order"]
            self._check_names(*(f"obs/{name}/categories" for name in columns))
            return pd.DataFrame({name: anndata.io.read_elem(table[name]) for name in columns}, range(self.n_cells))

    def names(self, rows: np.ndarray) -> np.ndarray:
        """(n,) str: names of the cells (n,), ascending; of those of others a chunk at a time is in memory."""
        with reading(self.storage, f"{self.path}/obs"):
            parts = [np.zeros(0, str)]
            for first, last, data in self._chunks_of_names(f"obs/{self._zarr['obs'].attrs['_index']}"):
                mine = rows[slice(*np.searchsorted(rows, (first, last)))] - first
                if len(mine):
                    part = numcodecs.VLenUTF8().decode(data)[mine] if data else np.full(len(mine), "", object)
                    parts.append(part.astype(str))
            return np.concatenate(parts)

    @cached_property
    def genes(self) -> list[str]:
        """(n_genes,) gene names, in the order of the columns of the targets."""
        with reading(self.storage, f"{self.path}/var"):
            table = self._zarr["var"]
            self._check_names(f"var/{table.attrs['_index']}")
            return [str(name) for name in anndata.io.read_elem(table).index]

    def _check_names(self, *arrays: str) -> None:
        """Raise ValueError where a chunk is not of as many names as its array says."""
        for name in arrays:
            deque(self._chunks_of_names(name), maxlen=0)

    def _chunks_of_names(self, name: str) -> Iterator[tuple[int, int, bytes]]:
        """Of every chunk the entries [first, last) that it has, and its bytes; b"": of empty names alone.

        Raises:
            ValueError: a chunk says that it holds more or fewer names: room is made for what it says.
        """
        about = schema.parsed(self.storage.read(f"{self.path}/{name}/{schema.ROOT}"))
        (length,), (per_chunk,) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
        for chunk, first in enumerate(range(0, length, per_chunk)):
            try:
                data = self.storage.read(f"{self.path}/{name}/c/{chunk}")
            except FileNotFoundError:
                data = b""
            else:
                if len(about["codecs"]) > 1:
                    data = numcodecs.Zstd().decode(data)
                if int.from_bytes(data[:COUNT], "little") != per_chunk:
                    raise ValueError(f"{name}/c/{chunk} holds more or fewer names than its array says")
            yield first, first + per_chunk, data

    @cached_property
    def indptr(self) -> np.ndarray:
        """(n_cells + 1,) int64 row starts of the targets, which follow each other from 0 to n_values."""
        indptr = self._read("X/indptr", 0, self.n_cells + 1)
        lengths = np.diff(indptr)
        if indptr[0] != 0 or indptr[-1] != self.n_values or lengths.min(initial=0) < 0:
            raise unlike(self.storage, f"{self.path}/X/indptr does not go up from 0 to {self.n_values:,}")
        if lengths.max(initial=0) > self.n_genes:
            raise unlike(self.storage, f"{self.path}/X/indptr has a cell with more values than genes")
        return indptr

    @cached_property
    def target_dtype(self) -> np.dtype:
        """Of the stored targets: int16 or int32 counts, float32 log1p values."""
        return np.dtype(self._array("X/data").dtype)

    @cached_property
    def n_values(self) -> int:
        """How many values of the targets are stored; the array's shape says it."""
        return int(self._array("X/data").shape[0])

    @cached_property
    def _zarr(self) -> zarr.Group:
        with reading(self.storage, self.path):
            return open_group(self.storage, self.path)

    def _array(self, name: str) -> zarr.Array:
        with reading(self.storage, f"{self.path}/{name}"):
            array = self._zarr[name]
        assert isinstance(array, zarr.Array)
        return array

    def embeddings(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of obsm/X_sest: (rows, dim), float16 or float32 as stored; NaN rows were not embedded."""
        start, stop, _ = slice(start, stop).indices(self.n_cells)
        return self._read(f"obsm/{schema.EMBEDDING}", start, max(start, stop))

    def targets(self, start: int = 0, stop: int | None = None) -> scipy.sparse.csr_matrix:
        """Rows [start, stop) of X: (rows, n_genes) CSR of counts (integers) or log1p values (float32).

        The genes of a cell are in order, each once.
        """
        indptr = self.indptr[start : (self.n_cells if stop is None else stop) + 1]
        data, indices = (self._read(f"X/{name}", int(indptr[0]), int(indptr[-1])) for name in ("data", "indices"))
        ends = indptr - indptr[0]
        ends = ends.astype(np.int32) if ends[-1] < 2**31 else ends  # of the indices' type: SciPy copies both else
        rows = scipy.sparse.csr_matrix((data, indices, ends), shape=(len(ends) - 1, self.n_genes))
        if wrong := wrong_genes(rows):
            raise unlike(self.storage, f"{self.path}/X/indices has {wrong}")
        if wrong := wrong_values(rows.data, self.attributes["scale"]):
            raise unlike(self.storage, f"{self.path}/X/data has {wrong}")
        return rows

    def _shards(self, name: str) -> Shards | None:
        """An array, if it lies in shards as sest writes them."""
        if name not in self._opened:
            self._opened[name] = shards_of(self.storage, f"{self.path}/{name}")
        return self._opened[name]

    def to_anndata(self) -> anndata.AnnData:
        """All of it in memory: X the targets, obs, var and obsm["X_sest"] the embeddings."""
        return anndata.AnnData(
            X=self.targets(),
            obs=self.obs.copy(),
            var=pd.DataFrame(index=pd.Index(self.genes, dtype=str)),
            obsm={schema.EMBEDDING: self.embeddings()},
        )

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Entries of one array. Raises CacheError where a chunk is not what its checksum says."""
        if (shards := self._shards(name)) is not None:
            return shards.read(start, stop)
        array = self._array(name)
        with reading(self.storage, f"{self.path}/{name}"):
            return np.asarray(array[start:stop])


@dataclass(frozen=True)
class Cache:
    """A finished cache: how it was made (`attributes`) and its groups by path."""

    storage: Storage
    attributes: dict[str, Any]
    groups: dict[str, Group]
    _entries: Entries = field(repr=False)

    @property
    def path(self) -> str:
        """Its path or URL, as it was given."""
        return str(self.storage)

    @property
    def is_there(self) -> bool:
        """Whether its folder has not been deleted or moved since; of a cache on an object store that is not asked."""
        return not isinstance(self.storage, LocalStorage) or schema.ROOT in self.storage.here()

    @property
    def sha256(self) -> str:
        """Hash of how the cache was made: encoder, options and the content of the inputs. Equal for equal caches."""
        return sha256(json.dumps(self.attributes, sort_keys=True).encode())

    def as_of(self, hash_then: str | None) -> Cache:
        """This cache before files were added to it, as it was when `sha256` was `hash_then`; else itself."""
        names = list(self.groups)
        for n in range(len(names), 0, -1):
            inputs = {name: self.attributes["inputs"][name] for name in names[:n]}
            attributes = {**self.attributes, "groups": names[:n], "inputs": inputs}
            before = replace(self, attributes=attributes, groups={name: self.groups[name] for name in names[:n]})
            if before.sha256 == hash_then:
                return before
        return self

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.attributes["dim"])

    @property
    def n_cells(self) -> int:
        return sum(group.n_cells for group in self.groups.values())

    @property
    def size(self) -> int:
        """Bytes of all journalled files."""
        return sum(entry["size"] for entry in self._entries.values())

    @cached_property
    def projection(self) -> dict[str, np.ndarray] | None:
        """The PCA that made the embeddings (mean, basis, explained_variance), or None."""
        return read_projection(self.storage) if f"{schema.PROJECTION}/{schema.ROOT}" in self._entries else None

    @cached_property
    def projection_attributes(self) -> dict[str, Any]:
        """What the projection says of itself (for the pca encoder: its genes)."""
        with reading(self.storage, schema.PROJECTION):
            return dict(open_group(self.storage, schema.PROJECTION).attrs)

    def to_anndata(self, group: str | None = None) -> anndata.AnnData:
        """A group in memory, or all of them under each other, over the genes that all have.

        Of several, obs["group"] says which a cell is from, and names of cells that occur twice get their group's name.

        Raises:
            CacheError: no such group, or some hold counts and others log1p values: they are no one matrix.
        """
        if group is not None:
            if group not in self.groups:
                raise CacheError(f"{self} has no group {group!r}. It has: {', '.join(self.groups)}.")
            return self.groups[group].to_anndata()
        scales = {name: str(g.attributes["scale"]) for name, g in self.groups.items()}
        if len(set(scales.values())) > 1:
            held = ", ".join(f"{name} {scale}" for name, scale in scales.items())
            raise CacheError(f"{self} holds counts and log1p values ({held}). Name one group.")
        parts = {name: g.to_anndata() for name, g in self.groups.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        names = pd.Index(np.concatenate([part.obs_names for part in parts.values()]))
        twice = not names.is_unique
        return anndata.concat(parts, join="inner", label="group", index_unique="-" if twice else None)

    def verify(self) -> list[str]:
        """Read every file and list those that are missing or whose sha256 is not the journal's (empty: sound)."""
        return journal.damaged_files(self.storage, self._entries.values(), self.storage.sizes(), every_byte=True)


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache for reading.

    Raises:
        CacheError: no such cache, not one of sest's, unfinished (no COMPLETE), of another schema version, or damaged
            (a file is missing, has another size than the journal says, or is metadata of another content).
    """
    storage = storage_at(path)
    there = storage.here()
    if schema.ROOT not in there:
        exists = there or (isinstance(storage, LocalStorage) and storage.root.exists())
        what = "is not a sest cache (no zarr.json in it)" if exists else "does not exist"
        hint = (what_it_is if exists else nearest_file)(storage.root) if isinstance(storage, LocalStorage) else ""
        out = "OUT.zarr" if exists else storage
        raise CacheError(f"{storage} {what}.{hint} Make one with `sest embed INPUT --encoder ... --cache {out}`.")
    attributes = journal.root_attributes(storage)
    if attributes is None:
        raise CacheError(f"{storage} is a Zarr store, but not one of sest's (no 'sest' attribute).")
    if attributes.get("schema_version") != schema.SCHEMA_VERSION:
        raise CacheError(
            f"{storage} has schema version {attributes.get('schema_version')}; this sest reads version "
            f"{schema.SCHEMA_VERSION}. Embed again, or use the sest version it was made with "
            f"({attributes.get('sest_version')})."
        )
    if schema.COMPLETE not in there:
        raise CacheError(f"{storage} is unfinished (no COMPLETE file). Run the same `sest embed` command to finish it.")
    if not journal.is_promised(storage):
        raise CacheError(
            f"{storage} is damaged: journal.jsonl is not the one COMPLETE was written for. "
            "Run the same `sest embed` command to check every file and write again what is wrong."
        )
    entries, _ = journal.read_journal(storage, schema.JOURNAL)
    sizes = storage.sizes()
    damaged = journal.damaged_files(storage, entries.values(), sizes)
    if damaged:
        raise CacheError(
            f"{storage} is damaged: {len(damaged)} of {len(entries)} files are missing or are not as they were written "
            f"(first: {damaged[0]}). Run the same `sest embed` command to write them again."
        )
    try:
        schema.check_attributes(attributes)
        groups = schema.check_metadata(attributes, {name: sizes[name] for name in entries}, storage.read)
    except (ValueError, FileNotFoundError) as error:
        raise unlike(storage, str(error)) from error
    for name in sizes.keys() - entries.keys():
        if "/c/" in name and f"{name.rpartition('/c/')[0]}/{schema.ROOT}" in entries:  # zarr would read it
            raise CacheError(f"{storage} has a chunk that is not in its journal, {name}. Delete that file.")
    return Cache(storage, attributes, {name: Group(storage, name, about) for name, about in groups.items()}, entries)


def wrong_genes(rows: scipy.sparse.csr_matrix) -> str | None:
    """What is wrong with the gene numbers of rows, whose row starts are right; None where nothing is."""
    first, last = rows.indptr[:-1], rows.indptr[1:]
    some = last > first
    if not rows.nnz:
        return None
    in_order = rows.has_canonical_format  # and no gene twice, so that the ends of each row say the rest
    if in_order and rows.indices[first[some]].min() >= 0 and rows.indices[last[some] - 1].max() < rows.shape[1]:
        return None
    return "genes out of order, twice, or that are not there"


def wrong_values(data: np.ndarray, scale: str) -> str | None:
    """What is wrong with stored values of a scale; None where nothing is."""
    if not len(data):
        return None
    lowest, highest = data.min(), data.max()
    if np.isfinite(lowest) and np.isfinite(highest) and (scale != schema.COUNTS or lowest >= 0):
        return None
    return f"values that are no {scale}"


def read_projection(storage: Storage) -> dict[str, np.ndarray]:
    """The arrays of a cache's projection, by name; the cache need not be finished. Raises CacheError."""
    names = [name for name in storage.sizes(schema.PROJECTION) if name.startswith(f"{schema.PROJECTION}/")]
    try:
        nodes = schema.metadata_of(names, storage.read)
        schema.check_projection(nodes)
    except ValueError as error:
        raise unlike(storage, str(error)) from error
    with reading(storage, schema.PROJECTION):
        group = open_group(storage, schema.PROJECTION)
        return {name: np.asarray(array[:]) for name, array in group.arrays()}
