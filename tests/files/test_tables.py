"""obs and var are what AnnData reads in every layout; what is no column is named, and harmless where nobody asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from helpers.damaged_h5ad import as_anndata_07, check_refused, counts, edit, replace, strings, write
from helpers.old_layouts import as_anndata_06, as_seuratdisk, with_attributes_of_one_element
from helpers.zarr_cells import as_zarr
from sest.errors import InputError
from sest.files.cell_file import CellFile

OUTSIDE = np.array(["/X/data"], dtype=object)


def same(mine: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Values and names agree; which of the types for text pandas uses does not matter."""
    assert list(mine.columns) == list(theirs.columns)
    assert list(mine.index) == list(theirs.index)
    for name in mine:
        a, b = (frame[name].astype(object).where(frame[name].notna(), None) for frame in (mine, theirs))
        assert a.tolist() == b.tolist(), name


def every_kind(n: int) -> pd.DataFrame:
    """A column of every type that AnnData writes."""
    rows = np.arange(n)
    return pd.DataFrame(
        {
            "category": pd.Categorical(np.array(["b", "ä", "c"])[rows % 3]),
            "missing": pd.Categorical([None if i % 4 == 0 else "x" for i in rows]),
            "numbers": pd.Categorical(rows % 3),
            "text": [f"t{i % 5}" for i in rows],
            "whole": rows,
            "fraction": rows / 3,
            "flag": rows % 2 == 0,
            "nullable": pd.array([None if i % 3 == 0 else i for i in rows], dtype="Int64"),
            "perhaps": pd.array([None if i % 3 == 0 else bool(i % 2) for i in rows], dtype="boolean"),
        },
        index=[f"cell{i}" for i in rows],
    )


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_obs_and_var_are_what_anndata_reads(tmp_path: Path, suffix: str) -> None:
    values, path = counts(), tmp_path / f"a{suffix}"
    var = pd.DataFrame({"gene_name": [f"N{i}" for i in range(31)]}, index=[f"G{i}" for i in range(31)])
    adata = ad.AnnData(values, obs=every_kind(53), var=var)
    adata.write_h5ad(path) if suffix == ".h5ad" else as_zarr(path, adata, "zarr3")
    truth = ad.read_h5ad(path) if suffix == ".h5ad" else ad.read_zarr(path)
    with CellFile(path) as file:
        same(file.obs.frame(), truth.obs)
        same(file.var, truth.var)
        assert len(file.obs) == 53
        assert "text" in file.obs


def test_cell_names_may_repeat(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        strings(file["obs/_index"])[1] = "cell0"
    with CellFile(path) as file:
        assert file.obs.index[:3].tolist() == ["cell0", "cell0", "cell2"]


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_a_file_of_anndata_06_is_what_anndata_reads(tmp_path: Path) -> None:
    values = counts()
    path = as_anndata_06(tmp_path / "a.h5ad", values, raw=True)
    truth = ad.read_h5ad(path)
    with CellFile(path) as file:
        same(file.obs.frame(), truth.obs)
        same(file.var, truth.var)
        assert file.obs["target_gene"].tolist()[:4] == ["control", "STAT1", "JAK2", "control"]
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), truth.X.toarray())
        assert file.choices == ("raw",)
    with CellFile(path, "raw") as file:
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), truth.raw.X.toarray())


def test_categories_of_anndata_07_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    as_anndata_07(path)
    with h5py.File(path, "r+") as file:
        file.move("obs/__categories/target_gene", "elsewhere")  # only the reference leads there
        del file["obs/__categories"]
    with CellFile(path) as file:
        assert file.obs["target_gene"].tolist()[:3] == ["control", "STAT1", "control"]


def test_categories_of_seuratdisk_are_labels_and_not_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    as_seuratdisk(path)
    with CellFile(path) as file:
        assert file.obs["target_gene"].tolist()[:3] == ["control", "STAT1", "control"]
        assert "__categories" not in file.obs


def test_attributes_of_one_element_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    truth = ad.read_h5ad(path)
    with_attributes_of_one_element(path)
    with CellFile(path) as file:
        same(file.obs.frame(), truth.obs)
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts())


def test_a_column_whose_name_has_a_slash_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        file["obs/a/b"] = np.arange(53)
        file["obs"].attrs["column-order"] = [*file["obs"].attrs["column-order"], "a/b"]
    with CellFile(path) as file:
        assert file.obs["a/b"].tolist() == list(range(53))


def as_table(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        replace(file["obs"], "n", np.ones((53, 2)))


def as_latin1(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        replace(file["obs"], "n", np.array(["é".encode("latin-1")] * 53))


def categories_twice(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        replace(file["obs/target_gene"], "categories", np.array([b"a", b"a"]))


def old_reference_to_external_storage(path: Path) -> None:
    as_anndata_07(path)
    with h5py.File(path, "r+") as file:
        outside = file.create_dataset("elsewhere", (2,), "S4", external=[(str(path.with_name("elsewhere")), 0, 8)])
        file["obs/target_gene"].attrs["categories"] = outside.ref
        del file["obs/__categories"]


def old_categories_by_name(path: Path) -> None:
    as_anndata_07(path)
    with h5py.File(path, "r+") as file:
        file["obs/target_gene"].attrs["categories"] = "/uns/elsewhere"
        del file["obs/__categories"]


def too_large(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["obs/n"]
        file["obs"].create_dataset("n", (2**40,), "f8", chunks=(1024,))


# what is done to a sound file, and what the one line must say
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "column outside obs": (edit(lambda f: f["obs"].attrs.create("column-order", OUTSIDE)), "columns outside itself"),
    "index outside obs": (edit(lambda f: f["obs"].attrs.create("_index", "/X/indptr")), "has no index '/X/indptr'"),
    "reference outside": (old_reference_to_external_storage, "elsewhere is stored in another file"),
    "categories by name": (old_categories_by_name, "names its categories"),
    "categories twice": (categories_twice, "'target_gene' that cannot be read: ValueError: .*unique"),
    "sparse column": (edit(lambda f: f["obs/n"].attrs.modify("encoding-type", "csr_matrix")), "no column of labels"),
    "newer encoding": (edit(lambda f: f["obs/n"].attrs.modify("encoding-version", "9.9")), "newer than this sest"),
    "column too short": (edit(lambda f: replace(f["obs"], "n", np.arange(5))), "'n' of 5 rows, but 53 rows"),
    "column too large": (too_large, "too large for a column"),
    "column that is a table": (as_table, r"/obs/n is a table of shape \(53, 2\)"),
    "column in latin-1": (as_latin1, "column 'n' that cannot be read: UnicodeDecodeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_is_not_sound_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    check_refused(tmp_path / "a.h5ad", *REFUSED[name])


@pytest.mark.parametrize("damage", [as_table, as_latin1])
def test_a_column_that_nobody_asks_for_does_no_harm(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    damage(path)
    with CellFile(path) as file:
        assert set(file.obs.columns) == {"target_gene", "n"}
        assert file.obs["target_gene"].nunique() == 2
        with pytest.raises(InputError, match="obs"):
            file.obs["n"]


def test_an_odd_column_of_var_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.h5ad", counts())
    with h5py.File(path, "r+") as file:
        file["var/odd"] = np.ones((31, 2))
        file["var"].attrs["column-order"] = ["odd"]
    with CellFile(path) as file:
        assert list(file.var.columns) == []
    assert "/var/odd is a table of shape (31, 2)" in caplog.text
    assert "It is left out." in caplog.text
