"""cache/schema.py: names that no group may have, and shards of whole chunks."""

from __future__ import annotations

from pathlib import Path

from helpers.caches import GROUPS
from sest.cache import CacheWriter, schema
from sest.errors import Error


def test_every_name_beside_the_groups_is_reserved(finished: Path, tmp_path: Path) -> None:
    groups = {group.path.split("/")[0] for group in GROUPS}
    assert {file.name for file in finished.iterdir()} - groups <= set(schema.RESERVED)
    with CacheWriter(tmp_path / "cache.zarr", {"groups": []}, rank=0, world_size=2) as writer:
        writer.finish()
        assert {file.name for file in (tmp_path / "cache.zarr").iterdir()} <= set(schema.RESERVED)


def test_a_shard_is_a_whole_number_of_chunks() -> None:
    assert schema.ROWS_PER_SHARD % schema.ROWS_PER_CHUNK == 0
    assert schema.ENTRIES_PER_SHARD % schema.ENTRIES_PER_CHUNK == 0


def test_a_cache_error_is_one_of_sests_and_a_value_error() -> None:
    assert issubclass(schema.CacheError, Error) and issubclass(schema.CacheError, ValueError)
