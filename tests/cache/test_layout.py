"""cache/layout.py: the bytes of a shard, and groups that AnnData reads before a single shard is written."""

from __future__ import annotations

import struct
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import zarr

from helpers.caches import GROUPS, PROJECTION, small_shards
from helpers.pandas_3 import as_pandas_3
from sest.cache import layout, schema
from sest.cache.layout import Files, GroupPlan
from sest.cache.storage import LocalStorage


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 cells and 16 values, shards of 8 and 64."""
    small_shards(monkeypatch)


def plan_of(lengths: list[int], *, packed: bool = False, **changes: str) -> GroupPlan:
    """A group of cells with so many stored values each."""
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return GroupPlan("ds/a", indptr, 7, "int16", 3, changes.get("dtype", "float16"), {"dataset": "ds"}, packed)


def tables(n_cells: int, n_genes: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    obs = pd.DataFrame({"perturbation": pd.Categorical(["A"] * n_cells)}, index=[f"c{i}" for i in range(n_cells)])
    return obs, pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])


def written(folder: Path, *files: Files) -> LocalStorage:
    storage = LocalStorage(folder)
    folder.mkdir(exist_ok=True)  # as the lock of a cache makes it
    for some in files:
        storage.write(some)
    return storage


def crc32c(data: bytes) -> bytes:
    """The checksum of RFC 3720, bit by bit, as Zarr stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xFFFFFFFF)


def test_shards_cover_the_cells_and_the_values_without_a_gap() -> None:
    plan = plan_of([10] * 19)
    assert plan.n_cells == 19 and plan.n_entries == 190
    assert plan.embedding_shards() == [(0, 8), (8, 16), (16, 19)]
    assert plan.target_shards() == [(0, 64), (64, 128), (128, 190)]
    assert plan_of([0, 0]).target_shards() == []


@pytest.mark.parametrize(("n_cells", "per_cell"), [(19, 10), (3, 0)])
def test_the_files_of_a_groups_shards_follow_from_its_metadata(tmp_path: Path, n_cells: int, per_cell: int) -> None:
    plan = plan_of([per_cell] * n_cells)
    files = layout.group_files(plan, *tables(n_cells, 7))
    expected = [name for i in range(len(plan.target_shards())) for name in layout.target_files("ds/a", i)]
    expected += [layout.embedding_file("ds/a", i) for i in range(len(plan.embedding_shards()))]
    storage = written(tmp_path, layout.root_files({}), files)
    assert layout.shard_files(storage, "ds/a") == expected
    assert not set(expected) & set(files)
    assert layout.embedding_file("ds/a", 2) == "ds/a/obsm/X_sest/c/2/0"
    assert layout.target_files("ds/a", 2) == ["ds/a/X/data/c/2", "ds/a/X/indices/c/2"]


def test_a_small_group_has_shards_of_whole_chunks_no_longer_than_it(tmp_path: Path) -> None:
    for n_cells, rows, per_cell, entries in ((3, 4, 0, 16), (5, 8, 4, 32), (100, 8, 4, 64)):
        plan = plan_of([per_cell] * n_cells)
        folder = tmp_path / str(n_cells)
        written(folder, layout.root_files({}), layout.group_files(plan, *tables(n_cells, 7)))
        embeddings, data = (zarr.open_array(folder / "ds/a" / name) for name in ("obsm/X_sest", "X/data"))
        assert (embeddings.shards, embeddings.chunks) == ((rows, 3), (4, 3))
        assert (data.shards, data.chunks) == ((entries,), (16,))


def test_a_group_without_shards_is_an_anndata_group_of_cells_that_are_not_embedded(tmp_path: Path) -> None:
    obs, var = tables(5, 7)
    files = layout.group_files(plan_of([0] * 5), obs, var)
    assert schema.ROOT not in files and {name.split("/")[0] for name in files} == {"ds"}
    written(tmp_path, layout.root_files({"dim": 3}), files)
    read = anndata.read_zarr(tmp_path / "ds" / "a")
    assert read.obs.equals(obs) and read.var.index.equals(var.index)
    assert read.X.shape == (5, 7) and read.X.dtype == np.int16 and read.X.nnz == 0
    assert read.obsm["X_sest"].shape == (5, 3) and np.isnan(read.obsm["X_sest"]).all()
    assert zarr.open_group(tmp_path).attrs["sest"] == {"dim": 3}
    assert zarr.open_group(tmp_path / "ds" / "a").attrs["sest"] == {"dataset": "ds"}


