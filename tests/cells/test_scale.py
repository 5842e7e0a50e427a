"""What the values of a file are, whatever its storage form: the scan, the scale, and counts as log1p values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import sest.cells.matrix
from helpers.damaged_h5ad import FORMS, counts, write
from sest.cells.h5ad import CellFile
from sest.cells.scale import Scan, decide_scale, factors_to, log1p_rows, total_counts
from sest.errors import InputError

# --- scan


def test_scan_hash_is_the_same_for_every_storage_form_and_differs_with_content(tmp_path: Path) -> None:
    values = counts()

    def digest(name: str, stored: object, **options: Any) -> str:
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
        monkeypatch.setattr(sest.cells.matrix, "READ_VALUES", read)
        monkeypatch.setattr(sest.cells.matrix, "WINDOW_VALUES", window)
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


# --- counts as log1p values


def test_log1p_rows_normalises_counts_and_leaves_rows_of_factor_0() -> None:
    values = sp.csr_matrix(np.array([[1, 0, 3], [2, 5, 0]], np.int16))
    got = log1p_rows(values, np.array([2.0, 0.0], np.float32))
    np.testing.assert_allclose(got.toarray(), [[np.log(3), 0, np.log(7)], [2, 5, 0]], rtol=1e-6)
    assert got.dtype == np.float32


def test_log1p_rows_of_float64_factors_are_rounded_once() -> None:
    rows = sp.csr_matrix(counts())
    factor = factors_to(1e4, total_counts(rows))
    dense = counts().astype(np.float64)
    totals = dense.sum(1, keepdims=True)
    expected = np.log1p(np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0) * dense)
    got = log1p_rows(rows, factor)
    assert got.dtype == np.float32 and rows.data.max() > 1  # a copy: the counts stay
    np.testing.assert_array_equal(got.toarray(), expected.astype(np.float32))


def test_a_cell_without_counts_has_factor_0_and_the_others_sum_to_the_target() -> None:
    rows = sp.csr_matrix(np.array([[3, 0, 5], [0, 0, 0], [300, 300, 0]], np.int16))
    assert total_counts(rows).tolist() == [8, 0, 600] and total_counts(rows).dtype == np.float64
    assert factors_to(1200.0, total_counts(rows)).tolist() == [150, 0, 2]
