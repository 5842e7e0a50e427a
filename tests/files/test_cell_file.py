"""Rows of an .h5ad are canonical whatever is asked, and a file that is not sound is refused and closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from helpers.damaged_h5ad import FORMS, check_refused, counts, edit, replace, set_value, strings, write
from sest.cells.scale import scan_file
from sest.errors import InputError
from sest.files.cell_file import CellFile


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS)
def test_rows_can_be_asked_in_any_order(tmp_path: Path, form: str) -> None:
    values = counts()
    rng = np.random.default_rng(1)
    with CellFile(write(tmp_path / "a.h5ad", FORMS[form](values))) as file:
        for _ in range(15):
            start, stop = sorted(rng.integers(0, len(values) + 1, 2))
            assert np.array_equal(file.rows(start, stop).toarray(), values[start:stop])


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


# --- what is refused


def raw_only(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("X", "raw/X")
        file.copy("var", "raw/var")


def layers_only(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("X", "layers/counts")


def repeat_an_index(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["X/indices"][1] = file["X/indices"][0]


# what is done to a sound CSR file (53 cells, 31 genes), and what the one line must say
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no X but raw": (raw_only, r"no X.*raw/X: pass --layer raw"),
    "no X but layers": (layers_only, r"no X\. Pass --layer with one of its layers: counts"),
    "layers no group": (edit(lambda f: replace(f, "layers", np.zeros(3))), "/layers is not a group of layers"),
    "X without its form": (edit(lambda f: f["X"].attrs.pop("encoding-type")), "X is stored as ''; expected csr_matrix"),
    "a table that is an array": (edit(lambda f: replace(f, "var", np.zeros(31))), "/var is no table"),
    "more genes than var": (
        edit(lambda f: f["X"].attrs.modify("shape", [53, 40])),
        "var has 31 genes, but the values are of 40",
    ),
    "fewer cells than X": (
        edit(lambda f: replace(f["obs"], "_index", strings(f["obs/_index"])[:-1])),
        "obs has 52 cells",
    ),
    "NaN": (set_value("X/data", 0, np.nan), r"NaN or an infinite value in cell 'cell1' \(row 1\), gene 'G"),
    "inf": (set_value("X/data", 0, np.inf), r"NaN or an infinite value in cell 'cell1'"),
    "index twice": (repeat_an_index, r"a value twice in cell 'cell1' \(row 1\), gene 'G"),
    "gene names twice": (set_value("var/_index", 1, "G0"), r"1 gene names more than once in var: G0\..*make_unique"),
}


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_an_unsound_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path / "a.h5ad", *REFUSED[name])


@pytest.mark.parametrize("form", ["csc", "dense"])
def test_nan_is_named_by_its_first_cell_in_every_form(tmp_path: Path, form: str) -> None:
    values = counts()
    values[7, 30] = values[9, 2] = np.nan
    path = write(tmp_path / "a.h5ad", FORMS[form](values))
    with CellFile(path) as file, pytest.raises(InputError, match=r"cell 'cell7' \(row 7\), gene 'G30'"):
        scan_file(file)


def test_a_value_too_large_for_float32_is_refused(tmp_path: Path) -> None:
    values = counts().astype(np.float64)
    values[4, 2] = 1e300
    with CellFile(write(tmp_path / "a.h5ad", values)) as file, pytest.raises(InputError, match="infinite value"):
        scan_file(file)


def test_a_file_without_cells_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty: 0 cells x 5 genes"):
        CellFile(write(tmp_path / "a.h5ad", sp.csr_matrix((0, 5), dtype=np.float32)))
    (tmp_path / "cells.zarr").mkdir()
    with pytest.raises(InputError, match=r"a folder, neither an \.h5ad file nor a Zarr store: it is empty"):
        CellFile(tmp_path / "cells.zarr")
    (tmp_path / "cells.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(InputError, match=r"is no Zarr store with cells: it has no obs, var; it has \(none\)"):
        CellFile(tmp_path / "cells.zarr")


def test_raw_is_read_with_its_own_genes_unless_a_layer_has_its_name(tmp_path: Path) -> None:
    adata = ad.AnnData(counts(), var=pd.DataFrame(index=[f"G{i}" for i in range(31)]))
    adata.raw = adata
    adata = adata[:, :20].copy()
    adata.X = adata.X - 0.5
    adata.write_h5ad(tmp_path / "a.h5ad")
    with CellFile(tmp_path / "a.h5ad") as file:
        assert (file.n_genes, file.layers, file.choices) == (20, (), ("raw",))
    with CellFile(tmp_path / "a.h5ad", "raw") as file:
        assert list(file.var.index) == [f"G{i}" for i in range(31)]
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts())
    adata.layers["raw"] = adata.X * 2
    adata.write_h5ad(tmp_path / "b.h5ad")
    with CellFile(tmp_path / "b.h5ad", "raw") as file:
        assert (file.n_genes, file.choices) == (20, ("raw",))
    with CellFile(write(tmp_path / "c.h5ad", counts())) as file:
        assert file.choices == ()
    with pytest.raises(InputError, match=r"no layer 'raw'\. Layers: X"):
        CellFile(tmp_path / "c.h5ad", "raw")


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()))
    raw_only(path)
    with pytest.raises(InputError, match="no X"):
        CellFile(path)
    with h5py.File(path, "r+") as file:  # HDF5 refuses to write to a file that is open for reading
        assert "raw" in file
