"""cache/reader.py: a finished cache reads back exactly; an unfinished or damaged one is refused in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr

from helpers.caches import ATTRIBUTES, GROUPS, PROJECTION
from sest.cache import CacheError, open_cache, schema


def refusal(path: Path) -> str:
    """What opening says; one line."""
    with pytest.raises(CacheError) as refused:
        open_cache(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_groups_read_back_what_was_written(finished: Path) -> None:
    cache = open_cache(finished)
    assert cache.attributes == ATTRIBUTES
    assert (cache.dim, cache.n_cells, list(cache.groups)) == (3, 32, ["a", "ds/b"])
    assert cache.size == sum(e["size"] for e in cache._entries.values()) > 0
    for made in GROUPS:
        group = cache.groups[made.path]
        assert (group.n_cells, group.n_genes, group.dataset) == (*made.matrix.shape, made.path.split("/")[0])
        assert group.obs.equals(made.obs)
        assert group.genes == list(made.var.index)
        np.testing.assert_array_equal(group.indptr, made.matrix.indptr)
        for start, stop in ((0, None), (0, 1), (7, 9), (5, 12), (4, 4), (12, 13)):  # shards are of 8 cells
            np.testing.assert_array_equal(group.embeddings(start, stop), made.embeddings[start:stop])
            rows = group.targets(start, stop)
            assert rows.dtype == made.matrix.dtype and rows.shape == made.matrix[start:stop].shape
            np.testing.assert_array_equal(rows.toarray(), made.matrix[start:stop].toarray())


def test_labels_are_the_columns_of_obs_without_the_names_of_cells(finished: Path) -> None:
    for group in open_cache(finished).groups.values():
        pd.testing.assert_frame_equal(group.read_labels(), group.obs.reset_index(drop=True), check_index_type=False)


def test_the_hash_of_a_cache_is_that_of_how_it_was_made_wherever_it_lies(finished: Path, path: Path) -> None:
    text = (
        '{"dim": 3, "dtype": "float16", "groups": ["a", "ds/b"], "inputs": {'
        '"a": {"scale": "counts", "sha256": "of a"}, "ds/b": {"scale": "counts", "sha256": "of ds/b"}}, '
        '"schema_version": 1, "sest_version": "0.0"}'
    )
    assert open_cache(path).sha256 == open_cache(finished).sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_the_projection_and_its_attributes_are_read(finished: Path) -> None:
    cache = open_cache(str(finished))
    np.testing.assert_equal(cache.projection, PROJECTION)
    assert cache.projection_attributes == {"genes": ["G1"]}


def test_reader_refuses_a_cache_without_complete(path: Path) -> None:
    (path / schema.COMPLETE).unlink()
    assert refusal(path) == (
        f"{path} is unfinished (no COMPLETE file). Run the same `sest embed` command to finish it."
    )


def test_what_is_no_cache_is_refused(tmp_path: Path, path: Path) -> None:
    assert "missing.zarr does not exist. Make one with `sest embed" in refusal(tmp_path / "missing.zarr")
    assert "is not a sest cache (no zarr.json in it)" in refusal(tmp_path)
    zarr.create_group(tmp_path / "other.zarr")
    assert "is a Zarr store, but not one of sest's" in refusal(tmp_path / "other.zarr")
    for content in ("{", "[]", "null", "{}", '{"attributes": 3}', "\udcff"):
        (path / "zarr.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        assert "zarr.json cannot be read" in (message := refusal(path)) or "not one of sest's" in message


def test_another_schema_version_is_refused_with_both_versions(path: Path) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["sest"] |= {"schema_version": 99, "sest_version": "7.1"}
    (path / "zarr.json").write_text(json.dumps(root))
    assert "schema version 99; this sest reads version 1. Embed again, or use the sest version" in refusal(path)
    assert "(7.1)" in refusal(path)


@pytest.mark.parametrize(
    "file", ["a/obsm/X_sest/c/0/0", "ds/b/X/indices/c/0", "a/obs/_index/c/0", "projection/mean/c/0", "a/zarr.json"]
)
def test_a_missing_truncated_or_empty_file_is_refused(path: Path, file: str) -> None:
    content, n_files = (path / file).read_bytes(), len(open_cache(path)._entries)
    for damaged in (None, content[:-1], b"", content + b"\n"):
        (path / file).unlink()
        if damaged is not None:
            (path / file).write_bytes(damaged)
        assert refusal(path) == (
            f"{path} is damaged: 1 of {n_files} files are missing or are not as they were written "
            f"(first: {file}). Run the same `sest embed` command to write them again."
        )
        (path / file).write_bytes(content)
    open_cache(path)


@pytest.mark.parametrize("change", ["a line more", "a line less", "another sha256", "no journal", "no promise"])
def test_a_changed_journal_is_refused(path: Path, change: str) -> None:
    file = path / schema.JOURNAL
    lines = file.read_text().splitlines(keepends=True)
    if change == "no journal":
        file.unlink()
    elif change == "no promise":
        (path / schema.COMPLETE).write_text("{}")
    else:
        changed = {
            "a line more": [*lines, lines[-1]],
            "a line less": lines[:-1],
            "another sha256": [lines[0].replace('"sha256": "', '"sha256": "0'), *lines[1:]],
        }
        file.write_text("".join(changed[change]))
    assert "is damaged: journal.jsonl is not the one COMPLETE was written for. Run the same" in refusal(path)


@pytest.mark.parametrize("file", ["a/obsm/X_sest/c/1/0", "ds/b/X/data/c/0", "a/obs/perturbation/codes/c/0"])
def test_verify_names_a_file_in_which_one_byte_changed(path: Path, file: str) -> None:
    assert open_cache(path).verify() == []
    content = bytearray((path / file).read_bytes())
    content[len(content) // 3] ^= 4
    (path / file).write_bytes(content)
    cache = open_cache(path)  # sizes are as they were
    assert cache.verify() == [file]
    (path / file).unlink()
    assert cache.verify() == [file]


def test_reading_a_chunk_in_which_one_byte_changed_is_refused(path: Path) -> None:
    for file in ("a/obsm/X_sest/c/1/0", "a/X/data/c/0"):
        content = bytearray((path / file).read_bytes())
        content[2] ^= 4
        (path / file).write_bytes(content)
    group = open_cache(path).groups["a"]
    np.testing.assert_array_equal(group.embeddings(0, 8), GROUPS[0].embeddings[:8])  # another shard
    for read in (group.embeddings, group.targets):
        with pytest.raises(CacheError, match=r"a/\S+ cannot be read .*`sest info --verify` names the file") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_byte_changed_in_metadata_is_refused_on_opening(path: Path) -> None:
    file = path / "a" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"n_cells": 19', b'"n_cells": 18'))
    assert "(first: a/zarr.json)" in refusal(path)
