"""The training targets: over the common genes, as whole numbers, in memory or in mapped files."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import sest.cache.derived
import sest.data.targets
from helpers.caches import GENES, small_screen
from helpers.datasets import Opened, open_three_files, opened
from helpers.notes import Notes
from sest.cache import Cache
from sest.cache.derived import Unfinished, derived_bytes
from sest.cache.storage import storage_at
from sest.cells.scale import differing_scales
from sest.data.control_values import ControlValues
from sest.data.labels import read_labels
from sest.data.targets import normalisations, read_targets, refuse_mixed_scales
from sest.errors import InputError
from sest.machine.memory import available_bytes
from sest.progress import reporting


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_three_files(tmp_path_factory.mktemp("three"))


def test_targets_are_the_genes_all_files_have_in_the_first_files_order(three_files: Opened) -> None:
    cache, groups = three_files
    notes = Notes()
    with reporting(notes):
        targets = read_targets(cache, 1e4)
    assert targets.genes == GENES[4:] and targets.scale == "mixed" and targets.target_sum == 10_000.0
    assert "Training on the 16 genes that all groups have (of up to 20)." in notes.notes
    expected = []
    for group in groups:
        place = [group.genes.index(name) for name in targets.genes]
        values = group.matrix.toarray().astype(np.float64)
        if group.scale == "counts":  # normalised by all counts of the cell, also those of genes that are left out
            values = np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1))
        expected.append(values[:, place])
    rows = np.random.default_rng(0).permutation(len(targets.factor))
    # float32 values of up to 9
    np.testing.assert_allclose(targets.log1p(rows).toarray(), np.concatenate(expected)[rows], rtol=1e-5, atol=1e-6)
    assert (targets.factor[-len(groups[2].obs) :] == 0).all()


def test_one_file_keeps_all_its_genes_and_its_integers(tmp_path: Path) -> None:
    group = small_screen("a")
    notes = Notes()
    with reporting(notes):
        targets = read_targets(opened(tmp_path, group), 1e4)
    assert targets.genes == group.genes and targets.scale == "counts" and not notes.notes
    assert targets.data.dtype == np.int16 and targets.indices.dtype == np.uint16 and targets.indptr.dtype == np.int64
    assert (targets.values(np.arange(group.matrix.shape[0])) != group.matrix).nnz == 0


def test_the_target_sum_is_a_number_or_the_median_of_the_count_files_cells(tmp_path: Path) -> None:
    empty = small_screen("a")
    values = empty.matrix.toarray()
    values[3:40] = 0  # empty cells count in no median and get no factor
    groups = [replace(empty, matrix=scipy.sparse.csr_matrix(values)), small_screen("b", scale="log1p", seed=1)]
    cache = opened(tmp_path, *groups)
    totals = values.sum(1)
    median = read_targets(cache, "median")
    assert median.target_sum == np.median(totals[totals > 0])
    assert np.median(totals) < median.target_sum and (median.factor[3:40] == 0).all()
    np.testing.assert_allclose(median.factor[: len(totals)] * totals, np.where(totals > 0, median.target_sum, 0))
    np.testing.assert_allclose(read_targets(cache, 1e3).factor[0], 1000 / totals[0])


@pytest.mark.parametrize("asked", ["many", 0.0, -1.0, float("inf"), float("nan")])
def test_an_unusable_target_sum_is_refused(three_files: Opened, asked: float | str) -> None:
    with pytest.raises(InputError, match=f"target-sum is {asked}; it takes a number above 0, or 'median'"):
        read_targets(three_files[0], asked)


def test_the_median_of_a_log1p_file_is_the_default(tmp_path: Path) -> None:
    targets = read_targets(opened(tmp_path, small_screen("a", scale="log1p")), "median")
    assert targets.scale == "log1p" and targets.target_sum == 10_000.0


@pytest.mark.parametrize("n_cells", [30, 500])
def test_the_normalisation_of_log1p_groups_is_found_in_the_cache(tmp_path: Path, n_cells: int) -> None:
    logged = small_screen("b", scale="log1p", n_controls=n_cells)
    found = normalisations(opened(tmp_path, small_screen("a"), logged))
    assert list(found) == ["b"] and found["b"].total == pytest.approx(1e4, rel=1e-4)


def test_groups_that_were_normalised_differently_are_refused_unless_that_is_asked_for(tmp_path: Path) -> None:
    """The log1p files are of 10,000 counts."""
    cache = opened(tmp_path / "one", small_screen("a"), small_screen("b", scale="log1p"))
    notes = Notes()
    with reporting(notes):
        refuse_mixed_scales(cache, 1e4, "refuse")
    assert notes.notes == ["b: log1p of counts normalised to 10,000; its values are targets as they are."]
    found = normalisations(cache)
    assert differing_scales(found, 1e4, ["a"]) is None and differing_scales(found, 1e6, ["a"]) is not None
    words = (
        r"a is counts, normalised to 1,000,000; b is .* to 10,000\. Pass --target-sum 10000, or normalise them alike"
    )
    with pytest.raises(InputError, match=words) as caught:
        refuse_mixed_scales(cache, 1e6, "refuse")
    assert "\n" not in str(caught.value)
    with reporting(notes := Notes()):
        refuse_mixed_scales(cache, 1e6, "allow")
    assert "trained on together, as asked: a is counts, normalised to 1,000,000" in notes.notes[-1]
    other = small_screen("c", scale="log1p")
    other.matrix.data[:] = np.log1p(100 * np.expm1(other.matrix.data))
    cache = opened(tmp_path / "two", small_screen("a"), small_screen("b", scale="log1p"), other)
    for total in (1e4, 1e6):  # no target sum agrees with both
        with pytest.raises(
            InputError, match=r"normalised differently: .*\. Normalise them alike.*--mixed-scales allow"
        ):
            refuse_mixed_scales(cache, total, "refuse")
    refuse_mixed_scales(opened(tmp_path / "three", other), 1e4, "refuse")  # alone it agrees with itself


def test_files_without_a_gene_in_common_are_refused(tmp_path: Path) -> None:
    other = small_screen("b", genes=[f"h{i}" for i in range(20)])
    with pytest.raises(InputError, match=r"no gene in common \(a, b\)"):
        read_targets(opened(tmp_path, small_screen("a"), other), 1e4)


def everything(cache: Cache, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All values, dense, and the factors."""
    targets = read_targets(cache, 1e4, **options)
    return targets.values(np.arange(len(targets.factor))).toarray(), targets.factor


