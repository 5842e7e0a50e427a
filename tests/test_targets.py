"""The training targets: over the common genes, as whole numbers, in memory or in mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from tiny import GENES, Notes, TinyGroup, tiny_group, write_store

import sest.targets
from sest.cache import Cache, open_cache
from sest.errors import InputError
from sest.memory import available_bytes
from sest.progress import Silent
from sest.targets import SCRATCH_MARK, log1p_rows, read_targets, remove_scratch

Opened = tuple[Cache, list[TinyGroup]]


def opened(folder: Path, *groups: TinyGroup) -> Cache:
    return open_cache(write_store(folder / "s.zarr", groups))


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Files with other genes, orders of genes, control labels and scales."""
    groups = [
        tiny_group("a", genes=GENES, cell_types=("x", "y")),
        tiny_group("b/one", genes=GENES[4:][::-1], control="nt", sizes={"Q": 3, "Z": 2}, seed=1),
        tiny_group("b/two", genes=(*GENES[2:8], "only", *GENES[8:]), scale="log1p", cell_types=("y",), seed=2),
    ]
    return opened(tmp_path_factory.mktemp("three"), *groups), groups


def test_targets_are_the_genes_all_files_have_in_the_first_files_order(three_files: Opened) -> None:
    cache, groups = three_files
    notes = Notes()
    targets = read_targets(cache, "10000", notes)
    assert targets.genes == GENES[4:] and targets.scale == "mixed" and targets.target_sum == 10_000.0
    assert "Training on the 16 genes that all groups have (of up to 20)." in notes.texts
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
    group = tiny_group("a")
    notes = Notes()
    targets = read_targets(opened(tmp_path, group), "10000", notes)
    assert targets.genes == group.genes and targets.scale == "counts" and not notes.texts
    assert targets.data.dtype == np.int16 and targets.indices.dtype == np.uint16 and targets.indptr.dtype == np.int64
    assert (targets.values(np.arange(group.matrix.shape[0])) != group.matrix).nnz == 0


