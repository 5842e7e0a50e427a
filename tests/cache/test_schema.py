"""cache/schema.py: names that no group may have, shards of whole chunks, and metadata that sest never writes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.caches import GROUPS, reseal
from sest.cache import CacheError, CacheWriter, open_cache, schema
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


# ---- metadata that sest never writes, in a cache whose hashes are right


def said_of(path: Path, file: str, change: Callable[[Any], Any]) -> str:
    """What is said of a cache, sealed again, in which a file of metadata was changed."""
    about = json.loads((path / file).read_text())
    changed = change(about)
    (path / file).write_text(json.dumps(about if changed is None else changed))
    with pytest.raises(CacheError) as refused:
        open_cache(reseal(path))
    said = str(refused.value)
    assert "\n" not in said and len(said) < 600
    return said


def put(*keys: str | int, to: Any) -> Callable[[Any], None]:
    """A change: the value under some keys."""

    def change(about: Any) -> None:
        for key in keys[:-1]:
            about = about[key]
        about[keys[-1]] = to

    return change


def codec(name: str, **configuration: Any) -> list[dict[str, Any]]:
    return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": name, "configuration": configuration}]


CODES, INDPTR, X_SEST = "a/obs/perturbation/codes/zarr.json", "a/X/indptr/zarr.json", "a/obsm/X_sest/zarr.json"
INNER = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CODES, put("codecs", to=codec("numcodecs.pickle", protocol=5)), "it names the codecs bytes, numcodecs.pickle"),
        (CODES, put("codecs", to=codec("gzip", level=1)), "it names the codecs bytes, gzip"),
        (CODES, put("codecs", to=codec("transpose", order=[0])), "it names the codecs"),
        ("a/obs/_index/zarr.json", put("codecs", 0, "name", to="json2"), "it names the codecs json2"),
        (CODES, put("data_type", to="float64"), "its type is"),
        (CODES, put("data_type", to={"name": "null_terminated_bytes", "configuration": {}}), "its type is a dict"),
        ("a/X/data/zarr.json", put("data_type", to="int64"), "its type is"),
        (CODES, put("shape", to=[2**33]), r"the shape is \(8589934592,\)"),
        (INDPTR, put("shape", to=[2**33]), "the shape is"),
        (INDPTR, put("chunk_grid", "configuration", "chunk_shape", to=[2**33]), "a chunk"),
        (INDPTR, put("chunk_grid", "configuration", "chunk_shape", to=[0]), "a chunk"),
        (INDPTR, put("chunk_grid", "name", to="rectilinear"), "its chunks lie elsewhere"),
        (INDPTR, put("chunk_key_encoding", to={"name": "v2", "configuration": {"separator": "."}}), "lie elsewhere"),
        (INDPTR, put("fill_value", to={"a": 1}), "empty a dict"),
        (INDPTR, put("storage_transformers", to=[{"name": "x"}]), "other metadata than sest writes"),
        (INDPTR, put("zarr_format", to=2), "describes no array of Zarr version 3"),
        (INDPTR, put("shape", to="many"), "a shape is"),
        (INDPTR, put("shape", to=[-1]), "a shape is"),
        (INDPTR, put("shape", to=[True]), "a shape is"),
        (INDPTR, put("codecs", to=7), "is missing or of another type"),
        (X_SEST, put(*INNER, "chunk_shape", to=[3, 3]), r"shards are \(8, 3\), chunks in them \(3, 3\)"),
        (X_SEST, put(*INNER, "codecs", 1, "name", to="gzip"), "it names the codecs sharding_indexed, bytes, gzip"),
        (X_SEST, put(*INNER, "index_codecs", to=[{"name": "bytes"}]), "it names the codecs"),
        (X_SEST, put("shape", to=[19, 4]), r"the shape is \(19, 4\)"),
        ("a/X/data/zarr.json", put("shape", to=[2**33]), "shards of a/X/data are not in journal.jsonl"),
        ("projection/basis/zarr.json", put("shape", to=[2**20, 2**20]), r"projection/basis/zarr.json has the shape"),
        ("a/zarr.json", put("consolidated_metadata", to={"metadata": {}, "kind": "inline"}), "other metadata"),
        ("a/zarr.json", put("attributes", "sest", to=None), "does not say how the group was made"),
        ("a/zarr.json", put("attributes", "sest", "n_cells", to=2**33), "more than its files can hold"),
        ("a/zarr.json", put("attributes", "sest", "n_cells", to=-1), "has -1 for n_cells"),
        ("a/zarr.json", put("attributes", "sest", "n_cells", to="19"), 'has "19" for n_cells'),
        ("a/zarr.json", put("attributes", "sest", "n_cells", to=18), "the shape is"),
        ("a/zarr.json", put("attributes", "sest", "scale", to="cpm"), 'has "cpm" for scale'),
        ("a/zarr.json", put("attributes", "sest", "columns", to={"control": [1]}), "a column whose name is no text"),
        ("a/obs/zarr.json", put("attributes", "column-order", to=["../../secret"]), "describes no table"),
        (
            "a/obs/zarr.json",
            put("attributes", "column-order", to=["none"]),
            "journal.jsonl has no a/obs/none/zarr.json",
        ),
        ("a/obs/zarr.json", put("attributes", "_index", to=7), "describes no table"),
        ("a/obs/perturbation/zarr.json", put("attributes", "encoding-type", to="awkward-array"), "describes no labels"),
        ("zarr.json", put("attributes", "sest", "groups", to=["a", "../elsewhere"]), "names a group"),
        ("zarr.json", put("attributes", "sest", "groups", to=["a", "a"]), "has not one input for the group"),
        ("zarr.json", put("attributes", "sest", "groups", to=["a", "none"]), "has not one input for the group"),
        ("zarr.json", put("attributes", "sest", "groups", to=[["a"]]), "names a group a list"),
        ("zarr.json", put("attributes", "sest", "groups", to="a"), "for groups"),
        ("zarr.json", put("attributes", "sest", "dim", to=None), "has null for dim"),
        ("zarr.json", put("attributes", "sest", "dim", to=10**30), "for dim"),
        ("zarr.json", put("attributes", "sest", "targets", to="yes"), "for targets"),
        ("a/X/zarr.json", lambda about: [about], "describes no group of Zarr version 3"),
        ("a/X/zarr.json", lambda about: put("attributes", to=3)(about), "other metadata"),
    ],
)
def test_what_sest_never_writes_is_refused_in_one_line(
    path: Path, file: str, change: Callable[[Any], Any], message: str
) -> None:
    assert re.search(message, said_of(path, file, change))


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"7", b"[" * 200_000, b'{"shape": ' * 100_000, b"\xff\xfe"])
def test_metadata_that_is_no_json_is_refused(path: Path, content: bytes) -> None:
    (path / INDPTR).write_bytes(content)
    with pytest.raises(CacheError, match="is not a cache as sest writes it") as refused:
        open_cache(reseal(path))
    assert "\n" not in str(refused.value)


def test_a_shard_that_was_never_written_is_missed_and_not_read_as_zeros(path: Path) -> None:
    (path / "a/X/data/c/0").unlink()
    with pytest.raises(CacheError, match=r"1 shards of a/X/data are not in journal\.jsonl"):
        open_cache(reseal(path))


def test_billions_of_entries_that_no_file_holds_are_refused_at_once(path: Path) -> None:
    """2**33 cells in metadata that agrees with itself: labels and row starts without chunks would be zeros."""
    n = 2**33
    changes = {
        "a/zarr.json": put("attributes", "sest", "n_cells", to=n),
        CODES: put("shape", to=[n]),
        "a/obs/_index/zarr.json": put("shape", to=[n]),
        INDPTR: put("shape", to=[n + 1]),
        X_SEST: put("shape", to=[n, 3]),
    }
    for file, change in changes.items():
        about = json.loads((path / file).read_text())
        change(about)
        (path / file).write_text(json.dumps(about))
    started = time.monotonic()
    with pytest.raises(CacheError, match="more than its files can hold"):
        open_cache(reseal(path))
    assert time.monotonic() - started < 5


def test_a_zarr_2_group_is_refused_before_its_filter_could_unpickle(
    shared_cases: Path, path: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    script = [sys.executable, shared_cases / "faults/store-zarr2-pickle/make.py", path, tmp_path / "two.zarr", canary]
    subprocess.run(list(map(str, script)), check=True)
    with pytest.raises(CacheError, match="a line names no file of a cache"):
        open_cache(tmp_path / "two.zarr")
    reseal(tmp_path / "two.zarr")  # without its hidden files
    with pytest.raises(CacheError, match=r"journal\.jsonl has no a/zarr\.json"):
        open_cache(tmp_path / "two.zarr")
    assert not canary.exists()


KEYS = st.sampled_from("shape data_type chunk_grid codecs fill_value attributes zarr_format node_type name".split())
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), KEYS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def files(finished: Path) -> dict[str, bytes]:
    """Those of a finished cache, by name."""
    return {f.relative_to(finished).as_posix(): f.read_bytes() for f in finished.rglob("*") if f.is_file()}


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([CODES, INDPTR, X_SEST, "a/zarr.json", "a/obs/zarr.json", "projection/mean/zarr.json"]), KEYS, PLAIN
)
def test_whatever_metadata_says_it_is_taken_or_refused(
    files: dict[str, bytes], file: str, key: str, value: Any
) -> None:
    about = json.loads(files[file])
    about[key] = value
    changed = files | {file: json.dumps(about).encode()}
    attributes = json.loads(files[schema.ROOT])["attributes"]["sest"]
    with contextlib.suppress(ValueError):
        schema.check_metadata(attributes, {name: len(data) for name, data in changed.items()}, changed.__getitem__)
