"""The writer of .h5ad files: AnnData reads them, memory is that of a block, and a file is whole or not there."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from helpers.pandas_3 import as_pandas_3
from sest.errors import InputError
from sest.files import write_h5ad
from sest.files.write_h5ad import HDF5_CHUNK, H5adWriter, _deflated

VAR = pd.DataFrame({"symbol": list("abcde")}, index=[f"g{i}" for i in range(5)])


def cells(n: int, n_genes: int = 5, seed: int = 0) -> sp.csr_matrix:
    return sp.random(n, n_genes, 0.4, "csr", np.float32, np.random.default_rng(seed))


def obs(n: int) -> pd.DataFrame:
    labels = pd.Categorical([("A", "B")[i % 2] for i in range(n)])
    return pd.DataFrame({"target_gene": labels, "score": np.arange(n) / 7}, index=[f"c{i}" for i in range(n)])


def write(path: Path, blocks: list[sp.csr_matrix], dtype: str = "float32") -> None:
    with H5adWriter(path, 5, dtype) as writer:
        for block in blocks:
            writer.add(block)
        writer.finish(obs(sum(b.shape[0] for b in blocks)), VAR, {"sest": {"a": 1, "table": np.eye(2)}})


def test_anndata_reads_what_was_written(tmp_path: Path) -> None:
    blocks = [cells(7), cells(0), cells(3, seed=1)]
    write(tmp_path / "x.h5ad", blocks)
    read = ad.read_h5ad(tmp_path / "x.h5ad")
    assert isinstance(read.X, sp.csr_matrix) and read.X.dtype == np.float32 and read.X.has_canonical_format
    np.testing.assert_array_equal(read.X.toarray(), sp.vstack(blocks).toarray())
    pd.testing.assert_frame_equal(read.obs, obs(10))
    pd.testing.assert_frame_equal(read.var, VAR)
    assert read.uns["sest"]["a"] == 1
    np.testing.assert_array_equal(read.uns["sest"]["table"], np.eye(2))
    on_disk = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    np.testing.assert_array_equal(on_disk.X[8:10].toarray(), blocks[2][1:].toarray())
    on_disk.file.close()


def test_text_of_pandas_3_gives_the_file_that_text_of_pandas_2_gives(tmp_path: Path) -> None:
    for name, made in (("2.h5ad", lambda table: table), ("3.h5ad", as_pandas_3)):
        with H5adWriter(tmp_path / name, 5, "float32") as writer:
            writer.add(cells(4))
            writer.finish(made(obs(4)), made(VAR), {})
    assert (tmp_path / "2.h5ad").read_bytes() == (tmp_path / "3.h5ad").read_bytes()


def test_genes_are_in_order_and_indices_of_one_type_as_scipy_needs_to_sum_and_sort(tmp_path: Path) -> None:
    rows = cells(9)
    mixed = rows[:, [3, 0, 4, 1, 2]]  # scipy leaves the indices of a selection as they come
    assert not mixed.has_sorted_indices
    before = mixed.indices.copy()
    write(tmp_path / "x.h5ad", [mixed])
    assert (mixed.indices == before).all()  # what was given is left alone
    read = ad.read_h5ad(tmp_path / "x.h5ad").X
    assert read.indices.dtype == read.indptr.dtype and read.has_canonical_format
    np.testing.assert_array_equal(read.toarray(), mixed.toarray())


def test_how_rows_are_put_into_blocks_does_not_change_a_byte(tmp_path: Path) -> None:
    rows = cells(20)
    write(tmp_path / "a.h5ad", [rows])
    write(tmp_path / "b.h5ad", [rows[i : i + 3] for i in range(0, 20, 3)])
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


@pytest.mark.parametrize("compress", [True, False])
def test_blocks_that_end_within_chunks_or_with_them_do_not_change_a_byte_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool
) -> None:
    monkeypatch.setattr(write_h5ad, "HDF5_CHUNK", 64)
    rows = sp.csr_matrix(np.arange(1, 641, dtype=np.float32).reshape(128, 5))  # 640 values: ten chunks
    for name, size in (("a", 128), ("b", 1), ("c", 64), ("d", 50)):
        with H5adWriter(tmp_path / name, 5, "float32", compress=compress) as writer:
            for start in range(0, 128, size):
                writer.add(rows[start : start + size])
            writer.finish(obs(128), VAR, {})
        np.testing.assert_array_equal(ad.read_h5ad(tmp_path / name).X.toarray(), rows.toarray())
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_values_are_what_hdf5_itself_makes_of_them_with_its_own_filters_alone(tmp_path: Path) -> None:
    """HDF5 reads them by shuffle and deflate, which every build of it has; a chunk unpacked by hand is the same."""
    rows = cells(100_000)
    write(tmp_path / "x.h5ad", [rows])
    with h5py.File(tmp_path / "x.h5ad") as file:
        for name, expected in (("data", rows.data), ("indices", rows.indices)):
            dataset = file["X"][name]
            assert (
                dataset.shuffle and dataset.compression == "gzip" and dataset.id.get_create_plist().get_nfilters() == 2
            )
            np.testing.assert_array_equal(dataset[:], expected)
            mask, chunk = dataset.id.read_direct_chunk((0,))
            planes = np.frombuffer(zlib.decompress(chunk), np.uint8).reshape(4, HDF5_CHUNK)
            assert mask == 0 and planes.T.tobytes() == expected[:HDF5_CHUNK].tobytes()


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("kind", ["random", "zero", "counts", "nan"])
def test_what_was_packed_is_unpacked_whatever_it_is(dtype: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    drawn = np.frombuffer(rng.bytes(2**16 * 8), np.uint8)[: 2**16 * np.dtype(dtype).itemsize].view(dtype)
    values = {
        "random": drawn,
        "zero": np.zeros(2**16, dtype),
        "counts": rng.poisson(2, 2**16).astype(dtype),
        "nan": np.full(2**16, np.nan if dtype.startswith("float") else -1, dtype),
    }[kind]
    packed = _deflated(values)
    planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(values.itemsize, -1)
    assert planes.T.tobytes() == values.tobytes()
    assert len(packed) < {"random": 1.001, "zero": 0.01, "counts": 0.4, "nan": 0.01}[kind] * values.nbytes


def test_log1p_cells_take_little_more_than_half_and_counts_a_quarter_of_the_space(tmp_path: Path) -> None:
    """Bounds by information: a value's exponent has 2 to 3 bits, its other 24 all but all; a gene number 8 and runs."""
    rng = np.random.default_rng(0)
    counts = sp.random(400, 5_000, 0.4, "csr", np.float32, rng, data_rvs=lambda n: 1 + rng.poisson(1, n))
    log1p = sp.csr_matrix((np.log1p(counts.data * rng.random(counts.nnz)), counts.indices, counts.indptr), counts.shape)
    log1p = log1p.astype(np.float32)
    obs, var = (pd.DataFrame(index=pd.RangeIndex(n).astype(str)) for n in counts.shape)
    sizes = {}
    for name, rows, compress in (("log1p", log1p, True), ("counts", counts, True), ("plain", counts, False)):
        with H5adWriter(tmp_path / name, 5_000, "float32", compress=compress) as writer:
            writer.add(rows)
            writer.finish(obs, var, {})
        np.testing.assert_array_equal(ad.read_h5ad(tmp_path / name).X.toarray(), rows.toarray())
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["log1p"] < 0.6 * sizes["plain"] and sizes["counts"] < 0.25 * sizes["plain"]