@pytest.mark.parametrize("n_genes", [2**16, 2**16 + 1])
def test_gene_numbers_take_two_bytes_as_long_as_they_fit(tmp_path: Path, n_genes: int) -> None:
    group = small_screen("a", genes=[f"g{i}" for i in range(n_genes)], cell_types=("x",), sizes={"P": 9}, n_controls=3)
    targets = read_targets(opened(tmp_path, group), 1e4)
    assert targets.indices.dtype == (np.uint16 if n_genes == 2**16 else np.int32)
    assert (targets.values(np.arange(12)) != group.matrix).nnz == 0 and group.matrix.indices.max() == n_genes - 1


def test_reading_in_blocks_changes_nothing(three_files: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = three_files
    whole = everything(cache)
    monkeypatch.setattr("sest.data.targets.VALUES_PER_READ", 7)
    for one, other in zip(everything(cache), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def values_in(place: Path) -> dict[str, bytes]:
    """The files of the one set of values there, by name."""
    (folder,) = place.glob("values-*")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Many blocks, each made sure of."""
    patch.setattr(sest.data.targets, "VALUES_PER_READ", 40)
    patch.setattr(sest.cache.derived, "DURABLE", 1)


def test_values_on_disk_are_those_in_memory_and_are_written_once(three_files: Opened, tmp_path: Path) -> None:
    cache, _ = three_files
    scratch, notes = tmp_path / "scratch", Notes()
    with reporting(notes):
        on_disk = read_targets(cache, 1e4, where="disk", scratch=scratch)
    (folder,) = scratch.glob("values-*")
    assert on_disk.on_disk and on_disk.folder == folder and isinstance(on_disk.indptr, np.memmap)
    assert not read_targets(cache, 1e4).on_disk and read_targets(cache, 1e4).folder is None
    assert any(
        "take 0.0 GB, of" in text and f"are read from {folder}. They serve later" in text for text in notes.notes
    )
    for one, other in zip(everything(cache, where="disk", scratch=scratch), everything(cache), strict=True):
        np.testing.assert_array_equal(one, other)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = Notes()
    with reporting(again):
        median = read_targets(cache, "median", where="disk", scratch=scratch)  # totals are kept, not factors
    np.testing.assert_array_equal(median.factor, read_targets(cache, "median").factor)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert any("used again" in text for text in again.notes)
    another = opened(tmp_path, small_screen("a", seed=9))
    values, _ = everything(another, where="disk", scratch=scratch)  # of another cache: files of its own
    np.testing.assert_array_equal(values, everything(another)[0])
    read_targets(cache, 1e4, axis="union", where="disk", scratch=scratch)  # over other genes, too
    assert len(list(scratch.glob("values-*"))) == 3


def test_values_are_written_beside_the_cache_and_the_controls_are_kept_meanwhile(tmp_path: Path) -> None:
    cache, _ = open_three_files(tmp_path)
    controls = read_labels(cache)[0].is_control
    folder = read_targets(cache, 1e4, where="disk", controls=controls).folder
    assert folder is not None and folder.parent == tmp_path / "s.zarr/.derived"
    assert ControlValues(cache, controls).is_kept
    kept = read_targets(cache, 1e4, where="disk", controls=controls, only_controls=True)
    whole, rows = read_targets(cache, 1e4), np.flatnonzero(controls)
    assert kept.held is not None and (kept.values(rows) != whole.values(rows)).nnz == 0
    assert derived_bytes(cache.storage) > sum(array.nbytes for array in (whole.indices, whole.data, whole.indptr))


@pytest.mark.parametrize("n_blocks", [0, 1, 7, 20])
@pytest.mark.parametrize("axis", ["common", "union"])
def test_after_a_kill_writing_goes_on_where_it_was_and_gives_the_same_bytes(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str, n_blocks: int
) -> None:
    cache, _ = three_files
    read_targets(cache, 1e4, axis=axis, where="disk", scratch=tmp_path / "whole")
    scratch, append, left = tmp_path / "scratch", Unfinished.append, n_blocks
    first_cells: list[int] = []

    def cut(files: Unfinished, **arrays: np.ndarray) -> None:
        nonlocal left
        if not left and "data" in arrays:
            files._files["data"].write(b"half a block")
            raise KeyboardInterrupt
        left -= "data" in arrays
        append(files, **arrays)

    def blocks(*arguments: Any, original: Any = sest.data.targets._blocks) -> Iterator[Any]:
        first_cells.append(arguments[-1])
        return original(*arguments)

    small_blocks(monkeypatch)
    monkeypatch.setattr(sest.data.targets, "_blocks", blocks)
    with monkeypatch.context() as kill:
        kill.setattr(Unfinished, "append", cut)
        with pytest.raises(KeyboardInterrupt):
            read_targets(cache, 1e4, axis=axis, where="disk", scratch=scratch)
    assert not list(scratch.glob("values-*"))
    for one, other in zip(
        everything(cache, axis=axis, where="disk", scratch=scratch), everything(cache, axis=axis), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert values_in(scratch) == values_in(tmp_path / "whole")
    assert first_cells[0] == 0 and (first_cells[1] > 0) == (n_blocks > 0) and not list(scratch.glob(".*.new"))


def test_two_processes_at_once_write_the_values_once(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads: a lock is of an open file, so they are kept apart as processes are."""
    cache, _ = three_files
    scratch, writers, both = tmp_path / "scratch", list[int](), threading.Barrier(2)

    def slow(files: Unfinished) -> Unfinished:
        writers.append(1)
        time.sleep(0.3)
        return enter(files)

    enter = Unfinished.__enter__
    monkeypatch.setattr(Unfinished, "__enter__", slow)

    def read() -> tuple[np.ndarray, list[str]]:
        notes = Notes()
        with reporting(notes):
            both.wait()
            return everything(cache, where="disk", scratch=scratch)[0], notes.notes

    with ThreadPoolExecutor(2) as threads:
        found = [future.result() for future in [threads.submit(read) for _ in range(2)]]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][0], everything(cache)[0])
    assert len(writers) == 1
    waited = [text for _, notes in found for text in notes if text.startswith("Waiting for")]
    holder = f"(process {os.getpid()}|another)"  # the number is written once the lock is held
    assert len(waited) == 1 and re.match(
        f"Waiting for {holder}, which writes {re.escape(str(scratch))}/values-", waited[0]
    )


