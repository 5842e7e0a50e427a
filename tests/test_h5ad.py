"""sest/h5ad.py: every storage form gives the same rows in bounded memory, and unsound files are refused in one line."""

from __future__ import annotations

import gzip
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sest.h5ad
from sest.errors import InputError
from sest.h5ad import CellFile, Scan, decide_scale

FORMS: dict[str, Callable[[np.ndarray], object]] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def counts(n_cells: int = 53, n_genes: int = 31, seed: int = 0) -> np.ndarray:
    """Poisson counts (n_cells, n_genes) with an empty first, middle and last cell and an empty gene."""
    values = np.random.default_rng(seed).poisson(0.8, (n_cells, n_genes)).astype(np.float32)
    values[[0, n_cells // 2, -1]] = 0
    values[:, n_genes // 3] = 0
    return values


def write(path: Path, values: object, layers: dict[str, object] | None = None, **options: object) -> Path:
    n_cells, n_genes = values.shape  # type: ignore[attr-defined]
    kinds = pd.Categorical([("control", "STAT1")[i % 2] for i in range(n_cells)])
    obs = pd.DataFrame({"target_gene": kinds, "n": np.arange(n_cells)}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    ad.AnnData(values, obs=obs, var=var, layers=layers).write_h5ad(path, **options)
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and reads of a few rows, so that small files have many boundaries."""
    monkeypatch.setattr(sest.h5ad, "READ_VALUES", 90)
    monkeypatch.setattr(sest.h5ad, "WINDOW_VALUES", 200)


# --- rows


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float64", "float16", "uint8", "int64", ">f4", "bool"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_equal_what_was_stored_for_every_form_dtype_and_block_size(tmp_path: Path, form: str, dtype: str) -> None:
    values = np.minimum(counts(), 1) if dtype == "bool" else counts()
    path = write(tmp_path / "a.h5ad", FORMS[form](values), compression="gzip")
    name = "X" if form == "dense" else "X/data"
    with h5py.File(path, "r+") as file:  # SciPy and AnnData do not write all of these types, other programs do
        attributes, stored = dict(file[name].attrs), file[name][:]
        del file[name]
        file[name] = stored.astype(dtype)
        file[name].attrs.update(attributes)
    with CellFile(path) as file:
        for size in (1, 7, 53):
            for start in range(0, file.n_cells, size):
                rows = file.rows(start, min(start + size, file.n_cells))
                assert np.array_equal(rows.toarray(), values[start : start + size])
                assert (rows.dtype, rows.indices.dtype) == (np.float32, np.int32)
                assert rows.nnz == np.count_nonzero(values[start : start + size])
                assert rows.has_canonical_format
        assert file.rows(5, 5).shape == (0, 31)
        for start, stop in ((-1, 2), (3, 2), (50, 54)):
            with pytest.raises(IndexError, match=f"rows {start}:{stop} of 53"):
                file.rows(start, stop)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS)
def test_rows_can_be_asked_in_any_order(tmp_path: Path, form: str) -> None:
    values = counts()
    rng = np.random.default_rng(1)
    with CellFile(write(tmp_path / "a.h5ad", FORMS[form](values))) as file:
        for _ in range(15):
            start, stop = sorted(rng.integers(0, len(values) + 1, 2))
            assert np.array_equal(file.rows(start, stop).toarray(), values[start:stop])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("chunk", [(1, 31), (4, 7), (3, 31), (53, 1), (53, 31)])
def test_dense_rows_do_not_depend_on_the_chunks(tmp_path: Path, chunk: tuple[int, int]) -> None:
    values = counts()
    path = write(tmp_path / "a.h5ad", values)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=values, chunks=chunk)
    with CellFile(path) as file:
        assert np.array_equal(sp.vstack([file.rows(i, min(i + 5, 53)) for i in range(0, 53, 5)]).toarray(), values)


def test_unsorted_rows_are_sorted_and_stored_zeros_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(np.array([[0, 2, 3], [4, 0, 0]], dtype=np.float32)))
    with h5py.File(path, "r+") as file:
        for name, new in (("data", [3.0, 0.0, 2.0, 4.0]), ("indices", [2, 0, 1, 0]), ("indptr", [0, 3, 4])):
            del file["X"][name]
            file["X"][name] = np.array(new)
    with CellFile(path) as file:
        rows = file.rows(0, 2)
        assert (rows.indptr.tolist(), rows.indices.tolist(), rows.data.tolist()) == ([0, 2, 3], [1, 2, 0], [2, 3, 4])


def test_a_layer_is_read_by_name_and_x_is_a_name_too(tmp_path: Path) -> None:
    values = counts()
    path = write(tmp_path / "a.h5ad", np.log1p(values), layers={"counts": sp.csr_matrix(values)})
    with CellFile(path, "counts") as file:
        assert file.layers == ("counts",)
        assert np.array_equal(file.rows(0, 53).toarray(), values)
    with CellFile(path, "X") as file:
        assert np.array_equal(file.rows(0, 53).toarray(), np.log1p(values))
    with pytest.raises(InputError, match=r"no layer 'count'\. Layers: X, counts\. Did you mean 'counts'"):
        CellFile(path, "count")


def test_a_csc_file_that_fits_the_window_is_passed_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))) as file:
        asked: list[tuple[int, int]] = []
        read = file._source.read
        monkeypatch.setattr(file._source, "read", lambda *rows: (asked.append(rows), read(*rows))[1])
        for start in range(0, 53, 5):
            file.rows(start, min(start + 5, 53))
        assert asked == [(0, 53)]


@pytest.mark.usefixtures("small_blocks")
def test_many_passes_through_a_csc_file_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))) as file, caplog.at_level(logging.WARNING):
        file.scan()
    assert len(caplog.records) == 1
    assert "stored by gene (CSC)" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded_by_the_window_and_not_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    # Windows of 50,000 values of 8 bytes (index and float32), and temporaries of the same order; the files have 100,000
    # and 400,000 stored values (0.8 and 3.2 MB as CSR). Four times the file may not cost noticeably more.
    monkeypatch.setattr(sest.h5ad, "READ_VALUES", 10_000)
    monkeypatch.setattr(sest.h5ad, "WINDOW_VALUES", 50_000)
    peaks = []
    for n_cells in (1_000, 4_000):
        values = sp.random(n_cells, 400, density=0.25, random_state=0, dtype=np.float32, format="csr")
        stored = values.toarray() if form == "dense" else values.asformat(form)
        with CellFile(write(tmp_path / f"{n_cells}.h5ad", stored)) as file:
            assert len(file.obs) == n_cells  # the tables are read whole: not what is measured
            tracemalloc.start()
            scan = file.scan()
            for start in range(0, n_cells, 100):
                file.rows(start, start + 100)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert scan.indptr[-1] == values.nnz
    assert peaks[1] < 1.2 * peaks[0] + 1e5  # what other threads of this process allocate meanwhile
    assert peaks[1] < 2e6


# --- tables


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


def as_anndata_07(path: Path) -> None:
    """Rewrite the categorical column of obs as AnnData 0.7 did: codes with a reference to obs/__categories."""
    with h5py.File(path, "r+") as file:
        codes, categories = (file[f"obs/target_gene/{name}"][:] for name in ("codes", "categories"))
        del file["obs/target_gene"]
        file["obs/target_gene"] = codes
        file["obs/__categories/target_gene"] = categories
        file["obs/target_gene"].attrs["categories"] = file["obs/__categories/target_gene"].ref
        file["obs/__categories/target_gene"].attrs["ordered"] = False
        file["obs"].attrs["encoding-version"] = "0.1.0"


def test_categories_of_anndata_07_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    as_anndata_07(path)
    with CellFile(path) as file:
        assert file.obs["target_gene"].tolist()[:3] == ["control", "STAT1", "control"]


# --- scan


def test_scan_hash_is_the_same_for_every_storage_form_and_differs_with_content(tmp_path: Path) -> None:
    values = counts()

    def digest(name: str, stored: object, **options: object) -> str:
        with CellFile(write(tmp_path / name, stored, **options)) as file:
            return file.scan().sha256

    with_zeros = sp.csr_matrix(values)
    with_zeros.data[:3] = 0
    cleaned = with_zeros.copy()
    cleaned.eliminate_zeros()
    assert digest("z.h5ad", with_zeros) == digest("c.h5ad", cleaned)
    same = {
        digest("a.h5ad", sp.csr_matrix(values)),
        digest("b.h5ad", sp.csc_matrix(values), compression="gzip"),
        digest("d.h5ad", values.astype(np.float64)),
        digest("e.h5ad", sp.csr_matrix(values.astype(np.int64))),
        digest("f.h5ad", values.astype(np.uint8), compression="lzf"),
    }
    assert len(same) == 1
    one_more, moved = values.copy(), values.copy()
    one_more[3, 4] += 1
    moved[1:3] = moved[2:0:-1]
    assert len({*same, digest("g.h5ad", one_more), digest("h.h5ad", moved), digest("i.h5ad", values[:, :-1])}) == 4
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["var/_index"][0] = "another gene"
    with CellFile(tmp_path / "a.h5ad") as file:
        assert file.scan().sha256 not in same


@pytest.mark.parametrize("form", FORMS)
def test_scan_hash_does_not_depend_on_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = write(tmp_path / "a.h5ad", FORMS[form](counts()))
    seen = set()
    for read, window in ((10**6, 10**6), (90, 200), (64, 64)):
        monkeypatch.setattr(sest.h5ad, "READ_VALUES", read)
        monkeypatch.setattr(sest.h5ad, "WINDOW_VALUES", window)
        with CellFile(path) as file:
            scan = file.scan()
            seen.add((scan.sha256, tuple(scan.indptr), scan.n_raw_cells))
    assert len(seen) == 1


def test_scan_counts_cells_by_what_their_values_can_be(tmp_path: Path) -> None:
    values = np.zeros((8, 4), dtype=np.float32)  # cell 0: empty, says nothing
    values[1] = [1, 0, 1, 1]  # ones: says nothing
    values[2] = [1, 2, 0, 0]  # whole, above 1: counts
    values[3] = [0.5, 2, 0, 0]  # not whole, small: log1p
    values[4] = [0.5, 36, 0, 0]  # above 35: no log1p
    values[5] = [0.5, 15.5, 0, 0]  # expm1(15.5) = 5.39e6 > 5e6: no log1p
    values[6] = [0.5, 15.4, 0, 0]  # expm1(15.4) = 4.88e6 < 5e6: log1p
    values[7] = [-1.5, 0, 0, -2]  # below zero
    done: list[int] = []
    with CellFile(write(tmp_path / "a.h5ad", values)) as file:
        scan = file.scan(done.append)
    assert scan.indptr.tolist() == [0, 0, 3, 5, 7, 9, 11, 13, 15]
    assert scan.indptr.dtype == np.int64
    assert (scan.n_raw_cells, scan.n_log1p_cells, scan.n_negative) == (3, 3, 2)
    assert (scan.max_value, scan.all_integer) == (36, False)
    assert sum(done) == 8


def test_scan_of_a_file_without_any_value_says_so(tmp_path: Path) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix((3, 5), dtype=np.float32))) as file:
        scan = file.scan()
    assert (scan.max_value, scan.all_integer, scan.indptr.tolist()) == (0, True, [0, 0, 0, 0])


def test_real_cells_are_read_and_their_scale_is_found(shared_data: Path, shared_reference: Path) -> None:
    for path, layer, scale in (
        (shared_data / "papalexi_eccite.h5ad", None, "counts"),
        (shared_data / "perturbench_devel.h5ad", None, "log1p"),
        (shared_data / "perturbench_devel.h5ad", "counts_reconstructed", "counts"),
        (shared_reference / "se" / "raw" / "cells.h5ad", None, "counts"),
        (shared_reference / "se" / "log1p" / "cells.h5ad", None, "log1p"),
    ):
        adata = ad.read_h5ad(path)
        truth = sp.csr_matrix(adata.layers[layer] if layer else adata.X).astype(np.float32)
        with CellFile(path, layer) as file:
            rows = sp.vstack([file.rows(i, min(i + 1024, file.n_cells)) for i in range(0, file.n_cells, 1024)])
            assert (rows != truth).nnz == 0
            scan = file.scan()
            assert scan.indptr[-1] == truth.nnz
            assert decide_scale(scan, "auto", path, file.layers) == scale


# --- what is refused


def replace(group: h5py.Group, name: str, values: object) -> None:
    del group[name]
    group[name] = values


def set_value(name: str, at: int, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file[name][at] = value

    return change


def edit(change: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return apply


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


def compound_obs(path: Path) -> None:
    """AnnData 0.6: tables as compound arrays, other names for the attributes of X."""
    with h5py.File(path, "r+") as file:
        del file["X"].attrs["encoding-type"]
        replace(file, "obs", np.zeros(53, dtype=[("index", "S8"), ("batch", "i4")]))


def raw_only(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("X", "raw/X")


def layers_only(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("X", "layers/counts")


def unknown_filter(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((len(data),))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
        space = h5py.h5s.create_simple(data.shape)
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, properties)


def repeat_an_index(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["X/indices"][1] = file["X/indices"][0]


HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OUTSIDE = np.array(["/X/data"], dtype=object)
STRUCTURED = np.zeros(53, dtype=[("a", "i4"), ("b", "f4")])

# what is done to a sound CSR file (53 cells, 31 genes), and what the one line must say
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
    "compound obs": (compound_obs, "save it again with a recent anndata"),
    "no X but raw": (raw_only, r"no X.*raw/X"),
    "no X but layers": (layers_only, r"no X\. Pass --layer with one of its layers: counts"),
    "unknown filter": (unknown_filter, "needs HDF5 filter 32015"),
    "indptr falls": (set_value("X/indptr", 20, 3), "indptr is damaged"),
    "indptr starts late": (set_value("X/indptr", 0, 1), "indptr is damaged"),
    "indptr ends early": (set_value("X/indptr", 53, 1), "indptr is damaged"),
    "indptr too short": (edit(lambda f: replace(f["X"], "indptr", f["X/indptr"][:-1])), "has 53 entries"),
    "indptr of floats": (edit(lambda f: replace(f["X"], "indptr", f["X/indptr"][:].astype("f4"))), "type float32"),
    "row longer than genes": (
        edit(lambda f: f["X/indptr"].write_direct(np.r_[np.zeros(53, "i4"), f["X/indptr"][-1]].astype("i4"))),
        "spans more than 31 values",
    ),
    "index too large": (set_value("X/indices", 40, 31), "from 0 to 31, but only 0 to 30"),
    "index below zero": (set_value("X/indices", 40, -1), "from -1 to 30"),
    "index twice": (repeat_an_index, r"a value twice in cell 'cell1' \(row 1\), gene 'G"),
    "fewer indices than values": (
        edit(lambda f: replace(f["X"], "indices", f["X/indices"][:-1])),
        "indices for .* values",
    ),
    "NaN": (set_value("X/data", 0, np.nan), r"NaN or an infinite value in cell 'cell1' \(row 1\), gene 'G"),
    "inf": (set_value("X/data", 0, np.inf), r"NaN or an infinite value in cell 'cell1'"),
    "text values": (edit(lambda f: replace(f["X"], "data", np.full(len(f["X/data"]), b"a"))), "expected numbers"),
    "structured X": (edit(lambda f: replace(f, "X", STRUCTURED)), "expected numbers"),
    "flat X": (edit(lambda f: replace(f, "X", np.zeros(53))), r"has shape \(53,\)"),
    "unknown form": (edit(lambda f: f["X"].attrs.modify("encoding-type", "coo_matrix")), "stored as 'coo_matrix'"),
    "no indices": (edit(lambda f: f["X"].__delitem__("indices")), "has no indices: it is not a sparse matrix"),
    "group for data": (edit(lambda f: replace(f["X"], "data", f["var"])), "data is no array"),
    "empty data": (edit(lambda f: replace(f["X"], "data", h5py.Empty("f4"))), "X/data is no array"),
    "layers no group": (edit(lambda f: replace(f, "layers", np.zeros(3))), "/layers is not a group of layers"),
    "index outside obs": (edit(lambda f: f["obs"].attrs.create("_index", "/X/indptr")), "has no index '/X/indptr'"),
    "no shape": (edit(lambda f: f["X"].attrs.__delitem__("shape")), "does not say its shape"),
    "other shape": (edit(lambda f: f["X"].attrs.modify("shape", [52, 31])), "has 54 entries where .* 53"),
    "more genes than var": (
        edit(lambda f: f["X"].attrs.modify("shape", [53, 40])),
        "var has 31 genes, but the values are of 40",
    ),
    "huge shape": (edit(lambda f: f["X"].attrs.modify("shape", [53, 2**62])), "genes; at most"),
    "fewer cells than X": (edit(lambda f: replace(f["obs"], "_index", f["obs/_index"][:-1])), "obs has 52 cells"),
    "column too short": (edit(lambda f: replace(f["obs"], "n", np.arange(5))), "obs|cannot be read"),
    "column too large": (
        edit(lambda f: f["obs"].create_dataset("big", (2**40,), "f8", chunks=(1024,))),
        "too large for a column",
    ),
    "gene names twice": (set_value("var/_index", 1, "G0"), r"1 gene names more than once in var: G0\..*make_unique"),
}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_unsound_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    damage, words = REFUSED[name]
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()))
    damage(path)
    with pytest.raises(InputError, match=words) as caught, CellFile(path) as file:  # noqa: PT012
        file.scan()
        assert len(file.obs) == file.n_cells
    assert "\n" not in str(caught.value)
    assert "a.h5ad" in str(caught.value)


@pytest.mark.parametrize("form", ["csc", "dense"])
def test_nan_is_named_by_its_first_cell_in_every_form(tmp_path: Path, form: str) -> None:
    values = counts()
    values[7, 30] = values[9, 2] = np.nan
    path = write(tmp_path / "a.h5ad", FORMS[form](values))
    with CellFile(path) as file, pytest.raises(InputError, match=r"cell 'cell7' \(row 7\), gene 'G30'"):
        file.scan()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("at", "value", "words"), [(40, 53, "only 0 to 52"), (40, -1, "from -1"), (1, None, "twice")])
def test_a_csc_file_with_bad_indices_is_refused(tmp_path: Path, at: int, value: int | None, words: str) -> None:
    path = write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))
    with h5py.File(path, "r+") as file:
        file["X/indices"][at] = file["X/indices"][0] if value is None else value
    with CellFile(path) as file, pytest.raises(InputError, match=words):
        file.scan()


def test_a_csc_row_with_more_values_than_genes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))
    with h5py.File(path, "r+") as file:
        file["X/indices"][:40] = 5
    with CellFile(path) as file, pytest.raises(InputError, match="cell 5 has more values than there are genes"):
        file.rows(0, 1)


def test_a_chunk_too_large_to_decompress_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.h5ad, "CHUNK_LIMIT", 100)
    with pytest.raises(InputError, match="X/indptr has chunks of more than"):
        CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix(counts()), compression="gzip"))


def test_a_value_too_large_for_float32_is_refused(tmp_path: Path) -> None:
    values = counts().astype(np.float64)
    values[4, 2] = 1e300
    with CellFile(write(tmp_path / "a.h5ad", values)) as file, pytest.raises(InputError, match="infinite value"):
        file.scan()


def test_groups_that_contain_themselves_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        file["obs/target_gene/again"] = file["obs/target_gene"]
    with CellFile(path) as file:
        assert len(file.obs) == 53


def test_a_file_without_cells_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty: 0 cells x 5 genes"):
        CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix((0, 5), dtype=np.float32)))
    (tmp_path / "cells.zarr").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        CellFile(tmp_path / "cells.zarr")
    (tmp_path / "cells.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(InputError, match=r"Zarr store: convert it with anndata\.read_zarr"):
        CellFile(tmp_path / "cells.zarr")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()))
    raw_only(path)
    with pytest.raises(InputError, match="no X"):
        CellFile(path)
    with h5py.File(path, "r+") as file:  # HDF5 refuses to write to a file that is open for reading
        assert "raw" in file


# --- scale


def scan_of(values: list[list[float]], tmp_path: Path) -> Scan:
    with CellFile(write(tmp_path / "s.h5ad", np.array(values, dtype=np.float32))) as file:
        return file.scan()


WHOLE: list[list[float]] = [[1, 3, 0], [0, 0, 1], [2, 1, 0]]
LOGGED = [[0.69, 1.39, 0], [0, 0, 0.69], [5.2, 0.1, 0]]
CPM = [[0.5, 900.5, 0], [36.5, 0, 1], [0, 77.5, 2]]
BINARY: list[list[float]] = [[1, 0, 1], [0, 1, 0]]


def test_scale_is_found_once_for_the_file(tmp_path: Path) -> None:
    assert decide_scale(scan_of(WHOLE, tmp_path), "auto", tmp_path) == "counts"
    assert decide_scale(scan_of(LOGGED, tmp_path), "auto", tmp_path) == "log1p"


def test_shallow_counts_are_counts_though_no_cell_is_above_upstreams_limits(tmp_path: Path) -> None:
    shallow = np.random.default_rng(0).poisson(0.3, (40, 50))
    assert shallow.max() < 15  # upstream would read every one of these cells as log1p
    assert decide_scale(scan_of(shallow.tolist(), tmp_path), "auto", tmp_path) == "counts"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (WHOLE + LOGGED, "mixes scales: 2 cells can only be counts, 3 only log1p"),
        (CPM, "up to 900.5.*CPM.*--counts raw"),
        (BINARY, "only zeros and ones.*--counts raw or --counts log1p"),
        ([[0, 0, 0]], "only zeros and ones"),
        ([[-1, 2, 0]], "1 values below zero"),
    ],
)
def test_an_undecidable_scale_is_refused_with_the_layers_named(
    tmp_path: Path, values: list[list[float]], words: str
) -> None:
    with pytest.raises(InputError, match=words + r".* Or choose with --layer: X, counts\.$") as caught:
        decide_scale(scan_of(values, tmp_path), "auto", tmp_path, ("counts",))
    assert "\n" not in str(caught.value)


def test_a_requested_scale_is_used_and_a_contradiction_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decide_scale(scan_of(BINARY, tmp_path), "raw", tmp_path) == "counts"
    assert decide_scale(scan_of(LOGGED, tmp_path), "log1p", tmp_path) == "log1p"
    assert not caplog.records
    assert decide_scale(scan_of(CPM, tmp_path), "raw", tmp_path) == "counts"
    assert "not all values are whole numbers" in caplog.text
    assert decide_scale(scan_of(WHOLE, tmp_path), "log1p", tmp_path) == "log1p"
    assert "2 cells look like counts" in caplog.text
    with pytest.raises(InputError, match="2 values below zero"):
        decide_scale(scan_of([[-0.5, -1, 2]], tmp_path), "raw", tmp_path)
    with pytest.raises(InputError, match=r"'row' is not one of auto, raw, log1p\..*'raw'"):
        decide_scale(scan_of(WHOLE, tmp_path), "row", tmp_path)