def test_the_target_sum_is_a_number_or_the_median_of_the_count_files_cells(tmp_path: Path) -> None:
    empty = tiny_group("a")
    values = empty.matrix.toarray()
    values[3] = 0  # an empty cell counts in no median and gets no factor
    groups = [replace(empty, matrix=scipy.sparse.csr_matrix(values)), tiny_group("b", scale="log1p", seed=1)]
    cache = opened(tmp_path, *groups)
    totals = values.sum(1)
    median = read_targets(cache, "median", Silent())
    assert median.target_sum == np.median(totals[totals > 0])
    assert median.factor[3] == 0
    np.testing.assert_allclose(median.factor[: len(totals)] * totals, np.where(totals > 0, median.target_sum, 0))
    np.testing.assert_allclose(read_targets(cache, "1e3", Silent()).factor[0], 1000 / totals[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [("many", "takes a number or 'median'"), ("0", "above 0"), ("-1", "above 0"), ("inf", "above 0")],
)
def test_an_unusable_target_sum_is_refused(three_files: Opened, asked: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_targets(three_files[0], asked, Silent())


def test_the_median_of_a_log1p_file_is_the_default(tmp_path: Path) -> None:
    targets = read_targets(opened(tmp_path, tiny_group("a", scale="log1p")), "median", Silent())
    assert targets.scale == "log1p" and targets.target_sum == 10_000.0


def test_files_without_a_gene_in_common_are_refused(tmp_path: Path) -> None:
    other = tiny_group("b", genes=[f"h{i}" for i in range(20)])
    with pytest.raises(InputError, match=r"no gene in common \(a, b\)"):
        read_targets(opened(tmp_path, tiny_group("a"), other), "10000", Silent())


def everything(cache: Cache, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All values, dense, and the factors."""
    targets = read_targets(cache, "10000", Silent(), **options)
    return targets.values(np.arange(len(targets.factor))).toarray(), targets.factor


def test_reading_in_blocks_changes_nothing(three_files: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = three_files
    whole = everything(cache)
    monkeypatch.setattr("sest.targets.VALUES_PER_READ", 7)
    for one, other in zip(everything(cache), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_values_on_disk_are_those_in_memory_and_are_written_once(three_files: Opened, tmp_path: Path) -> None:
    cache, _ = three_files
    scratch, notes = tmp_path / "scratch", Notes()
    on_disk = read_targets(cache, "10000", notes, where="disk", scratch=scratch)
    assert on_disk.on_disk and not read_targets(cache, "10000", Silent()).on_disk
    assert any(f"they are read from {scratch}" in text for text in notes.texts)
    for one, other in zip(everything(cache, where="disk", scratch=scratch), everything(cache), strict=True):
        np.testing.assert_array_equal(one, other)
    written = {file: file.stat().st_mtime_ns for file in scratch.iterdir()}
    again = Notes()
    read_targets(cache, "median", again, where="disk", scratch=scratch)  # totals are kept, not factors
    assert {file: file.stat().st_mtime_ns for file in scratch.iterdir()} == written
    assert any("used again" in text for text in again.texts)
    other = opened(tmp_path, tiny_group("a", seed=9))
    values, _ = everything(other, where="disk", scratch=scratch)  # of another store: written anew
    np.testing.assert_array_equal(values, everything(other)[0])
    (scratch / "mine.txt").write_text("kept")
    remove_scratch(scratch)
    assert [file.name for file in scratch.iterdir()] == ["mine.txt"]


def test_a_kill_while_values_are_written_leaves_nothing_that_is_trusted(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = three_files
    scratch, original = tmp_path / "scratch", sest.targets._blocks

    def cut(*arguments: Any) -> Iterator[Any]:
        yield next(original(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as kill:
        kill.setattr(sest.targets, "_blocks", cut)
        with pytest.raises(KeyboardInterrupt):
            read_targets(cache, "10000", Silent(), where="disk", scratch=scratch)
    assert (scratch / "data.bin").exists() and not (scratch / SCRATCH_MARK).exists()
    for one, other in zip(everything(cache, where="disk", scratch=scratch), everything(cache), strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_values_go_depends_on_what_is_free(
    three_files: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = three_files
    scratch = tmp_path / "scratch"
    assert not read_targets(cache, "10000", Silent(), scratch=scratch).on_disk
    monkeypatch.setattr(sest.targets, "available_bytes", lambda: 100)
    assert read_targets(cache, "10000", Silent(), scratch=scratch).on_disk
    for options in ({}, {"where": "memory", "scratch": scratch}):
        with pytest.raises(InputError, match=r"take 0\.0 GB, of 0\.0 GB of free memory\. Use a machine"):
            read_targets(cache, "10000", Silent(), **options)
    no_room = type("Usage", (), {"free": 5})
    monkeypatch.setattr(sest.targets.shutil, "disk_usage", lambda folder: no_room)
    with pytest.raises(InputError, match=r"0\.0 GB of free disk at .*--scratch"):
        read_targets(cache, "10000", Silent(), where="disk", scratch=tmp_path / "a/b/c")
    assert not (tmp_path / "a").exists()


def test_a_scratch_folder_that_cannot_be_written_is_one_line(three_files: Opened, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"Cannot write to .*Name another folder with --scratch"):
        read_targets(three_files[0], "10000", Silent(), where="disk", scratch=tmp_path / "file")


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


def test_log1p_rows_normalises_counts_and_leaves_rows_of_factor_0() -> None:
    values = scipy.sparse.csr_matrix(np.array([[1, 0, 3], [2, 5, 0]], np.int16))
    got = log1p_rows(values, np.array([2.0, 0.0], np.float32))
    np.testing.assert_allclose(got.toarray(), [[np.log(3), 0, np.log(7)], [2, 5, 0]], rtol=1e-6)
    assert got.dtype == np.float32