@pytest.mark.parametrize("name", ["indices.bin", "totals.bin", "about.json"])
def test_files_of_another_size_are_written_again(three_files: Opened, tmp_path: Path, name: str) -> None:
    cache, _ = three_files
    read_targets(cache, 1e4, where="disk", scratch=tmp_path)
    (folder,) = tmp_path.glob("values-*")
    before = values_in(tmp_path)
    (folder / name).write_bytes(before[name][:-1])
    with reporting(notes := Notes()):
        read_targets(cache, 1e4, where="disk", scratch=tmp_path)
    assert values_in(tmp_path) == before and not any("used again" in text for text in notes.notes)


def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = three_files
    small_blocks(monkeypatch)
    save, left = Unfinished.save, 5

    def full(files: Unfinished) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        save(files)

    with monkeypatch.context() as disk:
        disk.setattr(Unfinished, "save", full)
        with pytest.raises(InputError, match=r"No space left .*another folder with --scratch"):
            read_targets(cache, 1e4, where="disk", scratch=tmp_path)
    assert not list(tmp_path.glob("values-*"))
    with reporting(notes := Notes()):
        values, _ = everything(cache, where="disk", scratch=tmp_path)
    assert any("was begun before" in text for text in notes.notes)
    np.testing.assert_array_equal(values, everything(cache)[0])


