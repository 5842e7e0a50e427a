"""Names, sizes and small file operations that the writer and the reader of a store share.

A store is a folder (DESIGN: one Zarr v3 store; every file's group is a valid AnnData group):

    OUT.zarr/zarr.json            root group; attribute "sest" says how the store was made
    OUT.zarr/<group>/             X (CSR targets), obs, var, obsm/X_sest; opens with anndata.read_zarr
    OUT.zarr/projection/          mean, basis, explained_variance of the PCA, where there is one
    OUT.zarr/journal.jsonl        one line a finished file: {file, size, sha256, ...}, fsynced
    OUT.zarr/COMPLETE             written last; holds the sha256 of the journal
    OUT.zarr/.spool/              finished row blocks of unfinished shards; gone when the store is complete
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
EMBEDDING = "X_sest"
ROWS_PER_CHUNK = 1024
ROWS_PER_SHARD = 16_384
ENTRIES_PER_CHUNK = 262_144  # stored values of the CSR targets
ENTRIES_PER_SHARD = 64 * ENTRIES_PER_CHUNK

JOURNAL = "journal.jsonl"
COMPLETE = "COMPLETE"
LOCK = ".lock"
SPOOL = ".spool"
PROJECTION = "projection"
RESERVED = (JOURNAL, COMPLETE, LOCK, SPOOL, PROJECTION, "zarr.json")

LICENCE_NOTE = (
    "Embeddings made with State Embedding (SE) weights are outputs of a model whose licence is non-commercial; "
    "see https://huggingface.co/arcinstitute/SE-600M."
)


class StoreError(ValueError):
    """A store that cannot be used as asked: one line that says what is wrong and what to do."""


def fsync_file(path: Path) -> None:
    """Flush one file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Flush a folder's names (new files, renames) to the disk."""
    fsync_file(path)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` aside, fsync it, rename it to `path` and fsync the folder: all of it or nothing."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def root_attributes(root: Path) -> Any:
    """Return what the root group says of the store (its "sest" attribute), or None where it says nothing."""
    try:
        return json.loads((root / "zarr.json").read_text())["attributes"].get("sest")
    except (ValueError, KeyError, AttributeError) as error:
        raise StoreError(f"{root}/zarr.json cannot be read ({error!r}). Delete the store and embed again.") from error


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the journal: its whole lines, and the number of bytes they take.

    A kill can leave a last line without its newline; that line was never promised and is left out.
    """
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:end].splitlines()], end
    except json.JSONDecodeError as error:
        raise StoreError(f"{path} is damaged ({error}). Delete the store and run `sest embed` again.") from error


def damaged_files(root: Path, entries: list[dict[str, Any]]) -> list[str]:
    """List journalled files that are missing or have another size than when they were written."""
    damaged = []
    for entry in entries:
        try:
            size = os.stat(root / entry["file"]).st_size
        except FileNotFoundError:
            size = -1
        if size != entry["size"]:
            damaged.append(entry["file"])
    return damaged


def journal_entries(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keep what holds now: file name -> its last line, without files a later line dropped."""
    entries: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "drop" in line:
            entries.pop(line["drop"], None)
        else:
            entries[line["file"]] = line
    return entries
