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

from helpers.caches import ATTRIBUTES, GROUPS, PROJECTION, continue_cache, hashes, small_shards
from sest.cache import CacheError, CacheWriter, open_cache, schema
from sest.cache.disk import PARTIAL, sha256_file


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)


def journal(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / schema.JOURNAL).read_text().splitlines()]


# --- what is written


def test_every_group_is_an_anndata_group_that_holds_exactly_what_was_given(finished: Path) -> None:
    for group in GROUPS:
        read = anndata.read_zarr(finished / group.path)
        assert read.X.dtype == group.matrix.dtype
        assert (group.matrix != read.X).nnz == 0 and group.matrix.nnz == read.X.nnz
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
        "journal_sha256": sha256_file(finished / schema.JOURNAL),
    }
    assert sorted(p.name for p in finished.iterdir()) == sorted(
        [schema.JOURNAL, schema.COMPLETE, schema.PROJECTION, "zarr.json", "a", "ds"]
    )


def test_a_file_is_journalled_only_after_it_and_its_folders_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (tmp_path / "cache.zarr").resolve()
    fsync, synced, order = os.fsync, set[Path](), list[Path]()
    promised: list[str] = []

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(PARTIAL)))
        if order[-1] == path / schema.JOURNAL:
            for line in journal(path)[len(promised) :]:
                promised.append(line["file"])
                file = path / line["file"]
                folders = {folder for folder in file.parents if folder.is_relative_to(path)}
                assert {file, *folders} <= synced, file
            synced.clear()
        synced.add(order[-1])

    monkeypatch.setattr(os, "fsync", noted)
    continue_cache(path)
    assert {*promised, "zarr.json"} == {line["file"] for line in journal(path)}
    assert order[-5:] == [path / schema.JOURNAL, path, path / schema.COMPLETE, path, path]  # the lock goes last


# --- going on


def test_writing_a_finished_cache_again_changes_nothing(path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.name != schema.LOCK and file.is_file()}
    assert continue_cache(path) == []
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.name != schema.LOCK and f.is_file()} == before


def test_a_shard_that_is_there_but_not_in_the_journal_is_written_again(path: Path, finished: Path) -> None:
    (path / schema.COMPLETE).unlink()
    shard = "a/obsm/X_sest/c/1/0"
    lines = [json.dumps(line) for line in journal(path) if line["file"] != shard]
    (path / schema.JOURNAL).write_text("\n".join(lines) + "\n")
    for content in (b"", b"half a shard", (finished / shard).read_bytes()):
        (path / shard).write_bytes(content)
        copy = Path(shutil.copytree(path, path.with_name(f"copy{len(content)}")))
        assert continue_cache(copy) == ["a embeddings 1"]
        assert hashes(copy) == hashes(finished)


@pytest.mark.parametrize("torn", [b'{"file": "a/obsm/X_se', b"\x00" * 40, b'{"drop": "a/zarr.json"}'])
def test_a_torn_last_line_of_the_journal_is_cut_off(path: Path, finished: Path, torn: bytes) -> None:
    (path / schema.COMPLETE).unlink()
    n_lines = len(journal(path))
    with (path / schema.JOURNAL).open("ab") as file:
        file.write(torn)
    assert continue_cache(path) == []
    assert hashes(path) == hashes(finished)
    assert len(journal(path)) == n_lines
    open_cache(path)


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
    path: Path, finished: Path, file: str, written: list[str], damage: str
) -> None:
    if damage == "missing":
        (path / file).unlink()
    else:
        content = (path / file).read_bytes()
        (path / file).write_bytes(b"" if damage == "empty" else content[:-7])
    if written or damage == "missing":  # repairs of metadata take a second: once is enough
        assert continue_cache(path) == written
        assert hashes(path) == hashes(finished)
        assert open_cache(path).verify() == []
    else:
        with CacheWriter(path, ATTRIBUTES) as writer:
            assert not writer.complete


def test_a_byte_changed_in_metadata_is_seen(path: Path, finished: Path) -> None:
    file = path / "ds" / "b" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"n_cells": 13', b'"n_cells": 12'))
    assert continue_cache(path) == []
    assert hashes(path) == hashes(finished)


def test_a_damaged_projection_is_written_again_with_all_embeddings_it_made(path: Path, finished: Path) -> None:
    (path / schema.PROJECTION / "basis" / "c" / "0" / "0").unlink()
    shards = [f"{g.path} embeddings {i}" for g in GROUPS for i in range(len(g.plan.embedding_shards()))]
    assert continue_cache(path) == ["projection", *shards]
    assert hashes(path) == hashes(finished)
    np.testing.assert_equal(open_cache(path).projection, PROJECTION)


