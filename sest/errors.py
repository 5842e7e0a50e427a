"""The errors a user is meant to see, and the words they are made of."""

from __future__ import annotations

import difflib
import errno
import json
import os
from collections.abc import Iterable
from typing import Any

LONGEST = 200  # characters of a name in an error line
LONGEST_LINE = 2000


class Error(ValueError):
    """Whatever a user's input can cause; offered as `sest.Error`. A line of more than LONGEST_LINE loses its middle."""

    def __init__(self, line: str = "") -> None:
        kept = (LONGEST_LINE - len(" ... ")) // 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:kept]} ... {line[-kept:]}")


class InputError(Error):
    """Bad input: one line that says what is wrong, what exists and what to do (exit code 2)."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"


def nearest_file(path: str | os.PathLike[str]) -> str:
    """Return `" Did you mean 'x'?"` for the files of the same folder that are called nearly as `path`, or ""."""
    folder, name = os.path.split(os.fspath(path).rstrip(os.sep))
    try:
        there = [entry for entry in sorted(os.listdir(folder or ".")) if not entry.startswith(".")]
    except OSError:
        return ""
    return nearest(name, there)


# A file that only such a folder has, what the folder is, and what takes it.
_FOLDERS = (
    ("state.json", "a checkpoint folder, which `sest predict` takes"),
    ("config.toml", "a run folder, which `sest predict` takes"),
    ("pipeline.toml", "a folder of `sest run`; the run in it is {path}/run"),
    ("results.csv", "a folder of `sest evaluate`, with its scores in results.csv"),
    ("protein_embeddings.pt", "an encoder folder, which `sest embed --encoder` takes"),
)


def what_it_is(path: str | os.PathLike[str]) -> str:
    """Return `" It is a run folder, which `sest predict` takes."` for what else is known to stand at `path`, or ""."""
    path = os.fspath(path)
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
            return " It is a file of cells, which `sest embed` takes." if is_hdf5 else ""
        if os.path.isfile(metadata := os.path.join(path, "zarr.json")):
            with open(metadata, "rb") as file:
                is_cache = b'"sest"' in file.read(1_000_000)
            return f" It is {'a cache, which `sest train`' if is_cache else 'a Zarr store, which `sest embed`'} takes."
    except OSError:
        return ""
    for name, what in _FOLDERS:
        if os.path.isfile(os.path.join(path, name)):
            return f" It is {what.format(path=path.rstrip(os.sep))}."
    return ""


def shown(names: Iterable[str], limit: int = 8) -> str:
    """Join names for an error line: the first `limit` of them, each cut at LONGEST, and how many more there are."""
    names = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in map(str, names)]
    if not names:
        return "(none)"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# Characters that take no visible place although Unicode counts them as letters or marks: Hangul fillers, variation
# selectors and the like.
UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(n) for n in range(0xFE00, 0xFE10)}
UNSEEN |= {chr(n) for n in range(0xE0100, 0xE01F0)}


def visible(text: str) -> str:
    """Text that may be from a file as people can be shown it, on one line.

    Control characters, which a terminal obeys, and what is invisible or turns the direction of writing stand as
    `\\x1b` or `\\u202e`; nothing else changes.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and c not in UNSEEN else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of what another library's error says, without a full stop, cut at `limit` characters."""
    lines = (" ".join(line.split()).strip(" .") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:limit]


def brief(value: Any) -> str:
    """A plain value as JSON, cut at 60 characters."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else text[:57] + "..."


NO_MEMORY = (  # how torch, C++ and the loader say it
    "DefaultCPUAllocator",
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "memory allocation failed",
    "failed to map segment",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine had no memory left: Python and NumPy say so by kind, others in words."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(words in str(error) for words in NO_MEMORY)


class TrainingFailed(Exception):
    """Training cannot go on (exit code 1): what happened, what is kept, what to try."""
