"""A few files of every kind that `make fuzz` tries by the thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.fuzzing import Target, fuzz, targets


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_sound_files_are_read(readers: dict[str, Target]) -> None:
    for target in readers.values():
        target.place.write_bytes(target.sound)
        target.read()


def test_damaged_files_are_read_or_refused_in_one_line(readers: dict[str, Target], tmp_path: Path) -> None:
    for name, target in readers.items():
        ends = fuzz(name, target, 15, 0, tmp_path)
        assert set(ends) <= {"read", "refused"} and ends["refused"], (name, ends)
