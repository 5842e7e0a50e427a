"""sest.cache.shards against zarr's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import google_crc32c
import numcodecs.blosc
import numpy as np
import pytest
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from sest.cache.schema import CacheError
from sest.cache.shards import shards_of
from sest.cache.storage import storage_at


def stored(folder: Path, values: np.ndarray, codecs: list[BytesBytesCodec] | None = None, shards: int = 40) -> None:
    """An array as the cache stores its targets, in chunks of 10 and shards of 40 entries (or rows)."""
    array = zarr.create_array(
        folder / "a",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(10, *values.shape[1:]),
        shards=(shards, *values.shape[1:]),
        compressors=codecs or [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = values


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
@pytest.mark.parametrize("n", [1, 10, 39, 40, 41, 97])
def test_any_entries_are_those_that_zarr_reads(tmp_path: Path, dtype: str, n: int) -> None:
    values = np.random.default_rng(n).integers(0, 300, n).astype(dtype)
    stored(tmp_path, values)
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    theirs = zarr.open_array(tmp_path / "a", mode="r")
    for start in range(0, n + 1, 7):
        for stop in (start, min(start + 1, n), min(start + 33, n), n):
            found = shards.read(start, stop)
            assert found.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found, np.asarray(theirs[start:stop]))


@pytest.mark.parametrize("step", [1, 7, 10, 25])
def test_who_reads_on_and_on_unpacks_each_chunk_once(tmp_path: Path, step: int) -> None:
    values = np.random.default_rng(step).integers(0, 300, 97).astype(np.int16)
    stored(tmp_path, values)
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    with mock.patch("sest.cache.shards.numcodecs.blosc.decompress", side_effect=numcodecs.blosc.decompress) as unpacked:
        parts = [shards.read(start, min(start + step, 97)) for start in range(0, 97, step)]
        assert unpacked.call_count == -(-97 // shards.per_chunk)
    np.testing.assert_array_equal(np.concatenate(parts), values)
    for start, stop in ((90, 97), (0, 5), (95, 97), (0, 97), (3, 4), (96, 96)):  # anywhere, after another read
        np.testing.assert_array_equal(shards.read(start, stop), values[start:stop])


@pytest.mark.parametrize("codecs", [[Crc32cCodec()], None], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [1, 40, 97])
def test_any_rows_are_those_that_zarr_reads(
    tmp_path: Path, dtype: str, n: int, codecs: list[BytesBytesCodec] | None
) -> None:
    values = np.random.default_rng(n).normal(size=(n, 3)).astype(dtype)
    values[n // 2] = np.nan
    stored(tmp_path, values, codecs)
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    for start, stop in ((0, n), (n, n), (n // 3, n // 2), (n // 2, n)):
        np.testing.assert_array_equal(shards.read(start, stop), values[start:stop])


@pytest.mark.parametrize("place", ["chunk", "index", "end"])
def test_a_changed_or_missing_byte_is_an_error(tmp_path: Path, place: str) -> None:
    stored(tmp_path, np.arange(97, dtype=np.int32))
    file = tmp_path / "a" / "c" / "1"
    data = bytearray(file.read_bytes())
    if place == "end":
        del data[-1]
    else:
        data[40 if place == "chunk" else -30] ^= 1
    file.write_bytes(data)
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    with pytest.raises(CacheError, match=r"a/c/1 cannot be read \(a checksum does not match\)"):
        shards.read(0, 97)
    np.testing.assert_array_equal(shards.read(0, 40), np.arange(40))


def test_a_chunk_that_was_never_written_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    stored(tmp_path, np.arange(97, dtype=np.int32))
    about = json.loads((tmp_path / "a" / "zarr.json").read_text())
    about["shape"] = [110]
    (tmp_path / "a" / "zarr.json").write_text(json.dumps(about))
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    with pytest.raises(CacheError, match=r"a/c/2 cannot be read \(a chunk was never written\)"):
        shards.read(90, 110)


def test_arrays_of_other_codecs_are_left_to_zarr(tmp_path: Path) -> None:
    stored(tmp_path / "one", np.arange(97), [ZstdCodec(level=1), Crc32cCodec()])
    zarr.create_array(tmp_path / "two" / "a", shape=(97,), dtype="int32", chunks=(10,))
    zarr.create_array(
        tmp_path / "three" / "a", shape=(9, 9), dtype="int32", chunks=(3, 3), shards=(9, 9), compressors=None
    )
    for name in ("one", "two", "three"):
        assert shards_of(storage_at(tmp_path / name), "a") is None


def test_a_chunk_that_holds_more_or_fewer_values_than_its_array_says_is_an_error(tmp_path: Path) -> None:
    """Of one that holds fewer, what was in memory before would be left in the others."""
    stored(tmp_path, np.arange(40, dtype=np.int32))
    for n_bytes in (4, 36, 4000):
        packed = numcodecs.blosc.compress(bytes(n_bytes), b"zstd", 1)
        chunk = packed + google_crc32c.value(packed).to_bytes(4, "little")
        index = np.array([[0, len(chunk)]] * 4, "<u8").tobytes()
        (tmp_path / "a" / "c" / "0").write_bytes(chunk + index + google_crc32c.value(index).to_bytes(4, "little"))
        shards = shards_of(storage_at(tmp_path), "a")
        assert shards is not None
        with pytest.raises(CacheError, match=r"a/c/0 cannot be read \(a chunk holds more or fewer values"):
            shards.read(0, 40)


@pytest.mark.parametrize("places", [[2**62, 40], [0, 2**47], [2**63, 8], [2**64 - 1, 2**64 - 1]])
def test_places_of_chunks_that_no_shard_has_are_an_error_and_no_demand_for_memory(
    tmp_path: Path, places: list[int]
) -> None:
    stored(tmp_path, np.arange(40, dtype=np.int32))
    file = tmp_path / "a" / "c" / "0"
    data = file.read_bytes()
    index = np.frombuffer(data[-68:-4], "<u8").reshape(4, 2).copy()
    index[1] = places
    forged = index.tobytes()
    file.write_bytes(data[:-68] + forged + google_crc32c.value(forged).to_bytes(4, "little"))
    shards = shards_of(storage_at(tmp_path), "a")
    assert shards is not None
    with pytest.raises(
        CacheError, match=r"a/c/0 cannot be read \((the places of chunks are not in it|a chunk was never)"
    ):
        shards.read(0, 40)
