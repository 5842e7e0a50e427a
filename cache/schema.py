"""Names, sizes and small file operations that the writer and the reader of a store share.

A store is a folder (DESIGN: one Zarr v3 store; every file's group is a valid AnnData group):

    OUT.zarr/zarr.json            root group; attribute "sest" says how the store was made
    OUT.zarr/<group>/             X (CSR targets), obs, var, obsm/X_sest; opens with anndata.read_zarr
    OUT.zarr/projection/          mean, basis, explained_variance of the PCA, where there is one
    OUT.zarr/journal.jsonl        one line a finished file: {file, size, sha256, ...}, fsynced; sorted once complete
    OUT.zarr/journal-<rank>.jsonl the same of further processes, while they write; merged into journal.jsonl at the end
    OUT.zarr/COMPLETE             written last; holds the sha256 of the journal
    OUT.zarr/.spool/              finished row blocks of unfinished shards; gone when the store is complete
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SCHEMA_VERSION = 1
EMBEDDING = "X_sest"
ROWS_PER_CHUNK = 1024
ROWS_PER_SHARD = 16_384
ENTRIES_PER_CHUNK = 262_144  # stored values of the CSR targets
ENTRIES_PER_SHARD = 64 * ENTRIES_PER_CHUNK

ROOT = "zarr.json"
JOURNAL = "journal.jsonl"
COMPLETE = "COMPLETE"
LOCK = ".lock"
FINISHING = ".finishing"  # locked by the one of several processes that completes the store
SPOOL = ".spool"
PROJECTION = "projection"
PARTIAL = ".partial"  # ends the name of a file that is being written
RESERVED = (JOURNAL, COMPLETE, LOCK, FINISHING, SPOOL, PROJECTION, ROOT)
MEASURED = ("fidelity",)  # root attributes that were measured, which another machine may measure otherwise

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


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write `data` aside, fsync it, rename it to `path` and fsync the folder: all of it or nothing."""
    aside = path.with_name(path.name + PARTIAL)
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)
