"""Write a store so that a kill at any moment loses nothing that was journalled.

Order of every step: bytes, fsync of the file, fsync of its folders, one fsynced line in the journal. Resuming reads the
journal, never a file's mere existence. COMPLETE is written last, with the journal's sha256. Every file is made in
memory and put in place whole, so that a folder and an object store are written alike.

Several processes ("ranks", as torchrun numbers them) may write one store. Rank 0 creates the groups and the projection;
whoever writes which shard is the caller's to decide, and any of them may call `finish`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anndata
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from sest.cache import journal, schema
from sest.cache.journal import Entries
from sest.cache.schema import StoreError
from sest.cache.storage import Held, LocalStorage, Lock, Storage, open_group, storage_at


@dataclass(frozen=True)
class GroupPlan:
    """What one file's group will hold; known before anything is written."""

    path: str  # group path in the store, such as "replogle/rpe1"
    indptr: np.ndarray  # (n_cells + 1,) int64, row starts of the CSR targets
    n_genes: int
    target_dtype: str  # "int16" or "int32" counts, "float32" log1p
    dim: int  # width of obsm/X_sest
    embedding_dtype: str  # "float16" or "float32"
    attributes: Mapping[str, Any]  # JSON: dataset, columns, control, scale, fingerprint ...

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