def test_a_changed_journal_has_every_byte_of_the_cache_checked(path: Path, finished: Path) -> None:
    for shard in ("a/obsm/X_sest/c/0/0", "ds/b/X/data/c/1"):
        content = bytearray((path / shard).read_bytes())
        content[3] ^= 1
        (path / shard).write_bytes(content)
    lost = "ds/b/obsm/X_sest/c/1/0"
    lines = [json.dumps(line) for line in journal(path) if line["file"] != lost]
    (path / schema.JOURNAL).write_text("\n".join(lines) + "\n")
    assert continue_cache(path) == ["ds/b targets 1", "a embeddings 0", "ds/b embeddings 1"]
    assert hashes(path) == hashes(finished)
    open_cache(path)


def test_a_check_of_every_byte_that_is_killed_is_made_again(
    path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = path / "a" / "obsm" / "X_sest" / "c" / "0" / "0"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    (path / schema.COMPLETE).write_text("{}")
    with monkeypatch.context() as killed:
        killed.setattr(CacheWriter, "_drop", lambda self, names: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            continue_cache(path)
    assert continue_cache(path) == ["a embeddings 0"]
    assert hashes(path) == hashes(finished)


def test_a_cache_without_its_journal_is_written_anew(path: Path, finished: Path) -> None:
    (path / schema.JOURNAL).unlink()
    assert len(continue_cache(path)) == 1 + sum(
        len(g.plan.embedding_shards()) + len(g.plan.target_shards()) for g in GROUPS
    )
    assert hashes(path) == hashes(finished)


@pytest.mark.parametrize("line", [b"not json", b"[1]", b'{"file": "a/zarr.json"}', b"\xff\xfe"])
def test_a_journal_with_a_foreign_whole_line_is_refused(path: Path, line: bytes) -> None:
    with (path / schema.JOURNAL).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(CacheError, match=r"journal.jsonl is damaged .* Delete the cache") as refused:
        continue_cache(path)
    assert "\n" not in str(refused.value)


def test_a_writer_killed_just_before_complete_finishes_when_called_again(
    path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path / schema.COMPLETE).unlink()
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == schema.COMPLETE:
            raise KeyboardInterrupt  # an error of the disk leaves nothing
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        continue_cache(path)
    monkeypatch.undo()
    assert (path / f"{schema.COMPLETE}.partial").exists()
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(path)
    small_shards(monkeypatch)
    assert continue_cache(path) == []
    assert hashes(path) == hashes(finished) and open_cache(path).verify() == []


def test_strays_of_a_killed_writer_are_swept_away(path: Path) -> None:
    (path / schema.COMPLETE).unlink()
    (path / "a" / "X" / "zarr.0123abcd.partial").write_text("{")
    with CacheWriter(path, ATTRIBUTES) as writer:
        writer.spool_rows("a/0", 0, np.zeros((2, 3), np.float32))
    continue_cache(path)
    assert not list(path.rglob("*.partial")) and not (path / schema.SPOOL).exists()


# --- the spool


def test_spooled_rows_come_back_in_order_until_one_cannot_be_read(tmp_path: Path) -> None:
    blocks = {0: np.ones((2, 3), np.float32), 2: np.full((1, 3), 2, np.float32), 1000: np.zeros((4, 3), np.float32)}
    with CacheWriter(tmp_path / "cache.zarr", ATTRIBUTES) as writer:
        assert list(writer.spooled_rows("a/0")) == []
        for start in (1000, 0, 2):
            writer.spool_rows("a/0", start, blocks[start])
        writer.spool_rows("a/1", 0, blocks[0])
        found = dict(writer.spooled_rows("a/0"))
        assert list(found) == [0, 2, 1000]
        assert all(np.array_equal(found[start], blocks[start]) for start in blocks)
        damaged = tmp_path / "cache.zarr" / schema.SPOOL / "a" / "0" / "000000000002.npy"
        for content in (b"", b"\x93NUMPY", damaged.read_bytes()[:-1]):
            damaged.write_bytes(content)
            assert list(dict(writer.spooled_rows("a/0"))) == [0]
        writer.drop_spool("a/0")
        assert list(writer.spooled_rows("a/0")) == []
        assert list(dict(writer.spooled_rows("a/1"))) == [0]


# --- refusals


def test_other_attributes_are_refused_with_every_difference_named_by_its_path(path: Path) -> None:
    before = hashes(path)
    other = {**ATTRIBUTES, "dim": 4, "inputs": {**ATTRIBUTES["inputs"], "a": {"sha256": "other", "scale": "counts"}}}
    with pytest.raises(CacheError) as refused:
        continue_cache(path, other)
    assert str(refused.value) == (
        f"{path} was made differently (dim: 3 there, 4 asked; a: what the file holds). "
        "Choose another --cache path or delete the cache."
    )
    many = {**ATTRIBUTES, **{f"key{i}": "x" * 100 for i in range(9)}}
    with pytest.raises(CacheError, match=r'key0: null there, "xxx.*\.\.\. asked; .*; and 3 more\)') as refused:
        continue_cache(path, many)
    assert len(str(refused.value)) < 1000
    assert hashes(path) == before and continue_cache(path) == []


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
        (folder, "exists and is not a sest cache. Choose another --cache path"),
        (file, "is a file, not a cache. Choose another"),
        (other_zarr, "is a Zarr store that sest did not write. Choose another"),
        (damaged, "zarr.json cannot be read .* If sest made it, delete it"),
        (file / "below", "Cannot write to .*/file/below: Not a directory. Choose another"),
        (Path("nfs4://bucket/cache.zarr"), "nfs4://bucket/cache.zarr cannot be used as a cache: Protocol not known"),
    ):
        with pytest.raises(CacheError, match=message) as refused:
            continue_cache(path)
        assert "\n" not in str(refused.value)
    assert hashes(tmp_path) == before and not list(tmp_path.rglob(schema.LOCK))


def test_an_empty_folder_and_the_beginning_of_a_cache_are_used(tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "cache.zarr"
    path.mkdir()
    (path / schema.LOCK).write_text("123")
    (path / "zarr.0123abcd.partial").write_text("{")  # killed while writing the root group
    continue_cache(path)
    assert hashes(path) == hashes(finished)


def test_a_second_process_is_refused_with_the_first_ones_pid_and_may_write_after_it(tmp_path: Path) -> None:
    path = tmp_path / "cache.zarr"
    path.mkdir()
    hold = (
        "import fcntl, os, sys; lock = open(sys.argv[1], 'a+'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(str(os.getpid())); lock.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(path / schema.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(CacheError, match=f"being written by process {other.pid}. Wait for it or stop it"):
            continue_cache(path)
        assert list(path.iterdir()) == [path / schema.LOCK]
        other.communicate()
    with CacheWriter(path, ATTRIBUTES):
        with pytest.raises(CacheError, match=f"being written by process {os.getpid()}"):
            continue_cache(path)
        assert (path / schema.LOCK).read_text() == str(os.getpid())
    continue_cache(path)


def test_a_writer_that_fails_lets_go_of_the_cache(tmp_path: Path) -> None:
    def fail() -> None:
        with CacheWriter(tmp_path / "cache.zarr", ATTRIBUTES):
            raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            fail()
    with pytest.raises(CacheError, match="made differently"):
        continue_cache(tmp_path / "cache.zarr", {})
    continue_cache(tmp_path / "cache.zarr")


@pytest.mark.parametrize("how", ["deleted", "moved", "another in its place"])
def test_a_cache_that_goes_while_it_is_written_is_not_begun_again(tmp_path: Path, how: str) -> None:
    path, plan = tmp_path / "cache.zarr", GROUPS[0].plan

    def write() -> None:
        with CacheWriter(path, ATTRIBUTES) as writer:
            writer.add_group(plan, GROUPS[0].obs, GROUPS[0].var)
            path.rename(tmp_path / "elsewhere.zarr")
            if how == "deleted":
                shutil.rmtree(tmp_path / "elsewhere.zarr")
            elif how == "another in its place":
                path.mkdir()
                (path / schema.LOCK).write_text("")
            attempts = (
                lambda: writer.spool_rows("a/0", 0, np.zeros((2, 3))),
                lambda: writer.write_embedding_shard(plan, 0, GROUPS[0].embeddings[:8]),
                lambda: writer.write_projection(PROJECTION, {}),
                writer.finish,
            )
            for attempt in attempts[:-1]:
                with pytest.raises((CacheError, FileNotFoundError)):
                    attempt()
            attempts[-1]()

    with pytest.raises(CacheError, match=r"was deleted or moved while it was written\. Nothing more"):
        write()
    there = [file.name for file in path.rglob("*")] if path.exists() else None
    assert there == ([schema.LOCK] if how == "another in its place" else None)