def test_a_file_without_cells_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "x.h5ad", [])
    assert ad.read_h5ad(tmp_path / "x.h5ad").shape == (0, 5)


def test_memory_is_that_of_a_block_whatever_the_file(tmp_path: Path) -> None:
    """A block of 2,000 x 500 at 40% is 3.2 MB; 15 of them are 48 MB, and 26 in the file."""
    block = cells(2000, 500)

    def peak(n_blocks: int) -> int:
        tracemalloc.start()
        with H5adWriter(tmp_path / "x.h5ad", 500, "float32") as writer:
            for _ in range(n_blocks):
                writer.add(block)
            n = n_blocks * 2000
            writer.finish(
                pd.DataFrame(index=pd.RangeIndex(n).astype(str)), pd.DataFrame(index=map(str, range(500))), {}
            )
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few, many = peak(2), peak(15)
    assert (tmp_path / "x.h5ad").stat().st_size > 25e6
    # beside the block: row ends and names of all cells, some 200 bytes a cell while they are written
    assert many - few < 13 * 2000 * 250 < 0.3 * (tmp_path / "x.h5ad").stat().st_size


class Broken(Exception):
    pass


def test_an_error_while_writing_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x.h5ad").write_text("old")

    def stop_after_a_block() -> None:
        with H5adWriter(tmp_path / "x.h5ad", 5, "float32") as writer:
            writer.add(cells(4))
            raise Broken

    with pytest.raises(Broken):
        stop_after_a_block()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.h5ad", "old")]


def test_a_block_that_ends_without_its_tables_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="finish"), H5adWriter(tmp_path / "x.h5ad", 5, "float32") as writer:
        writer.add(cells(4))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes a file of this process may have: the kernel then fails writes as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.8, 0.999])
@pytest.mark.parametrize("chunk", [HDF5_CHUNK, 2**10])
def test_a_full_disk_is_an_os_error_and_leaves_the_older_file(
    tmp_path: Path, room: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, share: float, chunk: int
) -> None:
    """Full at once, among the rows, or at the end. Without care HDF5 raises RuntimeError and crashes at exit."""
    monkeypatch.setattr(write_h5ad, "HDF5_CHUNK", chunk)
    blocks = [cells(3_000, seed=i) for i in range(4)]
    write(tmp_path / "x.h5ad", blocks)
    n_bytes = (tmp_path / "x.h5ad").stat().st_size
    (tmp_path / "x.h5ad").write_text("old")
    room(100 + int(share * (n_bytes - 200)))
    with pytest.raises(OSError, match="File too large") as full:
        write(tmp_path / "x.h5ad", blocks)
    assert full.value.errno == errno.EFBIG and full.value.filename == str(tmp_path / "x.h5ad")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.h5ad", "old")]


def test_a_disk_that_fills_up_while_it_is_synced_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x.h5ad", [cells(4)])
    assert not list(tmp_path.iterdir())


def test_rows_and_tables_must_fit_each_other(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), H5adWriter(tmp_path / "x.h5ad", 5, "float32") as writer:
        writer.add(cells(4, 6))
    with pytest.raises(AssertionError), H5adWriter(tmp_path / "x.h5ad", 5, "float32") as writer:
        writer.finish(obs(3), VAR, {})
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_file_can_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Create it first"):
        H5adWriter(tmp_path / "no" / "x.h5ad", 5, "float32")
    with pytest.raises(InputError, match="is a folder"):
        H5adWriter(tmp_path, 5, "float32")
