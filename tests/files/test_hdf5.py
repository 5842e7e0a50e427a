"""What an HDF5 file may not do: lead elsewhere, be damaged, hold what is no table; each is refused in one line."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sest.files.hdf5
from helpers.damaged_h5ad import as_anndata_07, check_refused, counts, edit, replace, write
from sest.errors import InputError
from sest.files.h5ad import CellFile


def test_obs_and_var_are_what_anndata_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with CellFile(path) as file:
        truth = ad.read_h5ad(path)
        pd.testing.assert_frame_equal(file.obs, truth.obs)
        pd.testing.assert_frame_equal(file.var, truth.var, check_column_type=False)  # it has no columns


def test_cell_names_may_repeat(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        file["obs/_index"][1] = "cell0"
    with CellFile(path) as file:
        assert file.obs.index[:3].tolist() == ["cell0", "cell0", "cell2"]


def test_categories_of_anndata_07_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    as_anndata_07(path)
    with CellFile(path) as file:
        assert file.obs["target_gene"].tolist()[:3] == ["control", "STAT1", "control"]


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


def overwrite(data: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(data)


def old_reference_to_external_storage(path: Path) -> None:
    as_anndata_07(path)
    with h5py.File(path, "r+") as file:
        outside = file.create_dataset("elsewhere", (2,), "S4", external=[(str(path.with_name("elsewhere")), 0, 8)])
        file["obs/target_gene"].attrs["categories"] = outside.ref


def old_categories_by_name(path: Path) -> None:
    as_anndata_07(path)
    with h5py.File(path, "r+") as file:
        file["obs/target_gene"].attrs["categories"] = "/uns/elsewhere"


def ten_x(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix/barcodes"] = np.arange(3)


def loom(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.zeros((3, 3))
        file.create_group("row_attrs")


def mudata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("mod/rna")


def hdf5_of_something(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.arange(3)


def unknown_filter(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((len(data),))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple(data.shape)
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, properties)


HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OUTSIDE = np.array(["/X/data"], dtype=object)

# what is done to a sound file, and what the one line must say
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (Path.unlink, "^No such file: "),
    "empty file": (overwrite(b""), "not an .h5ad file.*it is empty"),
    "gzip": (overwrite(gzip.compress(b"x" * 99)), "not an .h5ad file.*gunzip"),
    "lfs pointer": (overwrite(POINTER), "not an .h5ad file.*git lfs pull"),
    "html": (overwrite(b"\n" + HTML), "not an .h5ad file.*HTML"),
    "text": (overwrite(b"gene,count\n"), "not an .h5ad file"),
    "truncated": (truncate, "is truncated: copy or download"),
    "10x": (ten_x, "10x Genomics .h5.*read_10x_h5"),
    "loom": (loom, "loom file.*read_loom"),
    "mudata": (mudata, "MuData file"),
    "other hdf5": (hdf5_of_something, "no obs, var; it has weights"),
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
    "column outside obs": (edit(lambda f: f["obs"].attrs.create("column-order", OUTSIDE)), "columns outside itself"),
    "reference outside": (old_reference_to_external_storage, "elsewhere is stored in another file"),
    "categories by name": (old_categories_by_name, "names its categories"),
    "sparse column": (edit(lambda f: f["obs/n"].attrs.modify("encoding-type", "csr_matrix")), "no column of labels"),
    "newer encoding": (edit(lambda f: f["obs/n"].attrs.modify("encoding-version", "9.9")), "obs cannot be read"),
    "unknown filter": (unknown_filter, "needs HDF5 filter 32015"),
    "group for data": (edit(lambda f: replace(f["X"], "data", f["var"])), "data is no array"),
    "empty data": (edit(lambda f: replace(f["X"], "data", h5py.Empty("f4"))), "X/data is no array"),
    "index outside obs": (edit(lambda f: f["obs"].attrs.create("_index", "/X/indptr")), "has no index '/X/indptr'"),
    "column too short": (edit(lambda f: replace(f["obs"], "n", np.arange(5))), "obs|cannot be read"),
    "column too large": (
        edit(lambda f: f["obs"].create_dataset("big", (2**40,), "f8", chunks=(1024,))),
        "too large for a column",
    ),
}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_leads_elsewhere_or_is_damaged_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path / "a.h5ad", *REFUSED[name])


def test_a_chunk_too_large_to_decompress_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.files.hdf5, "CHUNK_LIMIT", 100)
    with pytest.raises(InputError, match="X/indptr has chunks of more than"):
        CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), compression="gzip"))


def test_a_column_that_is_a_table_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        n = len(file["obs/_index"])
        file["obs"].create_dataset("scores", data=np.ones((n, 2)))
        file["obs/scores"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "scores"]
    with CellFile(path) as cells, pytest.raises(InputError, match=r"/obs/scores is a table of shape \(\d+, 2\)"):
        _ = cells.obs
