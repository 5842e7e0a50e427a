"""What is kept beside a cache: whole or not at all, and never taken for another's."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import sest.cache.derived
from sest.cache.derived import (
    Blocks,
    Unfinished,
    copied,
    derived_bytes,
    keep_derived,
    lacking_bytes,
    read_derived,
    write_once,
)
from sest.cache.storage import Storage, storage_at

ARRAYS = {"mean": np.arange(6, dtype=np.float32).reshape(2, 3), "key": np.array([5, 7]), "none": np.zeros((0, 4), bool)}
KEY = {"of": "a" * 64, "target_sum": 1e4}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    (tmp_path / "s.zarr").mkdir()
    return storage_at(tmp_path / "s.zarr")


def folder_of(storage: Storage) -> Path:
    (folder,) = (Path(storage.url) / ".derived").glob("means-*")
    return folder


def test_arrays_are_read_back_mapped_and_by_their_key_alone(storage: Storage) -> None:
    assert read_derived(storage, "means", KEY, ARRAYS) is None and derived_bytes(storage) == 0
    keep_derived(storage, "means", KEY, ARRAYS)
    found = read_derived(storage, "means", KEY, ARRAYS)
    assert found is not None and list(found) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        np.testing.assert_array_equal(found[name], values)
    assert isinstance(found["mean"], np.memmap) and not found["mean"].flags.writeable
    assert read_derived(storage, "means", KEY | {"target_sum": 1e3}, ARRAYS) is None
    assert read_derived(storage, "controls", KEY, ARRAYS) is None
    assert derived_bytes(storage) == 24 + 16


@pytest.mark.parametrize("damage", ["a byte", "shorter", "longer", "missing", "about", "key"])
def test_what_is_damaged_is_not_read_and_can_be_kept_again(
    storage: Storage, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep_derived(storage, "means", KEY, ARRAYS)
    file, about = folder_of(storage) / "mean.bin", folder_of(storage) / "about.json"
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "about":
        about.write_text("{")
    elif damage == "key":
        about.write_text(about.read_text().replace("a" * 64, "b" * 64))
    else:
        file.write_bytes(
            {"a byte": bytes([data[0] ^ 1]) + data[1:], "shorter": data[1:], "longer": data + b"0"}[damage]
        )
    with caplog.at_level(logging.WARNING):
        assert read_derived(storage, "means", KEY, ARRAYS) is None
    assert ("mean.bin is damaged; it is made again." in caplog.text) == (damage not in ("about", "key"))
    keep_derived(storage, "means", KEY, ARRAYS)
    found = read_derived(storage, "means", KEY, ARRAYS)
    assert found is not None and found["mean"].tolist() == ARRAYS["mean"].tolist()


@pytest.mark.parametrize(
    "about",
    [
        [],
        {"mean": 3},
        {"mean": ["object", [2, 3], None], "key": ["int64", [2], None], "none": ["bool", [0, 4], None]},
        {"mean": ["<U6", [1], None]},
        {"mean": ["float32", [-1, -6], None]},
        {"mean": ["float32", [2**62, 4], None]},
        {"mean": ["float32", "23", None]},
        {"mean": ["no type", [6], None]},
        {"mean": ["float32", [2, 3], None]},  # and no other
        {"../../elsewhere": ["float32", [2, 3], None]},
    ],
)
def test_what_says_of_itself_what_sest_never_writes_is_made_again(storage: Storage, about: Any) -> None:
    keep_derived(storage, "means", KEY, ARRAYS)
    file = folder_of(storage) / "about.json"
    file.write_text(json.dumps({"key": KEY, "arrays": about}))
    assert read_derived(storage, "means", KEY, ARRAYS) is None and not file.exists()
    for content in (b"[" * 100_000, b"[]", b"null", b"\xff"):
        keep_derived(storage, "means", KEY, ARRAYS)
        file.write_bytes(content)
        assert read_derived(storage, "means", KEY, ARRAYS) is None


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize("reason", ["a file in the way", "a full disk", "no room", "a URL"])
def test_what_cannot_be_kept_is_no_error_and_leaves_nothing(
    storage: Storage, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(storage.url)
    if reason == "a URL":
        storage = storage_at("memory://derived-test/s.zarr")
    elif reason == "a file in the way":
        (root / ".derived").write_text("")
    elif reason == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30))
    else:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sest.cache.derived.write_flushed", full)
    keep_derived(storage, "means", KEY, ARRAYS)
    assert read_derived(storage, "means", KEY, ARRAYS) is None
    assert [path for path in root.rglob("*") if path.is_file() and path.name != ".derived"] == []


TYPES: dict[str, np.dtype] = {"values": np.dtype(np.uint16), "ends": np.dtype(np.int64)}


def count_to(n: int) -> Callable[[Unfinished], None]:
    """Appends 0, 1 ... n - 1 and their ends; above 10 it is killed."""

    def write(files: Unfinished) -> None:
        for i in range(files.n["values"], n):
            if i == 10:
                raise KeyboardInterrupt
            files.append(values=np.array([i]), ends=np.array([i + 1]))

    return write


@pytest.mark.parametrize(("durable", "expected"), [(1, 10), (30, 9), (2**30, 0)])
def test_a_kill_loses_what_was_not_yet_made_sure_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: int, expected: int
) -> None:
    """An entry of each array are 10 bytes."""
    monkeypatch.setattr(sest.cache.derived, "DURABLE", durable)
    folder, begun = tmp_path / "place/big-1", list[int]()
    with pytest.raises(KeyboardInterrupt):
        write_once(folder, KEY, TYPES, count_to(11))
    assert not folder.exists() and lacking_bytes(folder, 2**62) <= 2**62 - 100  # 10 entries are on the disk

    def go_on(files: Unfinished) -> None:
        begun.append(files.n["values"])
        for i in range(files.n["values"], 12):
            files.append(values=np.array([i]), ends=np.array([i + 1]))

    found = write_once(folder, KEY, TYPES, go_on)
    assert begun == [expected] and {name: values.dtype for name, values in found.items()} == TYPES
    assert found["values"].tolist() == list(range(12)) and found["ends"].tolist() == list(range(1, 13))
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "ends.bin", "values.bin"]
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".new")]
    again = write_once(folder, KEY, TYPES, count_to(11))  # whole: nothing is appended
    assert again["values"].tolist() == list(range(12)) and isinstance(again["values"], np.memmap)


@pytest.mark.parametrize("change", ["another key", "a shorter file"])
def test_what_another_left_or_what_is_damaged_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(sest.cache.derived, "DURABLE", 1)
    with pytest.raises(KeyboardInterrupt):
        write_once(tmp_path / "big", KEY, TYPES, count_to(11))
    if change == "a shorter file":
        (tmp_path / ".big.new/ends.bin").write_bytes(b"")
    key = KEY if change == "a shorter file" else {**KEY, "target_sum": 5}
    assert write_once(tmp_path / "big", key, TYPES, count_to(3))["values"].tolist() == [0, 1, 2]


def test_an_array_made_in_blocks_is_kept_as_if_whole(tmp_path: Path) -> None:
    """Its bytes and its checksum; rows of it are copied in the order that is asked for."""
    storage, rows = storage_at(str(tmp_path)), np.arange(600, dtype=np.float32).reshape(200, 3)
    blocks = Blocks(rows.shape, rows.dtype, lambda: iter([rows[:7], rows[7:7], rows[7:]]))
    for name, made in (("whole", rows), ("blocks", blocks)):
        keep_derived(storage, name, KEY, {"mean": made})
    assert blocks.nbytes == rows.nbytes and np.array_equal(blocks.whole(), rows)
    found = [read_derived(storage, name, KEY, ["mean"]) for name in ("whole", "blocks")]
    for kept in found:
        assert kept is not None
        np.testing.assert_array_equal(kept["mean"], rows)
        asked = np.array([199, 0, *range(150), 3])
        np.testing.assert_array_equal(copied(kept["mean"], asked), rows[asked])
    about = [json.loads(file.read_text())["arrays"] for file in sorted((tmp_path / ".derived").glob("*/about.json"))]
    assert about[0] == about[1]


def test_processes_that_keep_the_same_at_one_time_leave_each_other_alone(storage: Storage, tmp_path: Path) -> None:
    """Two processes that start on a new cache: each reads what it or the other kept, and none says it is damaged."""
    ready, n = tmp_path / "ready", 20

    def one() -> None:
        while not ready.exists():
            time.sleep(0.001)
        for i in range(n):
            keep_derived(storage, "means", KEY | {"target_sum": i}, {"mean": np.full((200, 1000), i)})
            found = read_derived(storage, "means", KEY | {"target_sum": i}, ["mean"])
            assert found is not None and (found["mean"] == i).all()

    children = [context.Process(target=one) for context in [get_context("fork")] * 3]
    for child in children:
        child.start()
    ready.touch()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
