"""What a cache holds: for every input file an AnnData group, written shard by shard, and the PCA of the embeddings.

Files are made here in memory, by name; `sest.cache.writer` puts them in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import anndata
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from sest.cache import schema
from sest.cache.storage import Storage, open_group

Files = dict[str, bytes]  # by name in the cache


@dataclass(frozen=True)
class GroupPlan:
    """What one file's group will hold; known before anything is written."""

    path: str  # group path in the cache, such as "replogle/rpe1"
    indptr: np.ndarray  # (n_cells + 1,) int64, row starts of the CSR targets
    n_genes: int
    target_dtype: str  # "int16" or "int32" counts, "float32" log1p
    dim: int  # width of obsm/X_sest
    embedding_dtype: str  # "float16" or "float32"
    attributes: Mapping[str, Any]  # JSON: dataset, columns, control, scale, fingerprint ...
    packed: bool = False  # embeddings are compressed: most rows are NaN

    @property
    def n_cells(self) -> int:
        return len(self.indptr) - 1

    @property
    def n_entries(self) -> int:
        return int(self.indptr[-1])

    def embedding_shards(self) -> list[tuple[int, int]]:
        """Row range of every shard of obsm/X_sest."""
        return _ranges(self.n_cells, schema.ROWS_PER_SHARD)

    def target_shards(self) -> list[tuple[int, int]]:
        """Range of stored values of every shard of X/data and X/indices."""
        return _ranges(self.n_entries, schema.ENTRIES_PER_SHARD)


def embedding_file(group: str, shard: int) -> str:
    """The name of the file that holds one shard of a group's embeddings."""
    return f"{group}/obsm/{schema.EMBEDDING}/c/{shard}/0"


def target_files(group: str, shard: int) -> list[str]:
    """The names of the two files that hold one shard of a group's targets."""
    return [f"{group}/X/{name}/c/{shard}" for name in ("data", "indices")]


