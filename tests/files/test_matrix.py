"""Every storage form gives the same rows in bounded memory; what does not fit together is refused in one line."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import sest.files.matrix
from helpers.damaged_h5ad import FORMS, check_refused, counts, edit, replace, set_value, write
from sest.cells.scale import scan_file
from sest.errors import InputError
from sest.files.cell_file import CellFile


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
@pytest.mark.parametrize("chunk", [(1, 31), (4, 7), (3, 31), (53, 1), (53, 31)])
def test_dense_rows_do_not_depend_on_the_chunks(tmp_path: Path, chunk: tuple[int, int]) -> None:
    values = counts()
    path = write(tmp_path / "a.h5ad", values)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=values, chunks=chunk)
    with CellFile(path) as file:
        assert np.array_equal(sp.vstack([file.rows(i, min(i + 5, 53)) for i in range(0, 53, 5)]).toarray(), values)


def test_a_csc_file_that_fits_the_window_is_passed_through_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))) as file:
        asked: list[tuple[int, int]] = []
        read = file._matrix.read

        def note(start: int, stop: int) -> sp.csr_matrix:
            asked.append((start, stop))
            return read(start, stop)

        monkeypatch.setattr(file._matrix, "read", note)
        for start in range(0, 53, 5):
            file.rows(start, min(start + 5, 53))
        assert asked == [(0, 53)]


@pytest.mark.usefixtures("small_blocks")
def test_many_passes_through_a_csc_file_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))) as file, caplog.at_level(logging.WARNING):
        scan_file(file)
    assert len(caplog.records) == 1
    assert "stored by gene (CSC)" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_bounded_by_the_window_and_not_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    # Windows of 50,000 values of 8 bytes (index and float32), and temporaries of the same order; the files have 100,000
    # and 400,000 stored values (0.8 and 3.2 MB as CSR). Four times the file may not cost noticeably more.
    monkeypatch.setattr(sest.files.matrix, "READ_VALUES", 10_000)
    monkeypatch.setattr(sest.files.matrix, "WINDOW_VALUES", 50_000)
    peaks = []
    for n_cells in (1_000, 4_000):
        values = sp.random(n_cells, 400, density=0.25, random_state=0, dtype=np.float32, format="csr")
        stored = values.toarray() if form == "dense" else values.asformat(form)
        with CellFile(write(tmp_path / f"{n_cells}.h5ad", stored)) as file:
            assert len(file.obs) == n_cells  # the tables are read whole: not what is measured
            tracemalloc.start()
            scan = scan_file(file)
            for start in range(0, n_cells, 100):
                file.rows(start, start + 100)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert scan.indptr[-1] == values.nnz
    assert peaks[1] < 1.2 * peaks[0] + 1e5  # what other threads of this process allocate meanwhile
    assert peaks[1] < 2e6


# --- what is refused

STRUCTURED = np.zeros(53, dtype=[("a", "i4"), ("b", "f4")])
# what is done to a sound CSR file (53 cells, 31 genes), and what the one line must say
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "indptr falls": (set_value("X/indptr", 20, 3), "indptr is damaged"),
    "indptr starts late": (set_value("X/indptr", 0, 1), "indptr is damaged"),
    "indptr ends early": (set_value("X/indptr", 53, 1), "indptr is damaged"),
    "indptr too short": (edit(lambda f: replace(f["X"], "indptr", f["X/indptr"][:-1])), "has 53 entries"),
    "indptr of floats": (edit(lambda f: replace(f["X"], "indptr", f["X/indptr"][:] + 0.5)), "not whole"),
    "row longer than genes": (
        edit(lambda f: f["X/indptr"].write_direct(np.r_[np.zeros(53, "i4"), f["X/indptr"][-1]].astype("i4"))),
        "spans more than 31 values",
    ),
    "index too large": (set_value("X/indices", 40, 31), "from 0 to 31, but only 0 to 30"),
    "index below zero": (set_value("X/indices", 40, -1), "from -1 to 30"),
    "fewer indices than values": (
        edit(lambda f: replace(f["X"], "indices", f["X/indices"][:-1])),
        "indices for .* values",
    ),
    "text values": (edit(lambda f: replace(f["X"], "data", np.full(len(f["X/data"]), b"a"))), "expected numbers"),
    "structured X": (edit(lambda f: replace(f, "X", STRUCTURED)), "expected numbers"),
    "flat X": (edit(lambda f: replace(f, "X", np.zeros(53))), r"has shape \(53,\)"),
    "unknown form": (edit(lambda f: f["X"].attrs.modify("encoding-type", "coo_matrix")), "stored as 'coo_matrix'"),
    "no indices": (edit(lambda f: f["X"].__delitem__("indices")), "has no indices: it is not a sparse matrix"),
    "no shape": (edit(lambda f: f["X"].attrs.__delitem__("shape")), "does not say its shape"),
    "other shape": (edit(lambda f: f["X"].attrs.modify("shape", [52, 31])), "has 54 entries where .* 53"),
    "huge shape": (edit(lambda f: f["X"].attrs.modify("shape", [53, 2**62])), "genes; at most"),
}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_values_that_do_not_fit_together_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path / "a.h5ad", *REFUSED[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("at", "value", "words"), [(40, 53, "only 0 to 52"), (40, -1, "from -1"), (1, None, "twice")])
def test_a_csc_file_with_bad_indices_is_refused(tmp_path: Path, at: int, value: int | None, words: str) -> None:
    path = write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))
    with h5py.File(path, "r+") as file:
        file["X/indices"][at] = file["X/indices"][0] if value is None else value
    with CellFile(path) as file, pytest.raises(InputError, match=words):
        scan_file(file)


def test_a_csc_row_with_more_values_than_genes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sp.csc_matrix(counts()))
    with h5py.File(path, "r+") as file:
        file["X/indices"][:40] = 5
    with CellFile(path) as file, pytest.raises(InputError, match="cell 5 has more values than there are genes"):
        file.rows(0, 1)


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_shapes_and_pointers_that_are_doubles_as_r_writes_them_are_whole_numbers(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.h5ad", FORMS[form](counts()))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = np.asarray(file["X"].attrs["shape"], dtype=np.float64)
        replace(file["X"], "indptr", file["X/indptr"][:].astype(np.float64))
    with CellFile(path) as file:
        assert np.array_equal(file.rows(0, file.n_cells).toarray(), counts())
    with h5py.File(path, "r+") as file:
        file["X/indptr"][1] += 0.5
    with pytest.raises(InputError, match="not whole"):
        CellFile(path)


def test_the_case_of_double_pointers_is_read_as_its_numbers_say(shared_cases: Path) -> None:
    path = shared_cases / "files" / "indptr_double.h5ad"
    with h5py.File(path) as stored:
        indptr, indices = (stored["X"][name][:].astype(np.int64) for name in ("indptr", "indices"))
        values = sp.csr_matrix(
            (stored["X/data"][:], indices, indptr), shape=tuple(map(int, stored["X"].attrs["shape"]))
        )
    with CellFile(path) as file:
        assert np.array_equal(file.rows(0, file.n_cells).toarray(), values.toarray().astype(np.float32))
