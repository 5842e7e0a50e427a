"""What is kept beside a cache: whole or not at all, and never taken for another's."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sest.cache.derived import derived_bytes, keep_derived, read_derived
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
    assert read_derived(storage, "means", KEY) is None and derived_bytes(storage) == 0
    keep_derived(storage, "means", KEY, ARRAYS)
    found = read_derived(storage, "means", KEY)
    assert found is not None and list(found) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape
        np.testing.assert_array_equal(found[name], values)
    assert isinstance(found["mean"], np.memmap) and not found["mean"].flags.writeable
    assert read_derived(storage, "means", KEY | {"target_sum": 1e3}) is None
    assert read_derived(storage, "controls", KEY) is None
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
        assert read_derived(storage, "means", KEY) is None
    assert ("mean.bin is damaged; it is made again." in caplog.text) == (damage not in ("about", "key"))
    keep_derived(storage, "means", KEY, ARRAYS)
    found = read_derived(storage, "means", KEY)
    assert found is not None and found["mean"].tolist() == ARRAYS["mean"].tolist()


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

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sest.cache.derived.write_flushed", full)
    keep_derived(storage, "means", KEY, ARRAYS)
    assert read_derived(storage, "means", KEY) is None
    assert [path for path in root.rglob("*") if path.is_file() and path.name != ".derived"] == []
