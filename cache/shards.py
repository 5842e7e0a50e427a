"""Read the shards of a cache: the checksum and the decompression of each chunk, and nothing between.

Training reads every stored value of a cache, and zarr takes several times as long as zstd does
(benchmarks/load_cache.py); it also takes a shard that is gone for one that was never written. So the codecs of
`sest.cache.layout` are undone here: a shard is chunks, packed with blosc or not, each followed by its CRC-32C, and at
its end the place and length of every chunk with a CRC-32C of their own (Zarr v3, sharding_indexed). Arrays of other
codecs are zarr's to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np

from sest.cache import schema
from sest.cache.storage import Storage, reading

CRC = 4  # bytes of a checksum
PLACE = np.dtype("<u8")
BLOSC, LENGTHS = (
    16,
    np.dtype("<u4"),
)  # bytes of a blosc chunk's header: 4 of versions, bytes unpacked, of a block, packed


@dataclass(frozen=True)
class Shards:
    """One array, in shards of chunks. Its entries are numbers, or rows of them."""

    storage: Storage
    name: str  # of the array in the cache
    length: int  # entries
    row: tuple[int, ...]  # shape of an entry: (), or (width,)
    dtype: np.dtype
    per_chunk: int  # entries
    per_shard: int
    packed: bool  # with blosc
    _places: dict[str, np.ndarray] = field(  # by file: (chunks, 2) int64
        default_factory=dict, repr=False, compare=False
    )
    _last: list[tuple[str, int, np.ndarray]] = field(  # the chunk that was read last, where a reader goes on in it
        default_factory=list, repr=False, compare=False
    )

    def read(self, start: int, stop: int, dtype: np.dtype | None = None) -> np.ndarray:
        """Entries [start, stop), as `dtype` (None: as stored), which must hold them.

        Raises:
            CacheError: a shard is missing, or a chunk or an index in it is not what its checksum says.
        """
        assert 0 <= start <= stop <= self.length, (start, stop, self.length)
        out = np.empty((stop - start, *self.row), self.dtype if dtype is None else dtype)
        for shard in range(start // self.per_shard, -(-stop // self.per_shard) if stop > start else 0):
            first = shard * self.per_shard
            a, b = max(start, first), min(stop, first + self.per_shard)
            file = "/".join([self.name, "c", str(shard), *("0" for _ in self.row)])
            with reading(self.storage, file):
                self._fill(file, a - first, b - first, out[a - start : b - start])
        return out

    def _fill(self, file: str, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out` with the entries [start, stop) of one shard."""
        if file not in self._places:
            index = self.storage.read(file, -(2 * PLACE.itemsize * (self.per_shard // self.per_chunk) + CRC))
            places = _checked(np.frombuffer(index, np.uint8)).view(PLACE)
            self._places[file] = places.astype(np.int64).reshape(-1, 2)
        low, high = start // self.per_chunk, -(-stop // self.per_chunk)
        for last_file, number, values in tuple(self._last):
            if (file, low) == (last_file, number):
                n = min((low + 1) * self.per_chunk, stop) - start
                out[:n] = values[start - low * self.per_chunk :][:n]
                start, low, out = start + n, low + 1, out[n:]
        if start == stop:
            return
        wanted = self._places[file][low:high]
        if (wanted == -1).any():  # all bits set
            raise ValueError("a chunk was never written")
        buffer = np.empty((self.per_chunk, *self.row), self.dtype)
        most = buffer.nbytes + BLOSC + CRC  # bytes of a chunk, however badly it packs
        if wanted.min() < 0 or wanted[:, 0].max() > most * len(self._places[file]) or wanted[:, 1].max() > most:
            raise ValueError("the places of chunks are not in it")
        begin = int(wanted[:, 0].min())
        data = np.frombuffer(self.storage.read(file, begin, int(wanted.sum(1).max())), np.uint8)
        for number, (place, n_bytes) in enumerate(wanted.tolist(), low):
            values = self._unpacked(_checked(data[place - begin : place - begin + n_bytes]), buffer)
            first = number * self.per_chunk
            a, b = max(start, first), min(stop, first + self.per_chunk)
            out[a - start : b - start] = values[a - first : b - first]
        if self.packed:  # to unpack it again would take longer than it takes room
            self._last[:] = [(file, high - 1, values)]  # this call's own buffer, which nothing writes to any more

    def _unpacked(self, chunk: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        """The entries of a chunk, all of them; `buffer` is of their shape and may be where they are put."""
        n_bytes, n_packed = chunk[:BLOSC].view(LENGTHS)[[1, 3]] if self.packed else (len(chunk), len(chunk))
        if (n_bytes, n_packed) != (buffer.nbytes, len(chunk)):  # blosc leaves as it is what a chunk does not fill
            raise ValueError("a chunk holds more or fewer values than others")
        if not self.packed:
            return chunk.view(self.dtype).reshape(buffer.shape)
        numcodecs.blosc.decompress(chunk, buffer)
        return buffer


def shards_of(storage: Storage, name: str) -> Shards | None:
    """The shards of an array; None where it is not stored as `sest.cache.layout` stores targets and embeddings."""
    with reading(storage, f"{name}/{schema.ROOT}"):
        about = schema.parsed(storage.read(f"{name}/{schema.ROOT}"))
    try:
        (codec,) = about["codecs"]
        inner = codec["configuration"]
        names = [part["name"] for part in inner["codecs"]]
        known = (
            codec["name"] == "sharding_indexed"
            and about["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            and inner["index_location"] == "end"
            and [_said(part) for part in inner["index_codecs"]] == [LITTLE, CHECKSUM]
            and [_said(part) for part in inner["codecs"] if part["name"] != "blosc"] == [LITTLE, CHECKSUM]
            and names in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"])
        )
        (length, *row), (per_shard, *width) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
        per_chunk, *of_chunk = inner["chunk_shape"]
        known = known and row == width == of_chunk
        dtype = np.dtype(about["data_type"])
    except (KeyError, TypeError, ValueError):
        return None
    return Shards(storage, name, length, tuple(row), dtype, per_chunk, per_shard, "blosc" in names) if known else None


def _said(codec: dict[str, Any]) -> tuple[str, Any]:
    """A codec's name and what it is set to; None where that is nothing, which writers say in several ways."""
    return codec["name"], codec.get("configuration") or None


LITTLE, CHECKSUM = ("bytes", {"endian": "little"}), ("crc32c", None)


def _checked(data: np.ndarray) -> np.ndarray:
    """The bytes before the checksum that ends `data`."""
    if len(data) < CRC or google_crc32c.value(data[:-CRC]) != int.from_bytes(data[-CRC:].tobytes(), "little"):
        raise ValueError("a checksum does not match")
    return data[:-CRC]
