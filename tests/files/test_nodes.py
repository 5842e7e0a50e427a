"""What an HDF5 file may not do: lead elsewhere, be damaged, hold what is no table; each is refused in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

import sest.files.nodes
from helpers.damaged_h5ad import check_refused, counts, edit, replace, write
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.files.nodes import check_below, check_whole


def test_groups_that_contain_themselves_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        file["obs/target_gene/again"] = file["obs/target_gene"]
    with CellFile(path) as file:
        assert len(file.obs) == 53


# --- what is refused


def link(name: str, target: object) -> Callable[[Path], None]:
    return edit(lambda file: replace(file, name, target))


def external_storage(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            old = file[name]
            attributes, shape, dtype = dict(old.attrs), old.shape, old.dtype
            del file[name]
            size = int(np.prod(shape)) * dtype.itemsize
            new = file.create_dataset(name, shape, dtype, external=[(str(path.with_name("elsewhere")), 0, size)])
            new.attrs.update(attributes)

    return change


def virtual(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            old = file[name]
            layout = h5py.VirtualLayout(old.shape, old.dtype)
            layout[:] = h5py.VirtualSource(str(path.with_name("elsewhere.h5")), "data", old.shape)
            del file[name]
            file.create_virtual_dataset(name, layout)

    return change


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def unknown_filter(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((len(data),))
        properties.set_filter(310, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple(data.shape)
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, properties)


# what is done to a sound file, and what the one line must say
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "is truncated: copy or download"),
    "external link X": (link("X", h5py.ExternalLink("elsewhere.h5", "X")), "'X' as a link"),
    "soft link X": (link("X", h5py.SoftLink("/layers/x")), "'X' as a link"),
    "soft link data": (link("X/data", h5py.SoftLink("/X/indices")), "'data' as a link"),
    "external link obs": (link("obs", h5py.ExternalLink("elsewhere.h5", "obs")), "'obs' as a link"),
    "external link column": (link("obs/n", h5py.ExternalLink("elsewhere.h5", "n")), "'n' as a link"),
    "soft link codes": (link("obs/target_gene/codes", h5py.SoftLink("/obs/n")), "'codes' as a link"),
    "external link var": (link("var/_index", h5py.ExternalLink("elsewhere.h5", "n")), "'_index' as a link"),
    "external storage data": (external_storage("X/data"), "X/data is stored in another file"),
    "external storage indptr": (external_storage("X/indptr"), "X/indptr is stored in another file"),
    "external storage column": (external_storage("obs/n"), "obs/n is stored in another file"),
    "virtual data": (virtual("X/data"), "X/data is stored in another file"),
    "virtual column": (virtual("obs/n"), "obs/n is stored in another file"),
    "unknown filter": (unknown_filter, r"needs HDF5 filter 310 \(no name\): save the file again"),
    "group for data": (edit(lambda f: replace(f["X"], "data", f["var"])), "data is no array"),
    "empty data": (edit(lambda f: replace(f["X"], "data", h5py.Empty("f4"))), "X/data is no array"),
}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_leads_elsewhere_or_is_damaged_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path / "a.h5ad", *REFUSED[name])


def test_a_chunk_too_large_to_decompress_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.files.nodes, "CHUNK_LIMIT", 100)
    with pytest.raises(InputError, match="X/indptr has chunks of more than"):
        CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), compression="gzip"))


def test_a_filter_that_hdf5plugin_brings_is_read_where_it_is_installed(tmp_path: Path) -> None:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), **hdf5plugin.Zstd())
    with CellFile(path) as file:
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts())
        assert file.obs["target_gene"].nunique() == 2


def test_without_hdf5plugin_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), **hdf5plugin.Zstd())
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: code < 300)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(InputError, match=r"needs HDF5 filter 32015 .*: pip install hdf5plugin, or save the file again"):
        CellFile(path)


# --- what costs more than it is


def test_a_column_that_is_its_own_codes_ends(tmp_path: Path, shared_cases: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        del file["obs/target_gene/codes"]
        file["obs/target_gene/codes"] = file["obs/target_gene"]
    with CellFile(path) as file, pytest.raises(InputError, match="obs/target_gene"):
        file.obs["target_gene"]
    with pytest.raises(InputError, match="is no column of labels or numbers"):
        CellFile(shared_cases / "faults" / "h5ad-index-cycle" / "hardlink_cycle_index.h5ad")


def test_members_of_many_groups_are_not_followed_without_end(tmp_path: Path) -> None:
    """Eight floors of 30 names for the same group below: 30^8 paths in some kilobytes."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        below = file.create_group("0")
        for floor in range(1, 9):
            group = file.create_group(str(floor))
            for name in range(30):
                group[str(name)] = below
            below = group
        began = time.monotonic()
        with pytest.raises(InputError, match="more than 10,000 members"):
            check_below(below, 2**20)
        assert time.monotonic() - began < 20


def test_entries_that_were_never_written_are_no_gigabytes(tmp_path: Path, shared_cases: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        check_whole(file.create_dataset("full", data=np.zeros(1000)))
        check_whole(file.create_dataset("few", (2**20,), "f8", chunks=(1024,)))
        with pytest.raises(InputError, match="/empty says 1,073,741,824 entries, but has 0 bytes in the file"):
            check_whole(file.create_dataset("empty", (2**30,), "i8", chunks=(1024,)))
    store = zarr.create_array(tmp_path / "a.zarr", shape=(2**30,), dtype="i8", chunks=(2**20,))
    with pytest.raises(InputError, match="says 1,073,741,824 entries"):
        check_whole(store)
    with pytest.raises(InputError, match="/X/indptr says 8,589,934,593 entries"):
        CellFile(shared_cases / "faults" / "h5ad-zero-indptr-64GB" / "csr_bomb_cells_sparse_indptr.h5ad")


def test_a_table_of_30_000_columns_is_opened_but_not_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        for i in range(30_000):
            file[f"obs/x{i}"] = file["obs/n"]
        del file["obs"].attrs["column-order"]
    began = time.monotonic()
    with CellFile(path) as cells:
        assert len(cells.obs["target_gene"]) == 53
        with pytest.raises(InputError, match=r"has 30,002 columns; at most 4,096 are read together"):
            cells.obs.frame()
    assert time.monotonic() - began < 10
