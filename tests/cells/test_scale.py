"""What the values of a file are, whatever its storage form: the scan, the scale, and counts as log1p values."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import sest.files.matrix
from helpers.damaged_h5ad import FORMS, counts, strings, write
from helpers.zarr_cells import as_zarr
from sest.cells.scale import (
    SAMPLED_CELLS,
    Normalisation,
    Scan,
    Scanner,
    cell_sums,
    decide_scale,
    differing_scales,
    factors_to,
    log1p_rows,
    normalisation_of,
    normalised_to,
    scan_blocks,
    scan_file,
    total_counts,
)
from sest.errors import InputError
from sest.files.cell_file import CellFile

# --- scan


def test_scan_hash_is_the_same_for_every_storage_form_and_differs_with_content(tmp_path: Path) -> None:
    values = counts()

    def digest(name: str, stored: object, **options: Any) -> str:
        with CellFile(write(tmp_path / name, stored, **options)) as file:
            return scan_file(file).sha256

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
        strings(file["var/_index"])[0] = "another gene"
    with CellFile(tmp_path / "a.h5ad") as file:
        assert scan_file(file).sha256 not in same


@pytest.mark.parametrize("form", FORMS)
def test_scan_hash_does_not_depend_on_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    path = write(tmp_path / "a.h5ad", FORMS[form](counts()))
    seen = set()
    for read, window in ((10**6, 10**6), (90, 200), (64, 64)):
        monkeypatch.setattr(sest.files.matrix, "READ_VALUES", read)
        monkeypatch.setattr(sest.files.matrix, "WINDOW_VALUES", window)
        with CellFile(path) as file:
            scan = scan_file(file)
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
        scan = scan_file(file, done.append)
    assert scan.indptr.tolist() == [0, 0, 3, 5, 7, 9, 11, 13, 15]
    assert scan.indptr.dtype == np.int64
    assert (scan.n_raw_cells, scan.n_log1p_cells, scan.n_negative) == (3, 3, 2)
    assert (scan.max_value, scan.all_integer) == (36, False)
    assert sum(done) == 8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 3.0, 11.5, 14.5, 16.0, 40.0]), st.booleans())
def test_a_scan_block_by_block_is_that_of_dense_cells(seed: int, size: float, hashed: bool) -> None:
    rng = np.random.default_rng(seed)
    values = rng.uniform(0, size, (30, 50)) * (rng.random((30, 50)) < rng.uniform(0, 1, (30, 1)))
    whole = rng.random(30) < 0.5
    values[whole] = np.rint(values[whole])
    values[rng.random((30, 50)) < 0.01] *= -1
    values = values.astype(np.float32)
    scanner, ends = Scanner(30, hashed), [0, *sorted(rng.integers(0, 31, 3).tolist()), 30]
    for start, stop in pairwise(ends):
        scanner.add(sp.csr_matrix(values[start:stop]))
    scan, n_raw, n_log1p, n_whole = scanner.scan([f"g{i}" for i in range(50)]), 0, 0, 0
    for cell in values:
        cell = cell[cell != 0].astype(np.float64)
        all_whole = bool((cell % 1 == 0).all())
        linear = len(cell) > 0 and (cell.max() > 35 or np.expm1(cell).sum() > 5e6)
        raw = linear or (len(cell) > 0 and all_whole and cell.max() > 1)
        n_raw, n_log1p, n_whole = n_raw + raw, n_log1p + (not all_whole and not linear), n_whole + (raw and all_whole)
    assert (scan.n_raw_cells, scan.n_log1p_cells, scan.n_whole_cells) == (n_raw, n_log1p, n_whole)
    assert (scan.n_negative, scan.n_fractional) == ((values < 0).sum(), (values % 1 != 0).sum())
    assert scan.max_value == values.max() and scan.all_integer == (scan.n_fractional == 0)
    assert scan.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-12, abs=1e-12)
    assert scan.indptr.tolist() == [0, *np.cumsum((values != 0).sum(1)).tolist()]
    whole_scan = scan_blocks([sp.csr_matrix(values)], 30, [f"g{i}" for i in range(50)])
    assert scan.sha256 == (whole_scan.sha256 if hashed else "")


def test_scan_of_a_file_without_any_value_says_so(tmp_path: Path) -> None:
    with CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix((3, 5), dtype=np.float32))) as file:
        scan = scan_file(file)
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
            scan = scan_file(file)
            assert scan.indptr[-1] == truth.nnz
            assert decide_scale(scan, "auto", path, file.layers) == scale


# --- scale


def scan_of(values: list[list[float]], tmp_path: Path) -> Scan:
    with CellFile(write(tmp_path / "s.h5ad", np.array(values, dtype=np.float32))) as file:
        return scan_file(file)


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


# --- how log1p values were made

LOGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log1p": np.log1p,
    "log2": lambda x: np.log2(1 + x),
    "log10": lambda x: np.log10(1 + x),
}


def drawn(seed: int, n: int = 40, genes: int = 60) -> np.ndarray:
    """Counts (n, genes) of cells of several depths and programmes; the second is empty."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 2, (3, genes))[rng.integers(3, size=n)] * rng.uniform(0.3, 3, (n, 1))
    values = rng.poisson(rate).astype(np.float64)
    values[1] = 0
    return values


