"""cache/reader.py: a finished cache reads back exactly; an unfinished or damaged one is refused in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pandas as pd
import pytest
import zarr

from helpers.caches import ATTRIBUTES, GROUPS, PROJECTION, reseal
from sest.cache import CacheError, open_cache, schema
from sest.cache.storage import LocalStorage


def flip(file: Path, where: float) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 4
    file.write_bytes(content)


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


def test_names_of_some_cells_are_those_of_obs(finished: Path) -> None:
    for group in open_cache(finished).groups.values():
        every = np.arange(group.n_cells)
        for rows in (every, every[:0], every[-1:], every[1::3]):
            found = group.names(rows)
            assert found.dtype.kind == "U" and found.tolist() == group.obs.index[rows].tolist()


def test_names_are_read_a_chunk_at_a_time(finished: Path, tmp_path: Path) -> None:
    """Of names in several chunks, as a cache of many cells has them; a chunk of empty names alone has no file."""
    group = replace(next(iter(open_cache(finished).groups.values())), storage=LocalStorage(tmp_path))
    zarr.create_group(tmp_path / group.path)
    table = zarr.create_group(tmp_path / group.path / "obs", attributes={"_index": "_index"})
    names = np.array([f"cell {i}" * (i % 3 * (i < 20)) for i in range(35)], object)
    table.create_array("_index", shape=names.shape, chunks=(10,), dtype=str)[:] = names
    assert not (tmp_path / group.path / "obs/_index/c/2").exists()
    for rows in (np.array([0, 9, 10, 24]), np.arange(35), np.array([22]), np.array([], int)):
        assert group.names(rows).tolist() == names[rows].tolist()


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


@pytest.mark.parametrize("file", ["a/obsm/X_sest/c/1/0", "ds/b/X/data/c/0", "ds/b/X/indices/c/0"])
def test_verify_names_a_shard_in_which_one_byte_changed(path: Path, file: str) -> None:
    assert open_cache(path).verify() == []
    flip(path / file, 1 / 3)
    cache = open_cache(path)  # sizes are as they were
    assert cache.verify() == [file]
    (path / file).unlink()
    assert cache.verify() == [file]


@pytest.mark.parametrize(
    "file",
    [
        "a/obs/perturbation/codes/c/0",
        "a/obs/perturbation/categories/c/0",
        "a/obs/_index/c/0",
        "ds/b/var/_index/c/0",
        "ds/b/X/indptr/c/0",
        "projection/basis/c/0/0",
        "a/zarr.json",
        "zarr.json",
    ],
)
def test_a_bit_changed_in_any_file_but_shards_is_refused_on_opening(path: Path, file: str) -> None:
    for where in (0.1, 0.5, 0.99):
        flip(path / file, where)
        said = refusal(path)
        assert f"(first: {file})" in said or file == schema.ROOT  # of which other things are said too
        flip(path / file, where)
    open_cache(path)


@pytest.mark.parametrize("file", ["a/obsm/X_sest/c/1/0", "a/X/data/c/0", "a/X/indices/c/0"])
def test_a_bit_changed_in_a_shard_is_refused_when_it_is_read_in_a_line_that_names_the_file(
    path: Path, file: str
) -> None:
    for where in (0.02, 0.99):  # a chunk, and the index at the end
        flip(path / file, where)
        group = open_cache(path).groups["a"]
        np.testing.assert_array_equal(group.embeddings(0, 8), GROUPS[0].embeddings[:8])  # another shard
        with pytest.raises(CacheError, match=rf"is damaged: {file} cannot be read \(.*\)\. Delete that") as refused:
            group.embeddings() if "obsm" in file else group.targets()
        assert "\n" not in str(refused.value)
        flip(path / file, where)


def test_a_shard_deleted_after_opening_is_named(path: Path) -> None:
    group = open_cache(path).groups["a"]
    for file in ("a/obsm/X_sest/c/1/0", "a/X/data/c/0"):
        (path / file).unlink()
    with pytest.raises(CacheError, match=r"a/X/data/c/0 cannot be read \(it is not there any more\)"):
        group.targets()
    with pytest.raises(CacheError, match=r"a/obsm/X_sest/c/1/0 cannot be read"):
        group.embeddings()


# ---- caches whose hashes are right, and whose content is not


def forged(path: Path, array: str, values: np.ndarray) -> str:
    """What is said of a cache, sealed again, with other values in an array of its first group, when all is read."""
    zarr.open_array(path / "a" / array, mode="r+")[:] = values
    with pytest.raises(CacheError) as refused:
        open_cache(reseal(path)).groups["a"].to_anndata()
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"{path} is ") and "embed" in said
    return said


@pytest.mark.parametrize("kind", ["falls", "first", "last", "negative", "huge", "a long row"])
def test_row_starts_that_lead_elsewhere_are_refused(path: Path, kind: str) -> None:
    indptr = open_cache(path).groups["a"].indptr.copy()
    places: dict[str, tuple[Any, int]] = {
        "falls": (7, indptr[6] - 1),
        "first": (0, 1),
        "last": (-1, indptr[-1] + 100),
        "negative": (3, -5),
        "huge": (3, 2**62),
        "a long row": (slice(1, 8), indptr[8]),
    }
    place, value = places[kind]
    indptr[place] = value
    assert "a/X/indptr " in forged(path, "X/indptr", indptr)


@pytest.mark.parametrize("value", [-1, 11, 2**31 - 1, "twice", "out of order"])
def test_gene_numbers_that_are_not_there_twice_or_out_of_order_are_refused(path: Path, value: int | str) -> None:
    indices = GROUPS[0].matrix.indices.copy()
    first = int(GROUPS[0].matrix.indptr[2])
    if value == "out of order":
        indices[[first, first + 1]] = indices[[first + 1, first]]
    else:
        indices[first] = indices[first + 1] if value == "twice" else value
    assert "a/X/indices has genes out of order, twice, or that are not there" in forged(path, "X/indices", indices)


def test_counts_below_zero_and_values_that_are_not_finite_are_refused(path: Path) -> None:
    counts = GROUPS[0].matrix.data.copy()
    counts[5] = -1
    assert "a/X/data has values that are no counts" in forged(path, "X/data", counts)
    values = zarr.open_array(path / "ds/b/X/data", mode="r+")
    for value in (np.nan, np.inf, -np.inf):
        values[3] = value
        with pytest.raises(CacheError, match="ds/b/X/data has values that are no log1p"):
            open_cache(reseal(path)).groups["ds/b"].targets()


def test_codes_of_labels_that_are_not_there_are_refused(path: Path) -> None:
    codes = np.array(zarr.open_array(path / "a/obs/perturbation/codes", mode="r")[:])
    for value in (3, 127, -2):
        codes[4] = value
        said = forged(path, "obs/perturbation/codes", codes)
        assert "a/obs cannot be read (codes need to be" in said


def test_a_chunk_of_names_that_says_it_holds_billions_is_refused(path: Path) -> None:
    """A chunk of text begins with how many strings it has, for which room is made before they are read."""
    array = path / "a/obs/perturbation/categories"
    for n in (2**32 - 1, 2**31, 4):
        packed = numcodecs.Zstd().encode(n.to_bytes(4, "little") + bytes(8))
        (array / "c/0").write_bytes(packed)
        with pytest.raises(
            CacheError, match=r"categories/c/0 holds more or fewer names than its array says"
        ) as refused:
            _ = open_cache(reseal(path)).groups["a"].read_labels()
        assert "\n" not in str(refused.value)


def test_a_chunk_that_the_journal_does_not_have_is_refused(path: Path) -> None:
    shutil.copy(path / "a/obs/perturbation/codes/c/0", path / "a/obs/perturbation/codes/c/1")
    assert "has a chunk that is not in its journal, a/obs/perturbation/codes/c/1. Delete that file" in refusal(path)
    (path / "a/obs/perturbation/codes/c/1").unlink()
    zarr.open_group(path / "a/obsm", mode="r+").create_array("X_umap", data=np.zeros((19, 2)))  # the user's own
    open_cache(path)


def test_metadata_of_an_array_with_another_key_is_one_line(path: Path) -> None:
    """Found by `make fuzz`: Zarr itself says what is wrong, when the array is opened."""
    file = path / "a/X/data/zarr.json"
    file.write_text(file.read_text().replace('"separator"', '"separqtor"'))
    with pytest.raises(CacheError, match=r"a/X/data cannot be read \(.*separqtor") as refused:
        _ = open_cache(reseal(path)).groups["a"].target_dtype
    assert "\n" not in str(refused.value)