def test_a_shard_of_embeddings_is_plain_chunks_with_a_checksum_each_and_an_index() -> None:
    array = "ds/a/obsm/X_sest"
    metadata = layout.group_files(plan_of([0] * 11), *tables(11, 7))[f"{array}/zarr.json"]
    rows = np.arange(33, dtype=np.float16).reshape(11, 3)
    rows[5:8] = np.nan  # not embedded

    def chunk(of: np.ndarray) -> bytes:
        """4 cells x 3 columns; those beyond the last cell are NaN."""
        whole = np.full((4, 3), np.nan, np.float16)
        whole[: len(of)] = of
        return whole.tobytes() + crc32c(whole.tobytes())

    index = struct.pack("<4Q", 0, 28, 28, 28)  # offset and length of both chunks: 4 x 3 x 2 bytes and the checksum
    expected = chunk(rows[:4]) + chunk(rows[4:8]) + index + crc32c(index)
    assert layout.shard_of(array, metadata, 0, rows[:8]) == {f"{array}/c/0/0": expected}
    index = struct.pack("<4Q", 0, 28, 2**64 - 1, 2**64 - 1)  # the second chunk would lie beyond the array
    expected = chunk(rows[8:]) + index + crc32c(index)
    assert layout.shard_of(array, metadata, 8, rows[8:]) == {f"{array}/c/1/0": expected}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_embeddings_are_the_same_to_every_reader_and_rows_of_nan_take_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(schema, "ROWS_PER_CHUNK", 256)
    monkeypatch.setattr(schema, "ROWS_PER_SHARD", 512)
    rows = np.random.default_rng(0).normal(size=(1000, 3)).astype(dtype)
    rows[np.arange(1000) % 10 > 0] = np.nan  # a row in ten is embedded: no chunk is empty
    sizes = {}
    for packed in (False, True):
        plan = plan_of([0] * 1000, packed=packed, dtype=dtype)
        files = layout.group_files(plan, *tables(1000, 7))
        storage = written(tmp_path / str(packed), layout.root_files({}), files)
        array = "ds/a/obsm/X_sest"
        for start, stop in plan.embedding_shards():
            shard = layout.shard_of(array, files[f"{array}/zarr.json"], start, rows[start:stop])
            assert shard == layout.shard_of(array, files[f"{array}/zarr.json"], start, rows[start:stop].copy())
            storage.write(shard)
        read = anndata.read_zarr(tmp_path / str(packed) / "ds" / "a").obsm["X_sest"]
        assert read.dtype == rows.dtype and read.tobytes() == rows.tobytes()
        np.testing.assert_array_equal(zarr.open_array(storage.root / array)[300:700], rows[300:700])
        sizes[packed] = sum(storage.sizes()[f"{array}/c/{i}/0"] for i in range(2))
    assert sizes[True] < 0.35 * sizes[False]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shards_are_read_back_exactly_also_where_they_are_all_zero(tmp_path: Path, dtype: str) -> None:
    plan = plan_of([10] * 19, dtype=dtype)
    files = layout.group_files(plan, *tables(19, 7))
    storage = written(tmp_path, layout.root_files({}), files)
    embeddings = np.random.default_rng(0).normal(size=(19, 3)).astype(dtype)
    values = np.arange(190, dtype=np.int16)
    values[64:128] = 0  # a whole shard of the fill value
    for array, content, shards in (
        ("ds/a/obsm/X_sest", embeddings, plan.embedding_shards()),
        ("ds/a/X/data", values, plan.target_shards()),
    ):
        for start, stop in shards:
            shard = layout.shard_of(array, files[f"{array}/zarr.json"], start, content[start:stop])
            assert len(shard) == 1
            storage.write(shard)
        np.testing.assert_array_equal(zarr.open_array(tmp_path / array)[:], content)
        assert zarr.open_array(tmp_path / array).dtype == content.dtype


def test_the_projection_is_a_group_of_its_arrays(tmp_path: Path) -> None:
    files = layout.projection_files(PROJECTION, {"genes": ["G1"]})
    assert schema.ROOT not in files
    written(tmp_path, layout.root_files({}), files)
    group = zarr.open_group(tmp_path / schema.PROJECTION)
    np.testing.assert_equal({name: array[:] for name, array in group.arrays()}, PROJECTION)
    assert group.attrs.asdict() == {"genes": ["G1"]}


def test_the_same_group_is_the_same_bytes() -> None:
    group = GROUPS[0]
    assert layout.group_files(group.plan, group.obs, group.var) == layout.group_files(group.plan, group.obs, group.var)


def test_text_of_pandas_3_is_written_as_that_of_pandas_2_and_the_table_given_stays_as_it_was() -> None:
    group = GROUPS[0]
    obs, var = (as_pandas_3(table) for table in (group.obs, group.var))
    before = obs.copy()
    files = layout.group_files(group.plan, group.obs, group.var)
    assert layout.group_files(group.plan, obs, var) == files
    pd.testing.assert_frame_equal(obs, before)