def normalised(values: np.ndarray, total: float) -> np.ndarray:
    sums = values.sum(1, keepdims=True)
    return np.divide(values * total, sums, out=np.zeros_like(values), where=sums > 0)


def scanned(values: np.ndarray, blocks: int = 1) -> Scan:
    """The scan of a file with these values, in so many blocks."""
    parts = [sp.csr_matrix(part.astype(np.float32)) for part in np.array_split(values, blocks)]
    return scan_blocks(parts, len(values), [f"g{i}" for i in range(values.shape[1])])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(1, 6.3), st.sampled_from(list(LOGS)), st.integers(1, 5))
def test_the_log_and_the_total_are_found_whatever_they_are(seed: int, power: float, log: str, blocks: int) -> None:
    total = 10**power
    scan = scanned(LOGS[log](normalised(drawn(seed), total)), blocks)
    found = scan.normalisation
    assert (found.log, found.is_whole) == (log, False)
    assert found.total == pytest.approx(total, rel=1e-3)  # float32 values
    if log == "log1p":
        assert decide_scale(scan, "auto", Path("x")) == "log1p"
    else:
        with pytest.raises(
            InputError, match=rf"holds {log} of .*normalised to .* \* numpy\.log\({log[3:]}\) .*--counts"
        ):
            decide_scale(scan, "auto", Path("x"))
        assert decide_scale(scan, "log1p", Path("x")) == "log1p"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.05, 200))