def shard_files(storage: Storage, group: str) -> list[str]:
    """The names of all files of shards that a group of a cache is to have, by the shapes of its arrays."""
    opened = open_group(storage, group)

    def n_shards(name: str) -> int:
        array = opened[name]
        assert isinstance(array, zarr.Array) and array.shards is not None
        return -(-array.shape[0] // array.shards[0])

    targets = [name for shard in range(n_shards("X/data")) for name in target_files(group, shard)]
    return targets + [embedding_file(group, shard) for shard in range(n_shards(f"obsm/{schema.EMBEDDING}"))]


def root_files(attributes: Mapping[str, Any]) -> Files:
    """The root group, which says how the cache was made."""
    return _in_memory(lambda root: root.attrs.update({"sest": attributes}))


def group_files(plan: GroupPlan, obs: pd.DataFrame, var: pd.DataFrame) -> Files:
    """A file's AnnData group, whose X and obsm/X_sest have no shards yet."""

    def create(root: zarr.Group) -> None:
        group = root.require_group(plan.path)
        _write_tables(group, obs, var)
        _create_embedding(group, plan)
        _create_targets(group, plan)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0", "sest": dict(plan.attributes)})

    return _below_root(create)


def projection_files(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> Files:
    """The PCA (mean, basis, explained variance) that made the embeddings."""

    def create(root: zarr.Group) -> None:
        group = root.create_group(schema.PROJECTION, attributes=dict(attributes))
        for name, values in arrays.items():
            group.create_array(name, data=np.ascontiguousarray(values), chunks=values.shape)

    return _below_root(create)


def shard_of(array: str, metadata: bytes, start: int, values: np.ndarray) -> Files:
    """The file that holds one whole shard of an array.

    Args:
        array: its name in the cache.
        metadata: its zarr.json.
        start: number of the shard's first entry.
        values: all entries of the shard.
    """
    held = {schema.ROOT: default_buffer_prototype().buffer.from_bytes(metadata)}
    opened = zarr.open_array(MemoryStore(held), mode="r+")
    assert isinstance(opened, zarr.Array)
    parts: Any = (opened.metadata, opened.store_path, {"write_empty_chunks": True})
    zarr.Array(zarr.AsyncArray(*parts))[start : start + len(values)] = values  # with_config is of 3.1.6
    del held[schema.ROOT]
    assert len(held) == 1, sorted(held)
    return {f"{array}/{key}": data.to_bytes() for key, data in held.items()}


def _in_memory(create: Callable[[zarr.Group], None]) -> Files:
    """The files of a new Zarr group by name; `create(group)` fills it."""
    held: dict[str, Any] = {}
    create(zarr.create_group(MemoryStore(held), zarr_format=3))
    return {name: data.to_bytes() for name, data in held.items()}


def _below_root(create: Callable[[zarr.Group], None]) -> Files:
    files = _in_memory(create)
    del files[schema.ROOT]  # is there already, with attributes
    return files


def _write_tables(group: zarr.Group, obs: pd.DataFrame, var: pd.DataFrame) -> None:
    """Write obs and var, unsharded: a version of anndata that shards by itself would write other files."""
    has_auto_shard = hasattr(anndata.settings, "auto_shard_zarr_v3")
    with anndata.settings.override(auto_shard_zarr_v3=False) if has_auto_shard else contextlib.nullcontext():
        anndata.io.write_elem(group, "obs", with_python_strings(obs))
        anndata.io.write_elem(group, "var", with_python_strings(var))
    for name in ("layers", "obsp", "varm", "varp", "uns"):
        anndata.io.write_elem(group, name, {})


def with_python_strings(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose text is Python strings, as that of pandas 2 is; the cells share their memory.

    pandas 3 has a type for text, which anndata before 0.13 does not write, and later ones write in another encoding:
    so files are the same with every version.
    """
    table = table.copy(deep=False)
    table.index, table.columns = _of_python_strings(table.index), _of_python_strings(table.columns)
    for name in table.columns:
        column = table[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            table[name] = column.cat.rename_categories(_of_python_strings(column.cat.categories))
        elif isinstance(column.dtype, pd.StringDtype):
            table[name] = column.astype(object)
    return table


def _of_python_strings(index: pd.Index) -> pd.Index:
    return index.astype(object) if isinstance(index.dtype, pd.StringDtype) else index


def _create_embedding(group: zarr.Group, plan: GroupPlan) -> None:
    """Checksummed chunks, NaN where nothing was written; without compression, which embeddings hardly yield to."""
    obsm = group.create_group("obsm", attributes={"encoding-type": "dict", "encoding-version": "0.1.0"})
    array = obsm.create_array(
        schema.EMBEDDING,
        shape=(plan.n_cells, plan.dim),
        dtype=plan.embedding_dtype,
        chunks=(schema.ROWS_PER_CHUNK, plan.dim),
        shards=(_shard_length(plan.n_cells, schema.ROWS_PER_CHUNK, schema.ROWS_PER_SHARD), plan.dim),
        compressors=[*([_zstd("noshuffle")] if plan.packed else []), Crc32cCodec()],
        fill_value=np.nan,
        config={"write_empty_chunks": True},
    )
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _create_targets(group: zarr.Group, plan: GroupPlan) -> None:
    x = group.create_group("X")
    for name, dtype in (("data", plan.target_dtype), ("indices", "int32")):
        array = x.create_array(
            name,
            shape=(plan.n_entries,),
            dtype=dtype,
            chunks=(schema.ENTRIES_PER_CHUNK,),
            shards=(_shard_length(plan.n_entries, schema.ENTRIES_PER_CHUNK, schema.ENTRIES_PER_SHARD),),
            compressors=[_zstd("shuffle"), Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    indptr = x.create_array("indptr", data=plan.indptr, chunks=(min(len(plan.indptr), schema.ENTRIES_PER_CHUNK),))
    indptr.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [plan.n_cells, plan.n_genes]})


def _zstd(shuffle: Literal["shuffle", "noshuffle"]) -> BloscCodec:
    return BloscCodec(cname="zstd", clevel=1, shuffle=shuffle)


def _shard_length(total: int, chunk: int, shard: int) -> int:
    """Entries of a shard: whole chunks, no more than there is to hold."""
    return min(shard, max(1, -(-total // chunk)) * chunk)


def _ranges(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, total)) for start in range(0, total, step)]
