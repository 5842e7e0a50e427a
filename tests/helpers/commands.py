"""The commands of `sest`, and what one leaves behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from sest.cli.main import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = [  # (command, parameter), arguments too
    (name, parameter)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if parameter.name not in ("help", "help_all") and not parameter.hidden
]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder (and every folder) with its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
