"""cache/reader.py: a finished store reads back exactly; an unfinished or damaged one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from small import ATTRIBUTES, GROUPS, PROJECTION

from sest.cache import StoreError, open_cache, schema


def refusal(store: Path) -> str:
    """What opening says; one line."""
    with pytest.raises(StoreError) as refused:
        open_cache(store)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_groups_read_back_what_was_written(finished: Path) -> None:
    cache = open_cache(finished)
    assert cache.attributes == ATTRIBUTES
    assert (cache.dim, cache.n_cells, list(cache.groups)) == (3, 32, ["a", "ds/b"])
    assert cache.size == sum(e["size"] for e in cache._entries.values()) > 0
    for made in GROUPS:
        group = cache.groups[made.path]
        assert (group.n_cells, group.n_genes, group.dataset) == (*made.x.shape, made.path.split("/")[0])
        assert group.obs.equals(made.obs)
        assert group.genes == list(made.var.index)
        np.testing.assert_array_equal(group.indptr, made.x.indptr)
        for start, stop in ((0, None), (0, 1), (7, 9), (5, 12), (4, 4), (12, 13)):  # shards are of 8 cells
            np.testing.assert_array_equal(group.embeddings(start, stop), made.embeddings[start:stop])
            rows = group.targets(start, stop)
            assert rows.dtype == made.x.dtype and rows.shape == made.x[start:stop].shape
            np.testing.assert_array_equal(rows.toarray(), made.x[start:stop].toarray())


def test_the_projection_and_its_attributes_are_read(finished: Path) -> None:
    cache = open_cache(str(finished))
    np.testing.assert_equal(cache.projection, PROJECTION)
    assert cache.projection_attributes == {"genes": ["G1"]}


def test_reader_refuses_a_store_without_complete(store: Path) -> None:
    (store / schema.COMPLETE).unlink()
    assert refusal(store) == (
        f"{store} is unfinished (no COMPLETE file). Run the same `sest embed` command to finish it."
    )


def test_what_is_no_store_is_refused(tmp_path: Path, store: Path) -> None:
    assert "missing.zarr does not exist. Make one with `sest embed" in refusal(tmp_path / "missing.zarr")
    assert "is not a sest store (no zarr.json in it)" in refusal(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    assert "is a Zarr store, but not one of sest's" in refusal(tmp_path / "other.zarr")
    for content in ("{", "[]", "null", "{}", '{"attributes": 3}', "\udcff"):
        (store / "zarr.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        assert "zarr.json cannot be read" in (message := refusal(store)) or "not one of sest's" in message


def test_another_schema_version_is_refused_with_both_versions(store: Path) -> None:
    root = json.loads((store / "zarr.json").read_text())
    root["attributes"]["sest"] |= {"schema_version": 99, "sest_version": "7.1"}
    (store / "zarr.json").write_text(json.dumps(root))
    assert "schema version 99; this sest reads version 1. Embed again, or use the sest version" in refusal(store)
    assert "(7.1)" in refusal(store)


@pytest.mark.parametrize(
    "file", ["a/obsm/X_sest/c/0/0", "ds/b/X/indices/c/0", "a/obs/_index/c/0", "projection/mean/c/0", "a/zarr.json"]
)
def test_a_missing_truncated_or_empty_file_is_refused(store: Path, file: str) -> None:
    content, n_files = (store / file).read_bytes(), len(open_cache(store)._entries)
    for damaged in (None, content[:-1], b"", content + b"\n"):
        (store / file).unlink()
        if damaged is not None:
            (store / file).write_bytes(damaged)
        assert refusal(store) == (
            f"{store} is damaged: 1 of {n_files} files are missing or are not as they were written "
            f"(first: {file}). Run the same `sest embed` command to write them again."
        )
        (store / file).write_bytes(content)
    open_cache(store)


@pytest.mark.parametrize("change", ["a line more", "a line less", "another sha256", "no journal", "no promise"])
def test_a_changed_journal_is_refused(store: Path, change: str) -> None:
    file = store / schema.JOURNAL
    lines = file.read_text().splitlines(keepends=True)
    if change == "no journal":
        file.unlink()
    elif change == "no promise":
        (store / schema.COMPLETE).write_text("{}")
    else:
        changed = {
            "a line more": [*lines, lines[-1]],
            "a line less": lines[:-1],
            "another sha256": [lines[0].replace('"sha256": "', '"sha256": "0'), *lines[1:]],
        }
        file.write_text("".join(changed[change]))
    assert "is damaged: journal.jsonl is not the one COMPLETE was written for. Run the same" in refusal(store)


@pytest.mark.parametrize("file", ["a/obsm/X_sest/c/1/0", "ds/b/X/data/c/0", "a/obs/perturbation/codes/c/0"])
def test_verify_names_a_file_in_which_one_byte_changed(store: Path, file: str) -> None:
    assert open_cache(store).verify() == []
    content = bytearray((store / file).read_bytes())
    content[len(content) // 3] ^= 4
    (store / file).write_bytes(content)
    cache = open_cache(store)  # sizes are as they were
    assert cache.verify() == [file]
    (store / file).unlink()
    assert cache.verify() == [file]


def test_reading_a_chunk_in_which_one_byte_changed_is_refused(store: Path) -> None:
    for file in ("a/obsm/X_sest/c/1/0", "a/X/data/c/0"):
        content = bytearray((store / file).read_bytes())
        content[2] ^= 4
        (store / file).write_bytes(content)
    group = open_cache(store).groups["a"]
    np.testing.assert_array_equal(group.embeddings(0, 8), GROUPS[0].embeddings[:8])  # another shard
    for read in (group.embeddings, group.targets):
        with pytest.raises(StoreError, match=r"a/\S+ cannot be read .*`sest info --verify` names the file") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_byte_changed_in_metadata_is_refused_on_opening(store: Path) -> None:
    file = store / "a" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"n_cells": 19', b'"n_cells": 18'))
    assert "(first: a/zarr.json)" in refusal(store)
