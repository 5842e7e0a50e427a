"""cache/writer.py: what is promised is on the disk, what is not is written again, foreign files are left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import zarr
from small import ATTRIBUTES, GROUPS, PROJECTION, hashes, small_shards, write_store

from sest.cache import StoreError, StoreWriter, open_cache, schema


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)


def journal(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / schema.JOURNAL).read_text().splitlines()]


# --- what is written


def test_every_group_is_an_anndata_group_that_holds_exactly_what_was_given(finished: Path) -> None:
    for group in GROUPS:
        read = anndata.read_zarr(finished / group.path)
        assert read.X.dtype == group.x.dtype
        assert (group.x != read.X).nnz == 0 and group.x.nnz == read.X.nnz
        assert read.obsm[schema.EMBEDDING].dtype == np.float16
        np.testing.assert_array_equal(read.obsm[schema.EMBEDDING], group.embeddings)
        assert read.obs.equals(group.obs)
        assert list(read.var_names) == list(group.var.index)
    assert all(len(g.plan.embedding_shards()) > 1 and len(g.plan.target_shards()) > 1 for g in GROUPS)


def test_the_journal_names_every_file_with_its_size_and_sha256_and_nothing_else(finished: Path) -> None:
    entries = {line["file"]: line for line in journal(finished)}
    assert list(entries) == sorted(entries) and len(entries) == len(journal(finished))
    assert {name: entry["sha256"] for name, entry in entries.items()} == {
        name: sha256 for name, sha256 in hashes(finished).items() if name not in (schema.JOURNAL, schema.COMPLETE)
    }
    assert all(entry["size"] == (finished / name).stat().st_size for name, entry in entries.items())
    assert json.loads((finished / schema.COMPLETE).read_text()) == {
        "files": len(entries),
        "journal_sha256": schema.sha256_file(finished / schema.JOURNAL),
    }
    assert sorted(p.name for p in finished.iterdir()) == sorted(
        [schema.LOCK, schema.JOURNAL, schema.COMPLETE, schema.PROJECTION, "zarr.json", "a", "ds"]
    )


def test_embeddings_are_uncompressed_chunks_with_a_checksum_each_and_nan_where_nothing_was_written(
    finished: Path,
) -> None:
    array = zarr.open_array(finished / "a" / "obsm" / schema.EMBEDDING)
    assert array.chunks == (4, 3) and array.shards == (8, 3) and np.isnan(array.fill_value)
    codecs = array.metadata.to_dict()["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in codecs] == ["bytes", "crc32c"]
    # a shard: 2 chunks of 4 x 3 float16 and 4 bytes of crc32c, an index of 2 x 16 bytes and 4 of crc32c
    size = (finished / "a" / "obsm" / schema.EMBEDDING / "c" / "0" / "0").stat().st_size
    assert size == 2 * (4 * 3 * 2 + 4) + 2 * 16 + 4


def test_a_file_is_journalled_only_after_it_and_its_folders_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = (tmp_path / "store.zarr").resolve()
    fsync, synced, order = os.fsync, set[Path](), list[Path]()
    promised: list[str] = []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(schema.PARTIAL)))
        if order[-1] == store / schema.JOURNAL:
            for line in journal(store)[len(promised) :]:
                promised.append(line["file"])
                file = store / line["file"]
                folders = {folder for folder in file.parents if folder.is_relative_to(store)}
                assert {file, *folders} <= synced, file
            synced.clear()
        synced.add(order[-1])

    monkeypatch.setattr(os, "fsync", noted)
    write_store(store)
    assert {*promised, "zarr.json"} == {line["file"] for line in journal(store)}
    assert order[-4:] == [store / schema.JOURNAL, store, store / schema.COMPLETE, store]


# --- going on


def test_writing_a_finished_store_again_changes_nothing(store: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.name != schema.LOCK and file.is_file()}
    assert write_store(store) == []
    assert {f: f.stat().st_mtime_ns for f in store.rglob("*") if f.name != schema.LOCK and f.is_file()} == before


def test_a_shard_that_is_there_but_not_in_the_journal_is_written_again(store: Path, finished: Path) -> None:
    (store / schema.COMPLETE).unlink()
    shard = "a/obsm/X_sest/c/1/0"
    lines = [json.dumps(line) for line in journal(store) if line["file"] != shard]
    (store / schema.JOURNAL).write_text("\n".join(lines) + "\n")
    for content in (b"", b"half a shard", (finished / shard).read_bytes()):
        (store / shard).write_bytes(content)
        copy = Path(shutil.copytree(store, store.with_name(f"copy{len(content)}")))
        assert write_store(copy) == ["a embeddings 1"]
        assert hashes(copy) == hashes(finished)


@pytest.mark.parametrize("torn", [b'{"file": "a/obsm/X_se', b"\x00" * 40, b'{"drop": "a/zarr.json"}'])
def test_a_torn_last_line_of_the_journal_is_cut_off(store: Path, finished: Path, torn: bytes) -> None:
    (store / schema.COMPLETE).unlink()
    n_lines = len(journal(store))
    with (store / schema.JOURNAL).open("ab") as file:
        file.write(torn)
    assert write_store(store) == []
    assert hashes(store) == hashes(finished)
    assert len(journal(store)) == n_lines
    open_cache(store)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("a/obsm/X_sest/c/1/0", ["a embeddings 1"]),
        ("ds/b/X/data/c/0", ["ds/b targets 0"]),
        ("a/X/indices/c/1", ["a targets 1"]),
        ("ds/b/obs/perturbation/codes/c/0", []),  # made again with its group, whose shards stay
        ("a/X/indptr/c/0", []),
        ("a/obsm/X_sest/zarr.json", []),
        ("ds/zarr.json", []),
    ],
)
def test_damage_is_repaired_and_only_the_damaged_is_written_again(
    store: Path, finished: Path, file: str, written: list[str], damage: str
) -> None:
    if damage == "missing":
        (store / file).unlink()
    else:
        content = (store / file).read_bytes()
        (store / file).write_bytes(b"" if damage == "empty" else content[:-7])
    if written or damage == "missing":  # repairs of metadata take a second: once is enough
        assert write_store(store) == written
        assert hashes(store) == hashes(finished)
        assert open_cache(store).verify() == []
    else:
        with StoreWriter(store, ATTRIBUTES) as writer:
            assert not writer.complete


def test_a_byte_changed_in_metadata_is_seen(store: Path, finished: Path) -> None:
    file = store / "ds" / "b" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"n_cells": 13', b'"n_cells": 12'))
    assert write_store(store) == []
    assert hashes(store) == hashes(finished)


def test_a_damaged_projection_is_written_again_with_all_embeddings_it_made(store: Path, finished: Path) -> None:
    (store / schema.PROJECTION / "basis" / "c" / "0" / "0").unlink()
    shards = [f"{g.path} embeddings {i}" for g in GROUPS for i in range(len(g.plan.embedding_shards()))]
    assert write_store(store) == ["projection", *shards]
    assert hashes(store) == hashes(finished)
    np.testing.assert_equal(open_cache(store).projection, PROJECTION)


def test_a_changed_journal_has_every_byte_of_the_store_checked(store: Path, finished: Path) -> None:
    for shard in ("a/obsm/X_sest/c/0/0", "ds/b/X/data/c/1"):
        content = bytearray((store / shard).read_bytes())
        content[3] ^= 1
        (store / shard).write_bytes(content)
    lost = "ds/b/obsm/X_sest/c/1/0"
    lines = [json.dumps(line) for line in journal(store) if line["file"] != lost]
    (store / schema.JOURNAL).write_text("\n".join(lines) + "\n")
    assert write_store(store) == ["ds/b targets 1", "a embeddings 0", "ds/b embeddings 1"]
    assert hashes(store) == hashes(finished)
    open_cache(store)


def test_a_check_of_every_byte_that_is_killed_is_made_again(
    store: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = store / "a" / "obsm" / "X_sest" / "c" / "0" / "0"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (store / schema.COMPLETE).write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(StoreWriter, "_drop", lambda self, names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_store(store)
    assert write_store(store) == ["a embeddings 0"]
    assert hashes(store) == hashes(finished)


def test_a_store_without_its_journal_is_written_anew(store: Path, finished: Path) -> None:
    (store / schema.JOURNAL).unlink()
    assert len(write_store(store)) == 1 + sum(
        len(g.plan.embedding_shards()) + len(g.plan.target_shards()) for g in GROUPS
    )
    assert hashes(store) == hashes(finished)


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"file": "a/zarr.json"}', b"\xff\xfe"])
def test_a_journal_with_a_foreign_whole_line_is_refused(store: Path, line: bytes) -> None:
    with (store / schema.JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(StoreError, match=r"journal.jsonl is damaged .* Delete the store") as refused:
        write_store(store)
    assert "\n" not in str(refused.value)


def test_a_writer_killed_just_before_complete_finishes_when_called_again(
    store: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / schema.COMPLETE).unlink()
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == schema.COMPLETE:
            raise InterruptedError
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(InterruptedError):
        write_store(store)
    monkeypatch.undo()
    assert (store / f"{schema.COMPLETE}.partial").exists()
    with pytest.raises(StoreError, match="unfinished"):
        open_cache(store)
    small_shards(monkeypatch)
    assert write_store(store) == []
    assert hashes(store) == hashes(finished) and open_cache(store).verify() == []


def test_strays_of_a_killed_writer_are_swept_away(store: Path) -> None:
    (store / schema.COMPLETE).unlink()
    (store / "a" / "X" / "zarr.0123abcd.partial").write_text("{")
    with StoreWriter(store, ATTRIBUTES) as writer:
        writer.spool_rows("a/0", 0, np.zeros((2, 3), np.float32))
    write_store(store)
    assert not list(store.rglob("*.partial")) and not (store / schema.SPOOL).exists()


# --- the spool


def test_spooled_rows_come_back_in_order_until_one_cannot_be_read(tmp_path: Path) -> None:
    blocks = {0: np.ones((2, 3), np.float32), 2: np.full((1, 3), 2, np.float32), 1000: np.zeros((4, 3), np.float32)}
    with StoreWriter(tmp_path / "store.zarr", ATTRIBUTES) as writer:
        assert list(writer.spooled_rows("a/0")) == []
        for start in (1000, 0, 2):
            writer.spool_rows("a/0", start, blocks[start])
        writer.spool_rows("a/1", 0, blocks[0])
        found = dict(writer.spooled_rows("a/0"))
        assert list(found) == [0, 2, 1000]
        assert all(np.array_equal(found[start], blocks[start]) for start in blocks)
        damaged = tmp_path / "store.zarr" / schema.SPOOL / "a" / "0" / "000000000002.npy"
        for content in (b"", b"\x93NUMPY", damaged.read_bytes()[:-1]):
            damaged.write_bytes(content)
            assert list(dict(writer.spooled_rows("a/0"))) == [0]
        writer.drop_spool("a/0")
        assert list(writer.spooled_rows("a/0")) == []
        assert list(dict(writer.spooled_rows("a/1"))) == [0]


# --- refusals


def test_other_attributes_are_refused_with_every_difference_named_by_its_path(store: Path) -> None:
    before = hashes(store)
    other = {**ATTRIBUTES, "dim": 4, "inputs": {**ATTRIBUTES["inputs"], "a": {"sha256": "other", "scale": "counts"}}}
    with pytest.raises(StoreError) as refused:
        write_store(store, other)
    assert str(refused.value) == (
        f'{store} was made differently (dim: 3 there, 4 asked; inputs.a.sha256: "of a" there, "other" asked). '
        "Choose another --cache path or delete the store."
    )
    many = {**ATTRIBUTES, **{f"key{i}": "x" * 100 for i in range(9)}}
    with pytest.raises(StoreError, match=r'key0: null there, "xxx.*\.\.\. asked; .*; and 3 more\)') as refused:
        write_store(store, many)
    assert len(str(refused.value)) < 1000
    assert hashes(store) == before and write_store(store) == []


def test_other_peoples_files_are_refused_and_left_untouched(tmp_path: Path) -> None:
    folder, file, other_zarr, damaged = (tmp_path / name for name in ("folder", "file", "other.zarr", "damaged.zarr"))
    folder.mkdir()
    (folder / "thesis.tex").write_text("text")
    file.write_text("text")
    zarr.create_group(other_zarr, attributes={"mine": 1})
    damaged.mkdir()
    (damaged / "zarr.json").write_text("{")
    before = hashes(tmp_path)
    for path, message in (
        (folder, "exists and is not a sest store. Choose another --cache path"),
        (file, "is a file, not a store. Choose another"),
        (other_zarr, "is a Zarr store that sest did not write. Choose another"),
        (damaged, "zarr.json cannot be read .* If sest made it, delete it"),
        (file / "below", "Cannot write to .*/file/below: Not a directory. Choose another"),
        (Path("nfs4://bucket/store.zarr"), "nfs4://bucket/store.zarr cannot be used as a store: Protocol not known"),
    ):
        with pytest.raises(StoreError, match=message) as refused:
            write_store(path)
        assert "\n" not in str(refused.value)
    assert hashes(tmp_path) == before and not list(tmp_path.rglob(schema.LOCK))


def test_an_empty_folder_and_the_beginning_of_a_store_are_used(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "store.zarr"
    path.mkdir()
    (path / schema.LOCK).write_text("123")
    (path / "zarr.0123abcd.partial").write_text("{")  # killed while writing the root group
    write_store(path)
    assert hashes(path) == hashes(finished)


def test_a_second_process_is_refused_with_the_first_ones_pid_and_may_write_after_it(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    path.mkdir()
    hold = (
        "import fcntl, os, sys; lock = open(sys.argv[1], 'a+'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(str(os.getpid())); lock.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(path / schema.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match=f"being written by process {other.pid}. Wait for it or stop it"):
            write_store(path)
        assert list(path.iterdir()) == [path / schema.LOCK]
        other.communicate()
    with StoreWriter(path, ATTRIBUTES):
        with pytest.raises(StoreError, match=f"being written by process {os.getpid()}"):
            write_store(path)
        assert (path / schema.LOCK).read_text() == str(os.getpid())
    write_store(path)


def test_a_writer_that_fails_lets_go_of_the_store(tmp_path: Path) -> None:
    def fail() -> None:
        with StoreWriter(tmp_path / "store.zarr", ATTRIBUTES):
            raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            fail()
    with pytest.raises(StoreError, match="made differently"):
        write_store(tmp_path / "store.zarr", {})
    write_store(tmp_path / "store.zarr")
