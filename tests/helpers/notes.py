"""A reporter that keeps what it is told."""

from __future__ import annotations

from sest.progress import Silent


class Notes(Silent):
    """What `with reporting(Notes())` hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int, int]] = []  # task, total, done before

    def begin(self, task: str, total: int, unit: str, done: int = 0, detail: object = None) -> None:
        self.steps.append((task, total, done))

    def note(self, text: str) -> None:
        self.notes.append(text)