class StoreWriter:
    """A process that writes a store. A context manager: it holds file locks while open (none on object stores).

    Args:
        path: folder or URL.
        attributes: of the root; a store that exists must have the same.
        rank, world_size: which of how many processes that write this store at the same time.
        add: "groups" and "inputs" of `attributes` may name new files, which are added to those of the store.

    Raises:
        StoreError: another process writes the store, the path is no store, or the store on disk was made with other
            attributes (the differences are shown).
    """

    def __init__(
        self,
        path: str | Path,
        attributes: Mapping[str, Any],
        *,
        rank: int = 0,
        world_size: int = 1,
        add: bool = False,
    ) -> None:
        self.storage: Storage = storage_at(path)
        self.attributes: dict[str, Any] = json.loads(json.dumps(attributes))
        self.rank, self.world_size = rank, world_size
        self._add = add
        self._journal = journal.journal_name(rank)
        self._entries: Entries = {}
        self._locks = ExitStack()

    def __enter__(self) -> Self:
        refuse_foreign(self.storage)
        with ExitStack() as locks:
            self._lock(locks)
            self._open()
            self._locks = locks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.close()

    def _lock(self, locks: ExitStack) -> None:
        """One lock for the store, shared by the ranks, and one for every rank."""
        me = f"{os.getpid()} of {self.world_size}"
        alone = self.world_size == 1
        try:
            locks.callback(self.storage.hold(schema.LOCK, alone=alone, text=str(os.getpid())).close)
        except Held as held:
            raise StoreError(f"{self.storage} is being written by process {held}. Wait for it or stop it.") from held
        if alone:
            return
        try:
            locks.callback(self.storage.hold(_rank_lock(self.rank), alone=True, text=me).close)
        except Held as held:
            raise StoreError(
                f"{self.storage} is being written by a process with --rank {self.rank} already ({held})."
            ) from held
        for rank, lock in self._others():
            process, _, size = lock.partition(" of ")
            if size != str(self.world_size):
                raise StoreError(
                    f"{self.storage} is being written with --world-size {size} (rank {rank}, process {process}), not "
                    f"{self.world_size}. Wait for that, or give the same --world-size."
                )

    def _others(self) -> Iterator[tuple[int, str]]:
        """Ranks whose processes write this store now, and what their locks say. Unknown on object stores."""
        if not isinstance(self.storage, LocalStorage):
            return
        for file in (self.storage.root / schema.SPOOL).glob("lock-*"):
            rank = int(file.name.removeprefix("lock-"))
            if rank != self.rank:
                try:
                    self.storage.hold(_rank_lock(rank), alone=False, text="").close()
                except Held as held:
                    yield rank, str(held)

    def _open(self) -> None:
        self._entries = self._read()
        own, whole = journal.read_journal(self.storage, self._journal)
        if own and self.storage.sizes()[self._journal] != len(whole):
            self.storage.write({self._journal: whole})  # without a torn last line
        if not self.created:
            if self.rank == 0:
                self._write_root()
            return
        new = self._agree()
        if self.rank == 0:
            self._check()
            if new:
                self.storage.remove([schema.COMPLETE])
                self._drop([schema.ROOT])
                self._write_root()

    def _write_root(self) -> None:
        self.storage.write(_in_memory(lambda root: root.attrs.update({"sest": self.attributes})))

    def _agree(self) -> list[str]:
        """Compare with the attributes of the store that is there; returns the groups that are to be added to it."""
        made, asked = journal.root_attributes(self.storage) or {}, self.attributes
        new = [name for name in asked["groups"] if name not in made["groups"]] if self._add else []
        if self._add:
            self.attributes = {
                **asked,
                "groups": [*made["groups"], *new],
                "inputs": {**made["inputs"], **asked["inputs"]},
            }
            made = {
                **made,
                "groups": self.attributes["groups"],
                "inputs": {**made["inputs"], **{name: asked["inputs"][name] for name in new}},
            }
        self.attributes |= {key: made[key] for key in schema.MEASURED if key in made}
        _refuse_differences(self.storage, made, self.attributes)
        if new and not self.complete and (begun := self._unfinished(set(made["groups"]) - set(asked["groups"]))):
            raise StoreError(
                f"{self.storage} is unfinished: {', '.join(begun)}. Run the command that began it before adding files."
            )
        return new

    def _unfinished(self, names: set[str]) -> list[str]:
        """Those of the store's groups of which the journal lacks something."""
        found = []
        for name in sorted(names):
            expected = [f"{name}/{schema.ROOT}"]
            if expected[0] in self._entries:
                group = open_group(self.storage, name)
                for array in ("X/data", "X/indices", f"obsm/{schema.EMBEDDING}"):
                    opened = group[array]
                    assert isinstance(opened, zarr.Array) and opened.shards is not None
                    ending = "/0" * (opened.ndim - 1)
                    shards = range(-(-opened.shape[0] // opened.shards[0]))
                    expected += [f"{name}/{array}/c/{i}{ending}" for i in shards]
            if not self._entries.keys() >= set(expected):
                found.append(name)
        return found

    def _check(self) -> None:
        """Take damaged files out of the journal: they will be written again."""
        finished = schema.COMPLETE in self.storage.here()
        promised = not finished or journal.is_promised(self.storage)
        damaged = journal.damaged_files(self.storage, self._entries.values(), every_byte=not promised)
        if damaged:
            if others := [rank for rank, _ in self._others()]:
                raise StoreError(
                    f"{self.storage} has {len(damaged)} damaged files (first: {damaged[0]}), and other processes (rank "
                    f"{', '.join(map(str, others))}) are writing it. Stop them and start all again."
                )
            self._drop(damaged + self._follow_up(damaged))
        if finished and (damaged or not promised):  # after the journal: a kill before this has every byte checked again
            self.storage.remove([schema.COMPLETE])

    def _read(self) -> Entries:
        if schema.COMPLETE in self.storage.here():  # then all is in the first
            return journal.read_journal(self.storage, schema.JOURNAL)[0]
        return journal.read_journals(self.storage)

    def refresh(self) -> None:
        """Read again what other processes have finished."""
        self._entries = {**self._read(), **self._entries}
        if self.created and not self._add:
            made = journal.root_attributes(self.storage) or {}
            self.attributes |= {key: made[key] for key in schema.MEASURED if key in made}
            _refuse_differences(self.storage, made, self.attributes)

    @property
    def created(self) -> bool:
        """Whether the root group is there."""
        return schema.ROOT in self.storage.here()

    @property
    def complete(self) -> bool:
        """Whether the store was finished, with all the groups it is to have."""
        if schema.COMPLETE not in self.storage.here():
            return False
        made = journal.root_attributes(self.storage) or {}
        return set(made["groups"]) >= set(self.attributes["groups"])

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self.storage.append(self._journal, b"".join(map(journal.line_of, lines)))

    def _promise(self, files: Mapping[str, bytes], **about: Any) -> None:
        """Make files durable, then journal them; `about` goes into each line (rows, entries)."""
        self.storage.write(files)
        lines = [
            {"file": name, "size": len(data), "sha256": schema.sha256(data), **about} for name, data in files.items()
        ]
        self._append(lines)
        self._entries.update({line["file"]: line for line in lines})

    def has_group(self, plan: GroupPlan) -> bool:
        """Whether the group was created whole."""
        return bool(self._entries.get(f"{plan.path}/{schema.ROOT}", {}).get("ready"))

    def add_group(self, plan: GroupPlan, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        """Create one file's AnnData group with its arrays at their final shape. Done before: nothing happens.

        Shards that are there already stay (a repair).

        Args:
            plan: shapes, dtypes and attributes of the group.
            obs: (n_cells, ...) perturbation, cell type and batch; the index holds the original names.
            var: (n_genes, ...) index holds the gene names.
        """
        if self.has_group(plan):
            return
        files = _in_memory(lambda root: _create_group(root.require_group(plan.path), plan, obs, var))
        del files[schema.ROOT]
        marker = f"{plan.path}/{schema.ROOT}"
        self._promise({name: data for name, data in files.items() if name != marker})
        self._promise({marker: files[marker]}, ready=True)

    def _drop(self, names: list[str]) -> None:
        """Take files out of the journals: they will be written again."""
        if not self._entries.keys() & set(names):
            return
        for name in names:
            self._entries.pop(name, None)
        self.storage.write({self._journal: journal.merged(self._entries)})
        self.storage.remove(name for name in journal.journals(self.storage.here()) if name != self._journal)

    def _follow_up(self, damaged: list[str]) -> list[str]:
        """What must be written again because of damaged files that are no shards.

        The "ready" marks of the groups they belong to; with a damaged projection, all embeddings that it made.
        """
        shards = {name for name, entry in self._entries.items() if "rows" in entry or "entries" in entry}
        others = [name for name in damaged if name not in shards and name != schema.ROOT]
        again = []
        for mark in (name for name, entry in self._entries.items() if entry.get("ready")):
            folder = mark.removesuffix(schema.ROOT)
            if any(name.startswith(folder) or folder.startswith(name.removesuffix(schema.ROOT)) for name in others):
                again.append(mark)
        if f"{schema.PROJECTION}/{schema.ROOT}" in again:
            again += [name for name, entry in self._entries.items() if "rows" in entry]
            self.storage.remove_folder(schema.SPOOL)
        return again

    def missing_embedding_shards(self, plan: GroupPlan) -> list[int]:
        """Numbers of the embedding shards that the journal does not have."""
        shards = range(len(plan.embedding_shards()))
        return [i for i in shards if f"{plan.path}/obsm/{schema.EMBEDDING}/c/{i}/0" not in self._entries]

    def missing_target_shards(self, plan: GroupPlan) -> list[int]:
        """Numbers of the target shards of which the journal lacks data or indices."""
        return [
            i
            for i in range(len(plan.target_shards()))
            if any(f"{plan.path}/X/{name}/c/{i}" not in self._entries for name in ("data", "indices"))
        ]

    def write_embedding_shard(self, plan: GroupPlan, shard: int, rows: np.ndarray) -> None:
        """Write one whole shard of embeddings. Args: rows: (rows of the shard, dim) floats."""
        start, stop = plan.embedding_shards()[shard]
        assert rows.shape == (stop - start, plan.dim), rows.shape
        name = f"{plan.path}/obsm/{schema.EMBEDDING}"
        self._promise(self._shard(name, start, stop, rows.astype(plan.embedding_dtype)), rows=[start, stop])

    def write_target_shard(self, plan: GroupPlan, shard: int, data: np.ndarray, indices: np.ndarray) -> None:
        """Write one whole shard of the CSR targets: its stored values and their gene positions."""
        start, stop = plan.target_shards()[shard]
        assert len(data) == len(indices) == stop - start, (len(data), len(indices), start, stop)
        files = self._shard(f"{plan.path}/X/data", start, stop, data)
        files |= self._shard(f"{plan.path}/X/indices", start, stop, indices)
        self._promise(files, entries=[start, stop])

    def _shard(self, array: str, start: int, stop: int, values: np.ndarray) -> dict[str, bytes]:
        """The file that holds entries [start, stop) of an array, a whole shard of it."""
        held = {schema.ROOT: default_buffer_prototype().buffer.from_bytes(self.storage.read(f"{array}/{schema.ROOT}"))}
        opened = zarr.open_array(MemoryStore(held), mode="r+")
        assert isinstance(opened, zarr.Array)
        opened.with_config({"write_empty_chunks": True})[start:stop] = values
        del held[schema.ROOT]
        assert len(held) == 1, sorted(held)
        return {f"{array}/{key}": data.to_bytes() for key, data in held.items()}

    def write_projection(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Store the PCA (mean, basis, explained variance, float32) that made the embeddings."""

        def create(root: zarr.Group) -> None:
            group = root.create_group(schema.PROJECTION, attributes=dict(attributes))
            for name, values in arrays.items():
                group.create_array(name, data=np.ascontiguousarray(values), chunks=values.shape)

        files = _in_memory(create)
        del files[schema.ROOT]
        marker = f"{schema.PROJECTION}/{schema.ROOT}"
        self._promise({name: data for name, data in files.items() if name != marker})
        self._promise({marker: files[marker]}, ready=True)

    def has_projection(self) -> bool:
        """Whether the projection was stored whole."""
        return bool(self._entries.get(f"{schema.PROJECTION}/{schema.ROOT}", {}).get("ready"))

    def read_projection(self) -> dict[str, np.ndarray]:
        """The stored projection's arrays by name."""
        return {name: np.asarray(array[:]) for name, array in open_group(self.storage, schema.PROJECTION).arrays()}

    def spool_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Keep finished rows of an unfinished shard, durably, so that a kill does not cost their encoding.

        Args:
            name: the shard, such as "group/3"; parts that begin with a dot are no group's.
            start: number of the first row.
            rows: (n, width).
        """
        stream = io.BytesIO()
        np.save(stream, rows)
        self.storage.write({f"{schema.SPOOL}/{name}/{start:012d}.npy": stream.getvalue()})

    def spooled_rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of every block spooled under `name`, in order, up to one that cannot be read."""
        for file in sorted(self.storage.sizes(f"{schema.SPOOL}/{name}")):
            try:
                rows = np.load(io.BytesIO(self.storage.read(file)), allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return  # damaged since: these rows are made again
            yield int(Path(file).stem), rows

    def drop_spool(self, name: str) -> None:
        """Delete the blocks spooled under `name`."""
        self.storage.remove_folder(f"{schema.SPOOL}/{name}")

    def finish(self) -> None:
        """Mark the store complete: spool and strays deleted, one sorted journal, COMPLETE written last.

        Of several processes that come here at once, one does it and the others wait.
        """
        if self.world_size == 1:
            self.storage.remove(name for name in self.storage.here() if name == schema.FINISHING)  # a killed one's
            self._finish()
            return
        with closing(self._finishing()):
            if not self.complete:
                self._finish()
            self.storage.remove([schema.FINISHING])

    def _finishing(self) -> Lock:
        while True:
            with contextlib.suppress(Held):
                return self.storage.hold(schema.FINISHING, alone=True, text=str(os.getpid()))
            time.sleep(0.05)

    def _finish(self) -> None:
        self.storage.remove_folder(schema.SPOOL)
        self.storage.sweep()
        root = self.storage.read(schema.ROOT)
        self._entries[schema.ROOT] = {"file": schema.ROOT, "size": len(root), "sha256": schema.sha256(root)}
        self.storage.write({schema.JOURNAL: journal.merged(self._entries)})
        self.storage.write({schema.COMPLETE: journal.complete_line(self._entries)})
        self.storage.remove(name for name in journal.journals(self.storage.here()) if name != schema.JOURNAL)


def _rank_lock(rank: int) -> str:
    return f"{schema.SPOOL}/lock-{rank}"


def _ranges(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _in_memory(create: Any) -> dict[str, bytes]:
    """The files of a new Zarr group by name; `create(group)` fills it."""
    held: dict[str, Any] = {}
    create(zarr.create_group(MemoryStore(held), zarr_format=3))
    return {name: data.to_bytes() for name, data in held.items()}


def refuse_foreign(storage: Storage) -> None:
    """Raise StoreError if a path is something else than a store, the beginning of one, or an empty folder."""
    if isinstance(storage, LocalStorage) and storage.root.exists() and not storage.root.is_dir():
        raise StoreError(f"{storage} is a file, not a store. Choose another --cache path.")
    there = storage.here()
    if schema.ROOT in there:
        if journal.root_attributes(storage) is None:
            raise StoreError(f"{storage} is a Zarr store that sest did not write. Choose another --cache path.")
    elif any(name not in (schema.LOCK, schema.SPOOL) and not name.endswith(schema.PARTIAL) for name in there):
        raise StoreError(f"{storage} exists and is not a sest store. Choose another --cache path.")


def _has_auto_shard() -> bool:
    return hasattr(anndata.settings, "auto_shard_zarr_v3")


def _refuse_differences(storage: Storage, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = list(_differences(made, asked))
    if different:
        shown = "; ".join(different[:6]) + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
        raise StoreError(f"{storage} was made differently ({shown}). Choose another --cache path or delete the store.")


def _differences(made: Mapping[str, Any], asked: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Describe every value that differs, by its path of keys."""
    for key in sorted({*made, *asked}):
        there, here = made.get(key), asked.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{above}{key}.")
        elif there != here:
            yield f"{above}{key}: {_brief(there)} there, {_brief(here)} asked"


def _brief(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _create_group(group: zarr.Group, plan: GroupPlan, obs: pd.DataFrame, var: pd.DataFrame) -> None:
    """Fill a new group: an AnnData whose X and obsm/X_sest have no shards yet."""
    with anndata.settings.override(auto_shard_zarr_v3=False) if _has_auto_shard() else contextlib.nullcontext():
        anndata.io.write_elem(group, "obs", obs)
        anndata.io.write_elem(group, "var", var)
    for name in ("layers", "obsp", "varm", "varp", "uns"):
        anndata.io.write_elem(group, name, {})
    obsm = group.create_group("obsm", attributes={"encoding-type": "dict", "encoding-version": "0.1.0"})
    _create_embedding(obsm, plan)
    _create_targets(group, plan)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0", "sest": dict(plan.attributes)})


def _create_embedding(obsm: zarr.Group, plan: GroupPlan) -> None:
    rows_per_shard = min(schema.ROWS_PER_SHARD, -(-plan.n_cells // schema.ROWS_PER_CHUNK) * schema.ROWS_PER_CHUNK)
    array = obsm.create_array(
        schema.EMBEDDING,
        shape=(plan.n_cells, plan.dim),
        dtype=plan.embedding_dtype,
        chunks=(schema.ROWS_PER_CHUNK, plan.dim),
        shards=(rows_per_shard, plan.dim),
        compressors=[Crc32cCodec()],
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
            shards=(min(schema.ENTRIES_PER_SHARD, _round_up(plan.n_entries, schema.ENTRIES_PER_CHUNK)),),
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    indptr = x.create_array("indptr", data=plan.indptr, chunks=(min(len(plan.indptr), schema.ENTRIES_PER_CHUNK),))
    indptr.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [plan.n_cells, plan.n_genes]})


def _round_up(value: int, step: int) -> int:
    return max(1, -(-value // step)) * step
