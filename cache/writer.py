"""Write a cache so that a kill at any moment loses nothing that was journalled.

Order of every step: bytes, fsync of the file, fsync of its folders, one fsynced line in the journal. Resuming reads the
journal, never a file's mere existence. COMPLETE is written last, with the journal's sha256. Every file is made in
memory and put in place whole, so that a folder and an object store are written alike.

Several processes ("ranks", as torchrun numbers them) may write one cache. Rank 0 creates the groups and the projection;
whoever writes which shard is the caller's to decide, and any of them may call `finish`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pandas as pd

from sest.cache import journal, layout, locks, schema
from sest.cache.disk import PARTIAL, sha256
from sest.cache.journal import Entries
from sest.cache.layout import Files, GroupPlan
from sest.cache.schema import CacheError
from sest.cache.storage import LocalStorage, Lock, Storage, storage_at
from sest.errors import brief


class CacheWriter:
    """A process that writes a cache. A context manager: it holds file locks while open (none on object stores).

    Args:
        path: folder or URL.
        attributes: of the root; a cache that exists must have the same.
        rank, world_size: which of how many processes that write this cache at the same time.
        add: "groups" and "inputs" of `attributes` may name new files, which are added to those of the cache.

    Raises:
        CacheError: another process writes the cache, the path is no cache, or the cache on disk was made with other
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
        self._lock = Lock()

    def __enter__(self) -> Self:
        refuse_foreign(self.storage)
        with ExitStack() as held:
            self._lock = held.enter_context(locks.writing(self.storage, self.rank, self.world_size))
            self._open()
            self._locks = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.close()

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
        self.storage.write(layout.root_files(self.attributes))

    def _agree(self) -> list[str]:
        """Compare with the attributes of the cache that is there; returns the groups that are to be added to it."""
        on_disk, asked = journal.root_attributes(self.storage) or {}, self.attributes
        new = [name for name in asked["groups"] if name not in on_disk["groups"]] if self._add else []
        if self._add:
            self.attributes = {
                **asked,
                "groups": [*on_disk["groups"], *new],
                "inputs": {**on_disk["inputs"], **asked["inputs"]},
            }
            on_disk = {
                **on_disk,
                "groups": self.attributes["groups"],
                "inputs": {**on_disk["inputs"], **{name: asked["inputs"][name] for name in new}},
            }
        self._refuse_other(on_disk)
        if new and not self.complete and (begun := self._unfinished(set(on_disk["groups"]) - set(asked["groups"]))):
            raise CacheError(
                f"{self.storage} is unfinished: {', '.join(begun)}. Run the command that began it before adding files."
            )
        return new

    def _refuse_other(self, on_disk: Mapping[str, Any]) -> None:
        """Raise CacheError where the cache was made with other attributes; what was measured then holds."""
        self.attributes |= {key: on_disk[key] for key in schema.MEASURED if key in on_disk}
        if different := list(_differences(on_disk, self.attributes)):
            shown = "; ".join(different[:6]) + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
            raise CacheError(
                f"{self.storage} was made differently ({shown}). Choose another --cache path or delete the cache."
            )

    def _unfinished(self, names: set[str]) -> list[str]:
        """Those of the cache's groups of which the journal lacks something."""
        found = []
        for name in sorted(names):
            expected = [f"{name}/{schema.ROOT}"]
            if expected[0] in self._entries:
                expected += layout.shard_files(self.storage, name)
            if not self._entries.keys() >= set(expected):
                found.append(name)
        return found

    def _check(self) -> None:
        """Take damaged files out of the journal: they will be written again."""
        finished = schema.COMPLETE in self.storage.here()
        promised = not finished or journal.is_promised(self.storage)
        damaged = journal.damaged_files(
            self.storage, self._entries.values(), self.storage.sizes(), every_byte=not promised
        )
        if damaged:
            if others := locks.other_ranks(self.storage, self.rank):
                raise CacheError(
                    f"{self.storage} has {len(damaged)} damaged files (first: {damaged[0]}), and other processes (rank "
                    f"{', '.join(map(str, others))}) are writing it. Stop them and start all again."
                )
            self._drop(damaged + self._follow_up(damaged))
        if finished and (damaged or not promised):  # after the journal: a kill before this has every byte checked again
            self.storage.remove([schema.COMPLETE])

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
        others = [name for name in damaged if journal.is_small(self._entries[name]) and name != schema.ROOT]
        again = []
        for mark in (name for name, entry in self._entries.items() if entry.get("ready")):
            folder = mark.removesuffix(schema.ROOT)
            if any(name.startswith(folder) or folder.startswith(name.removesuffix(schema.ROOT)) for name in others):
                again.append(mark)
        if f"{schema.PROJECTION}/{schema.ROOT}" in again:
            again += [name for name, entry in self._entries.items() if "rows" in entry]
            self.storage.remove_folder(schema.SPOOL)
        return again

    def _read(self) -> Entries:
        if schema.COMPLETE in self.storage.here():  # then all is in the first
            return journal.read_journal(self.storage, schema.JOURNAL)[0]
        return journal.read_journals(self.storage)

    def refresh(self) -> None:
        """Read again what other processes have finished."""
        self._entries = {**self._read(), **self._entries}
        if self.created and not self._add:
            self._refuse_other(journal.root_attributes(self.storage) or {})

    @property
    def created(self) -> bool:
        """Whether the root group is there."""
        return schema.ROOT in self.storage.here()

    @property
    def complete(self) -> bool:
        """Whether the cache was finished, with all the groups it is to have."""
        if schema.COMPLETE not in self.storage.here():
            return False
        on_disk = journal.root_attributes(self.storage) or {}
        return set(on_disk["groups"]) >= set(self.attributes["groups"])

    def _promise(self, files: Files, **about: Any) -> None:
        """Make files durable, then journal them; `about` goes into each line (rows, entries)."""
        lines = [{"file": name, "size": len(data), "sha256": sha256(data), **about} for name, data in files.items()]
        with self._there():
            self.storage.write(files)
            self.storage.append(self._journal, b"".join(map(journal.line_of, lines)))
        self._entries.update({line["file"]: line for line in lines})

    def _require(self) -> None:
        """Raise CacheError where the cache was deleted or moved: what is written now would be there alone."""
        if not self._lock.is_there():
            raise CacheError(
                f"{self.storage} was deleted or moved while it was written. Nothing more is written there."
            )

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Around writes: see `_require`, which holds before and, where a folder is missing, at that moment."""
        self._require()
        try:
            yield
        except (FileNotFoundError, FileExistsError):  # the latter of a folder that goes while it is asked for
            self._require()
            raise

    def _promise_ready(self, marker: str, files: Files) -> None:
        """Promise the files of a group; its own metadata last, which says that the group is there whole."""
        last = files.pop(marker)
        self._promise(files)
        self._promise({marker: last}, ready=True)

    def _is_ready(self, marker: str) -> bool:
        return bool(self._entries.get(marker, {}).get("ready"))

    def has_group(self, plan: GroupPlan) -> bool:
        """Whether the group was created whole."""
        return self._is_ready(f"{plan.path}/{schema.ROOT}")

    def add_group(self, plan: GroupPlan, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        """Create one file's AnnData group with its arrays at their final shape. Done before: nothing happens.

        Shards that are there already stay (a repair).

        Args:
            plan: shapes, dtypes and attributes of the group.
            obs: (n_cells, ...) perturbation, cell type and batch; the index holds the original names.
            var: (n_genes, ...) index holds the gene names.
        """
        if not self.has_group(plan):
            self._promise_ready(f"{plan.path}/{schema.ROOT}", layout.group_files(plan, obs, var))

    def missing_embedding_shards(self, plan: GroupPlan) -> list[int]:
        """Numbers of the embedding shards that the journal does not have."""
        shards = range(len(plan.embedding_shards()))
        return [i for i in shards if layout.embedding_file(plan.path, i) not in self._entries]

    def missing_target_shards(self, plan: GroupPlan) -> list[int]:
        """Numbers of the target shards of which the journal lacks data or indices."""
        shards = range(len(plan.target_shards()))
        return [i for i in shards if not self._entries.keys() >= set(layout.target_files(plan.path, i))]

    def write_embedding_shard(self, plan: GroupPlan, shard: int, rows: np.ndarray) -> None:
        """Write one whole shard of embeddings. Args: rows: (rows of the shard, dim) floats."""
        start, stop = plan.embedding_shards()[shard]
        assert rows.shape == (stop - start, plan.dim), rows.shape
        array = f"{plan.path}/obsm/{schema.EMBEDDING}"
        self._promise(self._shard_of(array, start, rows.astype(plan.embedding_dtype)), rows=[start, stop])

    def write_target_shard(self, plan: GroupPlan, shard: int, data: np.ndarray, indices: np.ndarray) -> None:
        """Write one whole shard of the CSR targets: its stored values and their gene positions."""
        start, stop = plan.target_shards()[shard]
        assert len(data) == len(indices) == stop - start, (len(data), len(indices), start, stop)
        files = self._shard_of(f"{plan.path}/X/data", start, data)
        files |= self._shard_of(f"{plan.path}/X/indices", start, indices)
        self._promise(files, entries=[start, stop])

    def _shard_of(self, array: str, start: int, values: np.ndarray) -> Files:
        return layout.shard_of(array, self.storage.read(f"{array}/{schema.ROOT}"), start, values)

    def write_projection(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Store the PCA (mean, basis, explained variance, float32) that made the embeddings."""
        self._promise_ready(f"{schema.PROJECTION}/{schema.ROOT}", layout.projection_files(arrays, attributes))

    def has_projection(self) -> bool:
        """Whether the projection was stored whole."""
        return self._is_ready(f"{schema.PROJECTION}/{schema.ROOT}")

    def spool_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Keep finished rows of an unfinished shard, durably, so that a kill does not cost their encoding.

        Args:
            name: the shard, such as "group/3"; parts that begin with a dot are no group's.
            start: number of the first row.
            rows: (n, width).
        """
        stream = io.BytesIO()
        np.save(stream, rows)
        with self._there():
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
        """Mark the cache complete: spool and strays deleted, one sorted journal, COMPLETE written last.

        Of several processes that come here at once, one does it and the others wait.
        """
        if self.world_size == 1:
            self.storage.remove(name for name in self.storage.here() if name == schema.FINISHING)  # a killed one's
            self._finish()
            return
        with locks.finishing(self.storage):
            if not self.complete:
                self._finish()

    def _finish(self) -> None:
        with self._there():
            self.storage.remove_folder(schema.SPOOL)
            self.storage.sweep()
            root = self.storage.read(schema.ROOT)
            self._entries[schema.ROOT] = {"file": schema.ROOT, "size": len(root), "sha256": sha256(root)}
            self.storage.write({schema.JOURNAL: journal.merged(self._entries)})
            self.storage.write({schema.COMPLETE: journal.complete_line(self._entries)})
            self.storage.remove(name for name in journal.journals(self.storage.here()) if name != schema.JOURNAL)


def refuse_foreign(storage: Storage) -> None:
    """Raise CacheError if a path is something else than a cache, the beginning of one, or an empty folder."""
    if isinstance(storage, LocalStorage) and storage.root.exists() and not storage.root.is_dir():
        raise CacheError(f"{storage} is a file, not a cache. Choose another --cache path.")
    there = storage.here()
    if schema.ROOT in there:
        if journal.root_attributes(storage) is None:
            raise CacheError(f"{storage} is a Zarr store that sest did not write. Choose another --cache path.")
    elif any(name not in (schema.LOCK, schema.SPOOL) and not name.endswith(PARTIAL) for name in there):
        raise CacheError(f"{storage} exists and is not a sest cache. Choose another --cache path.")


WORDS = {  # keys whose values are hashes, which say nothing to anybody
    "sha256": "what the file holds",
    "labels_sha256": "the labels of its cells, or their columns",
    "encoder_sha256": "the weights of the encoder",
    "projection_sample_sha256": "the cells that the projection is fitted on (the splits, --seed or the files)",
}


def _differences(on_disk: Mapping[str, Any], asked: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Describe every value that differs, by its path of keys."""
    for key in sorted({*on_disk, *asked}):
        there, here = on_disk.get(key), asked.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{above}{key}.")
        elif there != here and key in WORDS:
            whose = above.removeprefix("inputs.").removesuffix(".")
            yield f"{whose}: {WORDS[key]}" if whose else WORDS[key]
        elif there != here:
            yield f"{above}{key}: {brief(there)} there, {brief(here)} asked"
