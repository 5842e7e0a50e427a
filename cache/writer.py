"""Write a store so that a kill at any moment loses nothing that was journalled.

Order of every step: bytes, fsync of the file, fsync of its folder, one fsynced line in the journal. Resuming reads the
journal, never a file's mere existence. COMPLETE is written last, with the journal's sha256.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anndata
import numpy as np
import pandas as pd
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from sest.cache import schema
from sest.cache.schema import StoreError


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
    """The one process that writes a store. A context manager: it holds a file lock while open.

    Raises:
        StoreError: another process writes the store, the path is no store, or the store on disk was made with other
            attributes (the differences are shown).
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self.attributes = json.loads(json.dumps(attributes))
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Self:
        refuse_foreign(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / schema.LOCK, "a+")
        except OSError as error:
            raise StoreError(f"Cannot write to {self.path}: {error.strerror}. Choose another --cache path.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise StoreError(f"{self.path} is being written by process {owner}. Wait for it or stop it.") from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _open(self) -> None:
        lines, end = schema.read_journal(self.path / schema.JOURNAL)
        if (self.path / "zarr.json").exists():
            _refuse_differences(self.path, schema.root_attributes(self.path) or {}, self.attributes)
        else:
            zarr.create_group(self.path, attributes={"sest": self.attributes}, zarr_format=3)
            schema.fsync_file(self.path / "zarr.json")
            schema.fsync_folder(self.path)
        self._journal = self.path / schema.JOURNAL
        if self._journal.exists() and self._journal.stat().st_size != end:
            os.truncate(self._journal, end)
        self._entries = schema.journal_entries(lines)
        finished = (self.path / schema.COMPLETE).exists()
        promised = not finished or schema.journal_is_promised(self.path)
        damaged = schema.damaged_files(self.path, self._entries.values(), every_byte=not promised)
        if damaged:
            self._drop(damaged + self._follow_up(damaged))
        if finished and (damaged or not promised):  # after the journal: a kill before this has every byte checked again
            (self.path / schema.COMPLETE).unlink()
            schema.fsync_folder(self.path)

    @property
    def complete(self) -> bool:
        """Whether the store was finished before, and its files are as they were then."""
        return (self.path / schema.COMPLETE).exists()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        new = not self._journal.exists()
        with open(self._journal, "ab") as file:
            file.write(b"".join(json.dumps(line, sort_keys=True).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        if new:
            schema.fsync_folder(self.path)

    def _promise(self, files: list[Path], **about: Any) -> None:
        """Make files durable, then journal them; `about` goes into each line (rows, entries)."""
        for file in files:
            schema.fsync_file(file)
        for folder in sorted({parent for file in files for parent in _parents(file, self.path)}):
            schema.fsync_folder(folder)
        lines = [
            {
                "file": file.relative_to(self.path).as_posix(),
                "size": file.stat().st_size,
                "sha256": schema.sha256_file(file),
                **about,
            }
            for file in files
        ]
        self._append(lines)
        self._entries.update({line["file"]: line for line in lines})

    def add_group(self, plan: GroupPlan, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        """Create one file's AnnData group with its arrays at their final shape. Done before: nothing happens.

        Made aside and moved into place file by file, so that shards that are there already stay (a repair).

        Args:
            plan: shapes, dtypes and attributes of the group.
            obs: (n_cells, ...) perturbation, cell type and batch; the index holds the original names.
            var: (n_genes, ...) index holds the gene names.
        """
        marker = f"{plan.path}/zarr.json"
        if marker in self._entries and self._entries[marker].get("ready"):
            return
        aside = self.path / schema.SPOOL / ".group"
        shutil.rmtree(aside, ignore_errors=True)
        _create_group(zarr.create_group(aside, zarr_format=3).require_group(plan.path), plan, obs, var)
        files = []
        for file in sorted(p for p in aside.rglob("*") if p.is_file() and p.parent != aside):
            files.append(self.path / file.relative_to(aside))
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, files[-1])
        last = self.path / marker
        self._promise([file for file in files if file != last])
        self._promise([last], ready=True)

    def _drop(self, names: list[str]) -> None:
        """Take files out of the journal: they will be written again."""
        self._append([{"drop": name} for name in names])
        for name in names:
            self._entries.pop(name, None)

    def _forget(self, prefix: str) -> None:
        self._drop([name for name in self._entries if name.startswith(prefix)])

    def _follow_up(self, damaged: list[str]) -> list[str]:
        """What must be written again because of damaged files that are no shards.

        The "ready" marks of the groups they belong to; with a damaged projection, all embeddings that it made.
        """
        shards = {name for name, entry in self._entries.items() if "rows" in entry or "entries" in entry}
        others = [name for name in damaged if name not in shards and name != "zarr.json"]
        again = []
        for mark in (name for name, entry in self._entries.items() if entry.get("ready")):
            folder = mark.removesuffix("zarr.json")
            if any(name.startswith(folder) or folder.startswith(name.removesuffix("zarr.json")) for name in others):
                again.append(mark)
        if f"{schema.PROJECTION}/zarr.json" in again:
            again += [name for name, entry in self._entries.items() if "rows" in entry]
            shutil.rmtree(self.path / schema.SPOOL, ignore_errors=True)
        return again

    def missing_embedding_shards(self, plan: GroupPlan) -> list[int]:
        """Numbers of the embedding shards that the journal does not have."""
        return [
            i
            for i in range(len(plan.embedding_shards()))
            if f"{plan.path}/obsm/{schema.EMBEDDING}/c/{i}/0" not in self._entries
        ]

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
        file = self.path / plan.path / "obsm" / schema.EMBEDDING / "c" / str(shard) / "0"
        file.unlink(missing_ok=True)  # Zarr would read what a kill or damage left of it
        _array(self.path, f"{plan.path}/obsm/{schema.EMBEDDING}")[start:stop] = rows.astype(plan.embedding_dtype)
        self._promise([file], rows=[start, stop])

    def write_target_shard(self, plan: GroupPlan, shard: int, data: np.ndarray, indices: np.ndarray) -> None:
        """Write one whole shard of the CSR targets: its stored values and their gene positions."""
        start, stop = plan.target_shards()[shard]
        assert len(data) == len(indices) == stop - start, (len(data), len(indices), start, stop)
        files = []
        for name, values in (("data", data), ("indices", indices)):
            files.append(self.path / plan.path / "X" / name / "c" / str(shard))
            files[-1].unlink(missing_ok=True)
            _array(self.path, f"{plan.path}/X/{name}")[start:stop] = values
        self._promise(files, entries=[start, stop])

    def write_projection(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Store the PCA (mean, basis, explained variance, float32) that made the embeddings."""
        folder = self.path / schema.PROJECTION
        if folder.exists():
            shutil.rmtree(folder)
            self._forget(schema.PROJECTION + "/")
        root = zarr.open_group(self.path, mode="r+", use_consolidated=False)
        group = root.create_group(schema.PROJECTION, attributes=dict(attributes))
        for name, values in arrays.items():
            group.create_array(name, data=np.ascontiguousarray(values), chunks=values.shape)
        last = folder / "zarr.json"
        self._promise(sorted(p for p in folder.rglob("*") if p.is_file() and p != last))
        self._promise([last], ready=True)

    def has_projection(self) -> bool:
        """Whether the projection was stored whole."""
        return bool(self._entries.get(f"{schema.PROJECTION}/zarr.json", {}).get("ready"))

    def read_projection(self) -> dict[str, np.ndarray]:
        """The stored projection's arrays by name."""
        group = zarr.open_group(self.path / schema.PROJECTION, mode="r", use_consolidated=False)
        return {name: np.asarray(array[:]) for name, array in group.arrays()}

    def spool_rows(self, name: str, start: int, rows: np.ndarray) -> None:
        """Keep finished rows of an unfinished shard, durably, so that a kill does not cost their encoding.

        Args:
            name: the shard, such as "group/3"; parts that begin with a dot are no group's.
            start: number of the first row.
            rows: (n, width).
        """
        folder = self.path / schema.SPOOL / name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{start:012d}.npy"
        aside = file.with_suffix(".partial")
        with open(aside, "wb") as stream:
            np.save(stream, rows)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
        for parent in _parents(file, self.path):
            schema.fsync_folder(parent)

    def spooled_rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows) of every block spooled under `name`, in order, up to one that cannot be read."""
        for file in sorted((self.path / schema.SPOOL / name).glob("*.npy")):
            try:
                rows = np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                return  # damaged since: these rows are made again
            yield int(file.stem), rows

    def drop_spool(self, name: str) -> None:
        """Delete the blocks spooled under `name` ("": all of the spool)."""
        shutil.rmtree(self.path / schema.SPOOL / name, ignore_errors=True)

    def finish(self) -> None:
        """Mark the store complete: spool and strays deleted, COMPLETE written last."""
        shutil.rmtree(self.path / schema.SPOOL, ignore_errors=True)
        for stray in self.path.rglob("*.partial"):
            stray.unlink()
        self._promise([self.path / "zarr.json"])
        content = {"files": len(self._entries), "journal_sha256": schema.sha256_file(self._journal)}
        schema.write_durably(self.path / schema.COMPLETE, json.dumps(content, sort_keys=True).encode() + b"\n")


def _ranges(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _parents(file: Path, root: Path) -> list[Path]:
    """The folders from the file's own up to `root`, both included."""
    folders = []
    for parent in file.parents:
        folders.append(parent)
        if parent == root:
            return folders
    raise AssertionError(f"{file} is not below {root}")


def refuse_foreign(path: Path) -> None:
    """Raise StoreError if `path` is something else than a store, the beginning of one, or an empty folder."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise StoreError(f"{path} is a URL. Stores are written to local folders: choose one, and copy it afterwards.")
    if not path.exists():
        return
    if not path.is_dir():
        raise StoreError(f"{path} is a file, not a store. Choose another --cache path.")
    if (path / "zarr.json").exists():
        if schema.root_attributes(path) is None:
            raise StoreError(f"{path} is a Zarr store that sest did not write. Choose another --cache path.")
    elif any(child.name != schema.LOCK and child.suffix != ".partial" for child in path.iterdir()):
        raise StoreError(f"{path} exists and is not a sest store. Choose another --cache path.")


def _has_auto_shard() -> bool:
    return hasattr(anndata.settings, "auto_shard_zarr_v3")


def _array(root: Path, name: str) -> zarr.Array:
    array = zarr.open_array(root / name, mode="r+")
    assert isinstance(array, zarr.Array)
    return array


def _refuse_differences(path: Path, made: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = list(_differences(made, asked))
    if different:
        shown = "; ".join(different[:6]) + (f"; and {len(different) - 6} more" if len(different) > 6 else "")
        raise StoreError(f"{path} was made differently ({shown}). Choose another --cache path or delete the store.")


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
