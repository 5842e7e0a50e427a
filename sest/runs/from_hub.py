"""Heads by name: `hf://owner/name` is a checkpoint that somebody pushed to the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from sest.errors import InputError, shown
from sest.hub import NAME, Repository

logger = logging.getLogger(__name__)

MARKER = "state.json"
_ADDRESS = re.compile(rf"hf:/{{1,2}}{NAME.pattern}")  # a Path has one slash left


def repository_of(path: str | os.PathLike[str]) -> Repository | None:
    """The repository that a path names as hf://owner/name or hf://owner/name@revision; None: it names no such one."""
    found = _ADDRESS.fullmatch(os.fspath(path))
    return Repository(found[1], found[2], "pass FOLDER") if found else None


def fetched(path: Path) -> Path:
    """A path as it is, or of hf://owner/name the folder of its checkpoint, downloaded where it is not there yet.

    Raises:
        InputError: no such repository, none of a checkpoint, no access or no connection.
    """
    repository = repository_of(path)
    if repository is None:
        return path
    folder, names = repository.files(MARKER)
    if MARKER not in names:
        raise InputError(f"{repository.name} is no head that `sest push` wrote: it has {shown(names)}.")
    if folder is None:
        folder = repository.download([name for name in names if name.endswith((".safetensors", MARKER))])
        logger.info(f"{repository.name}: revision {folder.name[:12]}, in {folder}.")
    return folder
