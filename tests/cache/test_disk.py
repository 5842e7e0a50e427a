"""cache/disk.py: flushed, renamed, the folder flushed, in this order; what fails leaves what was there before."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sest.cache.disk import (
    append_durably,
    delete_folder,
    file_aside,
    flush,
    folder_aside,
    sha256,
    sha256_file,
    write_aside,
    write_durably,
    write_flushed,
)


class Recorded:
    """Notes what reaches the disk, and lets one operation fail.

    Args:
        folder: its files are named by their place in it; "." is the folder itself.
        failing: the number of the operation that fails; -1: none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, failing: int = -1) -> None:
        self.done: list[tuple[str, ...]] = []
        self._folder, self._failing = folder.resolve(), failing
        fsync = os.fsync
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))

        def flushing(descriptor: int) -> None:
            self._note("fsync", self._name(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", flushing)

    def _renaming(self, rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def renaming(source: Path, target: Path) -> None:
            self._note("rename", self._name(source), self._name(target))
            rename(source, target)

        return renaming

    def _name(self, path: str | Path) -> str:
        return Path(path).resolve().relative_to(self._folder).as_posix()

    def _note(self, *operation: str) -> None:
        self.done.append(operation)
        if len(self.done) - 1 == self._failing:
            raise OSError(28, "No space left on device")


def test_hashes_are_sha256(tmp_path: Path) -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # FIPS 180-4
    assert sha256(b"") == empty
    assert sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == sha256(b"abc")


def test_a_file_is_flushed_then_renamed_then_its_folder_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorded(monkeypatch, tmp_path)
    write_durably(tmp_path / "f", b"new")
    assert disk.done == [("fsync", "f.partial"), ("rename", "f.partial", "f"), ("fsync", ".")]
    assert (tmp_path / "f").read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


def test_a_file_written_aside_leaves_its_folder_to_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Recorded(monkeypatch, tmp_path)
    write_aside(tmp_path / "f", b"new")
    write_flushed(tmp_path / "g", b"new")
    flush(tmp_path)
    assert disk.done == [("fsync", "f.partial"), ("rename", "f.partial", "f"), ("fsync", "g"), ("fsync", ".")]


@pytest.mark.parametrize("failing", [0, 1])
def test_where_writing_a_file_fails_the_older_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with monkeypatch.context() as full:
        Recorded(full, tmp_path, failing)
        with pytest.raises(OSError, match="No space left"):
            write_durably(tmp_path / "f", b"newer")
    assert (tmp_path / "f").read_bytes() == b"old"
    write_durably(tmp_path / "f", b"newer")  # over what the failure left
    assert (tmp_path / "f").read_bytes() == b"newer" and os.listdir(tmp_path) == ["f"]


def test_lines_are_added_and_flushed_and_a_new_file_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorded(monkeypatch, tmp_path)
    append_durably(tmp_path / "lines", b"one\n")
    append_durably(tmp_path / "lines", b"two\n")
    assert disk.done == [("fsync", "lines"), ("fsync", "."), ("fsync", "lines")]
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"


def test_a_file_made_by_another_library_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, mine = Recorded(monkeypatch, tmp_path), f".f.{os.getpid()}.partial"
    with file_aside(tmp_path / "f") as aside:
        aside.write_bytes(b"new")
        assert os.listdir(tmp_path) == [mine]
    assert disk.done == [("fsync", mine), ("rename", mine, "f"), ("fsync", ".")]
    assert (tmp_path / "f").read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("failing", [-1, 0, 1])
def test_a_file_that_is_not_finished_leaves_the_older_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    Recorded(monkeypatch, tmp_path, failing)

    def write() -> None:
        with file_aside(tmp_path / "f") as aside:
            aside.write_bytes(b"new")
            if failing < 0:
                raise OSError("in the block")

    with pytest.raises(OSError, match=r"No space left|in the block"):
        write()
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def write_folder(folder: Path, content: bytes) -> None:
    with folder_aside(folder) as aside:
        write_flushed(aside / "a", content)


FIRST = [("fsync", ".d.new/a"), ("fsync", ".d.new")]


def test_a_folder_is_flushed_with_its_files_then_renamed_then_the_one_above_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Recorded(monkeypatch, tmp_path)
    write_folder(tmp_path / "d", b"old")
    assert disk.done == [*FIRST, ("rename", ".d.new", "d"), ("fsync", ".")]
    disk.done.clear()
    write_folder(tmp_path / "d", b"new")
    assert disk.done == [*FIRST, ("rename", "d", ".d.old"), ("rename", ".d.new", "d"), ("fsync", ".")]
    assert (tmp_path / "d" / "a").read_bytes() == b"new" and os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    ("failing", "left"), [(0, {"d": b"old"}), (1, {"d": b"old"}), (2, {"d": b"old"}), (3, {".d.old": b"old"})]
)
def test_where_writing_a_folder_fails_the_older_one_is_whole_under_its_name_or_as_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, left: dict[str, bytes]
) -> None:
    write_folder(tmp_path / "d", b"old")
    with monkeypatch.context() as full:
        Recorded(full, tmp_path, failing)
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "d", b"new")
    assert {path.parent.name: path.read_bytes() for path in tmp_path.rglob("a")} == left
    assert sorted(os.listdir(tmp_path)) == sorted(left)
    write_folder(tmp_path / "d", b"newer")
    assert (tmp_path / "d" / "a").read_bytes() == b"newer"


def test_what_a_kill_left_of_a_folder_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    for name in (".d.new", ".d.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stray").touch()
    write_folder(tmp_path / "d", b"new")
    write_folder(tmp_path / "d", b"newer")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["a"] and os.listdir(tmp_path) == ["d"]
    shutil.rmtree(tmp_path / "d")


def test_a_deleted_folder_loses_its_name_durably_and_then_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d", ".d.gone"):  # the other one is what a kill left of an earlier one
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").touch()
    disk = Recorded(monkeypatch, tmp_path)
    delete_folder(tmp_path / "d")
    assert disk.done == [("rename", "d", ".d.gone"), ("fsync", ".")] and os.listdir(tmp_path) == []


@pytest.mark.parametrize(("failing", "left"), [(0, "d"), (1, ".d.gone")])
def test_a_folder_that_could_not_be_deleted_is_whole_under_its_name_or_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, left: str
) -> None:
    write_folder(tmp_path / "d", b"old")
    Recorded(monkeypatch, tmp_path, failing)
    with pytest.raises(OSError, match="No space left"):
        delete_folder(tmp_path / "d")
    assert os.listdir(tmp_path) == [left] and (tmp_path / left / "a").read_bytes() == b"old"


def test_an_error_of_the_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """write and fsync know descriptors only: their errors have no name."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_durably, append_durably, write_flushed):
        with pytest.raises(OSError, match="No space left") as error:
            write(tmp_path / "a", b"x")
        assert str(error.value.filename).startswith(str(tmp_path / "a"))


def test_a_file_has_the_mode_that_the_umask_says_whoever_writes_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with file_aside(tmp_path / "f") as aside:
            aside.touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
