"""The journal: which files of a cache are finished, with their sizes and hashes. A file not in it does not exist.

Every process that writes has a journal of its own, so that none waits for another; they are read together, and become
one sorted file when the cache is complete: the same bytes whoever wrote which file, and in whatever order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sest.cache import schema
from sest.cache.schema import CacheError
from sest.cache.storage import Storage

Entries = dict[str, dict[str, Any]]  # file name -> its line
_NAME = re.compile(r"journal(?:-([0-9]+))?\.jsonl")


def journal_name(rank: int) -> str:
    """The journal of one process."""
    return schema.JOURNAL if rank == 0 else f"journal-{rank}.jsonl"


def journals(names: Iterable[str]) -> list[str]:
    """Those of a cache's files that are journals, the first process's first."""
    ranks = {name: int(found[1] or 0) for name in names if (found := _NAME.fullmatch(name))}
    return sorted(ranks, key=lambda name: ranks[name])


def line_of(entry: dict[str, Any]) -> bytes:
    """One line of a journal."""
    return json.dumps(entry, sort_keys=True).encode() + b"\n"


def merged(entries: Entries) -> bytes:
    """A journal of all entries, sorted by file name."""
    return b"".join(line_of(entries[name]) for name in sorted(entries))


def read_journal(storage: Storage, name: str) -> tuple[Entries, bytes]:
    """Read one journal: its entries, and the bytes of its whole lines.

    A kill can leave a last line without its newline; that line was never promised and is left out.

    Raises:
        CacheError: a whole line is not one of a journal's.
    """
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return {}, b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [_entry(schema.parsed(line)) for line in whole.splitlines()]
    except ValueError as error:
        raise CacheError(
            f"{storage}/{name} is damaged ({error}). Delete the cache and run `sest embed` again."
        ) from error
    return {line["file"]: line for line in lines}, whole


def _entry(line: Any) -> dict[str, Any]:
    """A line of a journal, with the types that it must have. Raises ValueError."""
    if not isinstance(line, dict) or not schema.is_file_name(line.get("file")):
        raise ValueError("a line names no file of a cache")
    if type(line.get("size")) is not int or line["size"] < 0 or not isinstance(line.get("sha256"), str):
        raise ValueError("a line has no size or no sha256")
    return line


def is_small(entry: Mapping[str, Any]) -> bool:
    """Whether a file is none of the shards, whose chunks have checksums of their own."""
    return "rows" not in entry and "entries" not in entry


def read_journals(storage: Storage) -> Entries:
    """Read what all processes have finished; where two name one file, the first process's line holds."""
    entries: Entries = {}
    for name in reversed(journals(storage.here())):
        entries.update(read_journal(storage, name)[0])
    return entries


def is_promised(storage: Storage) -> bool:
    """Whether COMPLETE is there and was written for journal.jsonl as it is now."""
    try:
        promised = schema.parsed(storage.read(schema.COMPLETE))["journal_sha256"]
        return bool(promised == hashlib.sha256(storage.read(schema.JOURNAL)).hexdigest())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete_line(entries: Entries) -> bytes:
    """What COMPLETE says of the merged journal."""
    content = {"files": len(entries), "journal_sha256": hashlib.sha256(merged(entries)).hexdigest()}
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def damaged_files(
    storage: Storage, entries: Iterable[dict[str, Any]], sizes: Mapping[str, int], *, every_byte: bool = False
) -> list[str]:
    """List journalled files that are missing or are not as they were written.

    Looks at the size of every file, of which `sizes` has what is there, and at the sha256 of all but shards; or, with
    `every_byte`, at the sha256 of all.
    """
    damaged = []
    for entry in entries:
        name = entry["file"]
        same = sizes.get(name) == entry["size"]
        if same and (every_byte or is_small(entry)):
            try:
                same = storage.sha256(name) == entry["sha256"]
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EIO):
                    raise
                same = False  # gone since its size was read, or on a bad part of the disk
        if not same:
            damaged.append(name)
    return damaged


def root_attributes(storage: Storage, group: str = "") -> dict[str, Any] | None:
    """Return what a group (the root: "") says of itself (its "sest" attribute); None where it is not one of sest's.

    Raises:
        CacheError: its zarr.json is missing or cannot be read.
    """
    name = f"{group}/{schema.ROOT}" if group else schema.ROOT
    try:
        metadata = schema.parsed(storage.read(name))
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{storage}/{name} cannot be read ({error}). If sest made it, delete it and embed again."
        ) from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    made = attributes.get("sest") if isinstance(attributes, dict) else None
    return made if isinstance(made, dict) else None