def test_counts_are_never_log1p_and_log1p_never_counts(seed: int, depth: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.poisson(rng.gamma(0.5, 2 * depth, (30, 50))).astype(np.float64)
    values[0, :2] = 2, 1
    assert decide_scale(scanned(values), "auto", Path("x")) == "counts"
    logged = scanned(np.log1p(values))
    assert decide_scale(logged, "auto", Path("x")) == "log1p"
    assert logged.normalisation.is_whole
    assert logged.normalisation.differs_from(normalised_to(1e4))


@pytest.mark.parametrize(
    ("n", "most"), [(9, 0), (SAMPLED_CELLS, SAMPLED_CELLS), (3 * SAMPLED_CELLS + 1, SAMPLED_CELLS)]
)
def test_the_sums_of_a_bounded_number_of_cells_over_the_whole_file_are_kept(n: int, most: int) -> None:
    values = np.log1p(normalised(drawn(0, n), 1e4))
    for blocks in (1, 4):
        scan = scanned(values, blocks)
        assert len(scan.sums) <= SAMPLED_CELLS
        at = np.arange(0, n, -(-n // SAMPLED_CELLS))
        np.testing.assert_array_equal(scan.sums, cell_sums(sp.csr_matrix(values[at].astype(np.float32))))
    assert (scan.normalisation.total is not None) == (most > 0)  # 9 cells, 8 of them with values, tell nothing


def test_sums_of_a_cell_are_those_computed_by_hand() -> None:
    x = np.log1p(np.array([[3.0, 1.0, 0], [0.5, 2.0, 0], [0, 0, 0]]))
    got = cell_sums(sp.csr_matrix(x))
    np.testing.assert_allclose(got[:, 0], [4, 2.5, 0], rtol=1e-12)
    np.testing.assert_allclose(got[:, 1], [(2 ** x[0] - 1).sum(), (2 ** x[1] - 1).sum(), 0], rtol=1e-12)
    np.testing.assert_allclose(got[:, 2], [(10 ** x[0] - 1).sum(), (10 ** x[1] - 1).sum(), 0], rtol=1e-12)
    np.testing.assert_allclose(got[:, 3], x.sum(1), rtol=1e-12)
    assert got[:, 4].tolist() == [1, 0, 0]  # 3 and 1 are whole, 0.5 is not, an empty cell says nothing


def test_what_is_known_of_the_normalisation_is_said_in_words() -> None:
    depths = np.log1p(drawn(3))
    some = np.log1p(normalised(drawn(3), 1e4)[:, :30])  # a selection of genes
    for values, words in (
        (np.log1p(normalised(drawn(3), 1e4)), r"log1p of counts normalised to 10,000"),
        (np.log1p(normalised(drawn(3), 1e6)), r"log1p of CPM, counts normalised to 1,000,000"),
        (np.log2(1 + normalised(drawn(3), 1e6)), r"log2 of CPM, counts normalised to 1,000,000"),
        (depths, r"log1p of counts that were not normalised"),
        (some, r"log1p of values whose sums differ from cell to cell \(.* to .*, median .*\)"),
        (some[:5], r"log1p"),
    ):
        assert re.fullmatch(words, str(scanned(values).normalisation))


def test_normalisations_differ_only_where_that_is_certain() -> None:
    selection, unknown = Normalisation(sums=(4e3, 6e3, 8e3)), Normalisation()
    ten, same, cpm = normalised_to(1e4), normalised_to(1.04e4), normalised_to(1e6)
    raw, log2 = Normalisation(is_whole=True, sums=(1e3, 2e3, 9e3)), Normalisation("log2", 1e4, sums=(1e4, 1e4, 1e4))
    for one, other, differ in (
        (ten, same, False),
        (ten, normalised_to(1.06e4), True),
        (ten, cpm, True),
        (ten, selection, False),
        (normalised_to(5e3), selection, True),  # most cells have more than the total
        (selection, selection, False),
        (raw, ten, True),
        (raw, raw, False),
        (log2, ten, True),
        (log2, log2, False),
        (unknown, cpm, False),
        (unknown, log2, False),
    ):
        assert one.differs_from(other) == other.differs_from(one) == differ


def test_files_used_together_are_compared_with_each_other_and_with_what_counts_become() -> None:
    ten, cpm = normalised_to(1e4), normalised_to(1e6)
    assert differing_scales({}, 1e4, ["a"]) is None
    assert differing_scales({"b": cpm}, 1e4, []) is None  # alone: nothing to agree with
    assert differing_scales({"b": ten}, 1e4, ["a"]) is None
    assert differing_scales({"b": cpm}, None, ["a"]) is None  # counts are not normalised there
    text = "a is counts, normalised to 10,000; b is log1p of CPM, counts normalised to 1,000,000"
    assert differing_scales({"b": cpm, "c": ten}, 1e4, ["a"]) == text
    text = "b is log1p of CPM, counts normalised to 1,000,000; c is log1p of counts normalised to 10,000"
    assert differing_scales({"u": Normalisation(), "b": cpm, "c": ten}, None, []) == text
    many = differing_scales({"b": ten, **{f"c{i}": cpm for i in range(5)}}, None, [])
    assert many is not None and many.endswith("; and 3 more files differ")


def test_an_even_mixture_of_totals_is_no_total() -> None:
    values = normalised(drawn(0), 1e4)
    values[::2] *= 100
    assert normalisation_of(scanned(np.log1p(values)).sums).total is None


# --- scales that are neither


def test_scaled_values_are_called_scaled_and_raw_is_named() -> None:
    x = np.log1p(normalised(drawn(1), 1e4))
    scan = scanned(((x - x.mean(0)) / np.maximum(x.std(0), 1e-9)).clip(None, 10))
    assert scan.is_scaled and scan.mean == pytest.approx(0, abs=0.05)
    with pytest.raises(InputError, match=r"x is scaled: \d\d% of its values are below zero .*layer: X, counts\.$"):
        decide_scale(scan, "auto", Path("x"), ("counts",))
    with pytest.raises(InputError, match=r"x is scaled: .*raw/X is there: pass --layer raw\.$"):
        decide_scale(scan, "auto", Path("x"), ("raw",))
    assert decide_scale(scan, "log1p", Path("x")) == "log1p"  # as asked


def _one_fraction(values: np.ndarray) -> np.ndarray:
    values[3, 5] = 0.5
    return values


@pytest.mark.parametrize(
    ("change", "n"),
    [(_one_fraction, "1"), (lambda x: np.expm1(np.log1p(x.astype(np.float32))), r"[\d,]+")],
    ids=["one", "rounding"],
)
@pytest.mark.parametrize("shallow", [False, True])
def test_counts_of_which_some_are_not_quite_whole_are_called_so(
    change: Callable[[np.ndarray], np.ndarray], n: str, shallow: bool
) -> None:
    values = drawn(2)
    if shallow:
        values = np.random.default_rng(1).binomial(values.astype(int), 0.2).astype(float)
    scan = scanned(change(values))
    with pytest.raises(InputError, match=rf"^x holds counts, but {n} of [\d,]+ values are not exactly whole") as error:
        decide_scale(scan, "auto", Path("x"))
    assert "--counts raw" in str(error.value) and "numpy.log" not in str(error.value)
    assert decide_scale(scan, "raw", Path("x")) == "counts"


def test_cells_of_log1p_among_cells_of_counts_are_no_rounding() -> None:
    values = drawn(2) * 20
    values[7] = np.log1p(normalised(values[7:8], 1e4))
    with pytest.raises(InputError, match="mixes scales"):
        decide_scale(scanned(values), "auto", Path("x"))


def test_counts_corrected_for_ambient_rna_are_called_so_and_the_option_is_named() -> None:
    rng = np.random.default_rng(0)
    values = drawn(2) * 20
    values -= rng.uniform(0, 1, values.shape) * (values > 0) * (rng.random(values.shape) < 0.4)
    with pytest.raises(
        InputError, match=r"(39|40|41)% are not whole, and cells sum to .* ambient RNA\. Pass --counts raw"
    ):
        decide_scale(scanned(values), "auto", Path("x"))
    assert decide_scale(scanned(values), "raw", Path("x")) == "counts"


@pytest.mark.parametrize("total", [1, 1e4, 1e6])
def test_values_normalised_without_log_are_no_log1p(total: float) -> None:
    with pytest.raises(InputError, match=rf"sum to {total:,.0f} in each cell: no log\. Pass --counts raw"):
        decide_scale(scanned(normalised(drawn(2), total)), "auto", Path("x"))


@pytest.mark.parametrize(
    ("case", "layer", "words"),
    [
        ("labels_scales_genes/06-scaled-raw/s02_scaled_raw.h5ad", None, "is scaled.*--layer raw"),
        ("files/scaled_with_raw.h5ad", None, "is scaled.*--layer raw"),
        ("labels_scales_genes/06-scaled-raw/s02_scaled_raw.h5ad", "raw", "log1p of counts normalised to 10,000"),
        ("files/scaled_with_raw.h5ad", "raw", "log1p of values whose sums differ"),
        ("labels_scales_genes/08-log1p-scales/s11_1e6.h5ad", None, "log1p of CPM, counts normalised to 1,000,000"),
        ("labels_scales_genes/10-delta-prediction/e_delta.h5ad", None, "2,097 values below zero"),
    ],
)
def test_the_cases_are_what_they_are(shared_cases: Path, case: str, layer: str | None, words: str) -> None:
    path = shared_cases / case
    with CellFile(path, layer) as file:
        scan = scan_file(file)
        if layer == "raw" or "1e6" in case:
            assert decide_scale(scan, "auto", path, file.choices) == "log1p"
            assert re.match(words, str(scan.normalisation))
        else:
            with pytest.raises(InputError, match=words):
                decide_scale(scan, "auto", path, file.choices)


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


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64, np.float32])
def test_total_counts_are_exact_in_every_type(dtype: type[np.generic]) -> None:
    dense = np.zeros((6, 70_000), np.int64)  # with cells without counts at both ends and between
    dense[1, :3], dense[3], dense[4, 7] = [0, 30_000, 5], 30_000, 1
    rows = sp.csr_matrix(dense.astype(dtype))
    assert total_counts(rows).tolist() == dense.sum(1).tolist()
    assert total_counts(rows[:1]).tolist() == [0] and total_counts(rows[:0]).shape == (0,)


def test_another_base_of_logarithms_is_believed_where_the_file_says_it(tmp_path: Path) -> None:
    """Of some genes of a cell its sums do not tell it: scanpy.pp.log1p(adata, base=2) writes it into uns."""
    some = np.log2(1 + normalised(drawn(3), 1e4))[:, ::3].astype(np.float32)
    for base, said in ((2, "logarithms of base 2, as its uns"), (None, ""), (float(np.e), ""), ("2", ""), (0, "")):
        adata = ad.AnnData(some, uns={"log1p": {"base": base}}, layers={"other": some})
        adata.write_h5ad(tmp_path / "c.h5ad")
        for path in (tmp_path / "c.h5ad", as_zarr(tmp_path / f"{base}.zarr", adata, "zarr3")):
            for layer in (None, "other"):
                with CellFile(path, layer) as file:
                    given = scan_file(file), "auto", path, (), file.log_base
                    if said and layer is None:
                        with pytest.raises(InputError, match=rf"{said}.*numpy.log\(2\).*--counts log1p"):
                            decide_scale(*given)
                        assert decide_scale(given[0], "log1p", *given[2:]) == "log1p"
                    else:
                        assert decide_scale(*given) == "log1p"
