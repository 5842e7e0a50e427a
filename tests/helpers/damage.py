"""What disks and people do to files: a bit, an end that is missing, an empty file, no file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

KINDS = ("bit", "cut", "empty", "missing")


def damage(file: Path, kind: str, rng: np.random.Generator) -> None:
    """Change a file in one of KINDS."""
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
        return
    if kind == "bit":
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    length = {"bit": len(data), "cut": int(rng.integers(1, len(data))), "empty": 0}[kind]
    file.write_bytes(data[:length])


def files_of(path: Path) -> list[Path]:
    """All files below a folder."""
    return [file for file in sorted(path.rglob("*")) if file.is_file()]
