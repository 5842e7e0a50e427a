"""YAML in files that nobody vouches for: containers, numbers and text alone, of at most 1 MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sest.errors import InputError, one_line

MAX_BYTES = 1_000_000


def parse_yaml(text: str, name: str) -> Any:
    """What a text says; `name` is where it is from.

    Raises:
        InputError: it is too long for a configuration, or not YAML.
    """
    if len(text) > MAX_BYTES:
        raise InputError(f"{name} is larger than 1 MB, which no model configuration is.")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{name} is not YAML ({one_line(error)}).") from error


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        InputError: it cannot be read, or see `parse_yaml`.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return parse_yaml(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
