"""Who is told of the stages of a pipeline, and keeps what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sest.pipeline.stages import Watcher


class Recorder(Watcher):
    """Keeps the command lines, the stages that ended and that were passed over, and the notes."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.ended: list[str] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def command(self, line: str) -> None:
        self.commands.append(line)

    def passed_over(self, stage: str, made: Path) -> None:
        assert made.exists()
        self.skipped.append(stage)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, stage: str, result: Any) -> None:
        self.ended.append(stage)
