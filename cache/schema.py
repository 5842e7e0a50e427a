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
from collections.abc import Iterable
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


def root_attributes(root: Path) -> dict[str, Any] | None:
    """Return what the root group says of the store (its "sest" attribute), or None where it is not one of sest's.

    Raises:
        StoreError: its zarr.json cannot be read.
    """
    try:
        metadata = json.loads((root / "zarr.json").read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{root}/zarr.json cannot be read ({error}). If sest made it, delete it and embed again."
        ) from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    made = attributes.get("sest") if isinstance(attributes, dict) else None
    return made if isinstance(made, dict) else None


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the journal: its whole lines, and the number of bytes they take.

    A kill can leave a last line without its newline; that line was never promised and is left out.

    Raises:
        StoreError: a whole line is not one of the journal's.
    """
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in data[:end].splitlines()]
        if not all(map(_is_line, lines)):
            raise ValueError("a line names no file")
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}). Delete the store and run `sest embed` again.") from error
    return lines, end


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and ("drop" in line or {"file", "size", "sha256"} <= line.keys())


def journal_is_promised(root: Path) -> bool:
    """Whether COMPLETE is there and was written for the journal as it is now."""
    try:
        promised = json.loads((root / COMPLETE).read_text())["journal_sha256"]
        return bool(promised == sha256_file(root / JOURNAL))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def damaged_files(root: Path, entries: Iterable[dict[str, Any]], *, every_byte: bool = False) -> list[str]:
    """List journalled files that are missing or are not as they were written.

    Looks at the size of every file and the sha256 of the metadata, or, with `every_byte`, at the sha256 of all.
    """
    damaged = []
    for entry in entries:
        file = root / entry["file"]
        try:
            same = file.stat().st_size == entry["size"]
            if same and (every_byte or file.name == "zarr.json"):
                same = sha256_file(file) == entry["sha256"]
        except OSError:
            same = False
        if not same:
            damaged.append(entry["file"])
    return damaged


def journal_entries(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keep what holds now: file name -> its last line, without files a later line dropped."""
    entries: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "drop" in line:
            entries.pop(line["drop"], None)
        else:
            entries[line["file"]] = line
    return entries