def test_where_values_go_depends_on_what_is_free(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = three_files
    scratch = tmp_path / "scratch"
    assert not read_targets(cache, 1e4, scratch=scratch).on_disk
    monkeypatch.setattr(sest.data.targets, "available_bytes", lambda: 100)
    assert read_targets(cache, 1e4, scratch=scratch).on_disk
    with pytest.raises(InputError, match=r"take 0\.0 GB, of 0\.0 GB of free memory\. Use a machine"):
        read_targets(cache, 1e4, where="memory", scratch=scratch)
    no_room = type("Usage", (), {"free": 5})
    monkeypatch.setattr("sest.cache.derived.shutil.disk_usage", lambda folder: no_room)
    with pytest.raises(InputError, match=r"0\.0 GB more than the disk of .* has free\. Name .*--scratch"):
        read_targets(cache, 1e4, where="disk", scratch=tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()
    assert read_targets(cache, 1e4, scratch=scratch).on_disk  # what is there needs no room


def test_beside_a_cache_on_object_storage_a_folder_must_be_named(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = replace(three_files[0], storage=storage_at("memory://values-test/s.zarr"))
    with pytest.raises(InputError, match=r"on object storage\. Name a folder on a disk with --scratch"):
        read_targets(remote, 1e4, where="disk")
    assert read_targets(remote, 1e4, where="disk", scratch=tmp_path).on_disk


def test_a_scratch_folder_that_cannot_be_written_is_one_line(three_files: Opened, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write to .*Name another folder with --scratch"):
        read_targets(three_files[0], 1e4, where="disk", scratch=tmp_path / "file")


def test_free_memory_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    machine = available_bytes(tmp_path)  # no cgroup there
    assert 10**6 < machine < 10**14
    for name, text in (
        ("memory.max", "1000000"),
        ("memory.current", "900000"),
        ("memory.stat", "anon 5\ninactive_file 200000\n"),  # files read before: the kernel gives those back
    ):
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == 300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 10**6


@pytest.mark.parametrize("damage", ["a gene", "row starts", "fewer", "a row beyond the end"])
def test_mapped_values_of_somebody_else_end_in_one_line_and_never_outside_of_memory(
    three_files: Opened, tmp_path: Path, damage: str
) -> None:
    """Of arrays that may be larger than memory only the sizes are checked when they are mapped."""
    cache, _ = three_files
    folder = read_targets(cache, 1e4, where="disk", scratch=tmp_path).folder
    assert folder is not None
    about = json.loads((folder / "about.json").read_text())
    if damage == "a gene":
        np.memmap(folder / "indices.bin", about["arrays"]["indices"][0], "r+")[3] = 60_000
    elif damage == "fewer":
        about["arrays"]["totals"][1] = [1]
        os.truncate(folder / "totals.bin", 8)
        (folder / "about.json").write_text(json.dumps(about))
    else:
        indptr = np.memmap(folder / "indptr.bin", np.int64, "r+")
        indptr[3] = indptr[2] - 1 if damage == "row starts" else 2**40

    def read() -> None:
        targets = read_targets(cache, 1e4, where="disk", scratch=tmp_path)
        targets.values(np.arange(len(targets.factor)))

    with pytest.raises(InputError, match="damaged") as refused:
        read()
    assert "\n" not in str(refused.value)
