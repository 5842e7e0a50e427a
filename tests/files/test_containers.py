"""Cells are read alike from HDF5 and Zarr of every kind and from MuData; what leads out of a Zarr store is refused."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numcodecs
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from helpers.damaged_h5ad import FORMS, counts, write
from helpers.zarr_cells import KINDS, as_zarr, settings
from sest.cells.scale import scan_file
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.files.containers import files_in, stem_of


def test_cells_that_others_in_this_process_have_open_are_read(tmp_path: Path) -> None:
    """A notebook with the same file backed, before and after; HDF5 wants one kind of locking for both."""
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()))
    backed = ad.read_h5ad(path, backed="r")
    with CellFile(path) as file:
        assert np.array_equal(file.rows(0, 5).toarray(), counts()[:5])
        assert ad.read_h5ad(path).n_obs == len(counts())
    backed.file.close()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_zarr_is_what_anndata_reads(tmp_path: Path, kind: str, form: str) -> None:
    values = counts()
    adata = ad.read_h5ad(write(tmp_path / "a.h5ad", FORMS[form](values), layers={"double": FORMS[form](values * 2)}))
    path = as_zarr(tmp_path / "a.zarr", adata, kind)
    with CellFile(path) as file, CellFile(tmp_path / "a.h5ad") as plain:
        rng = np.random.default_rng(1)
        for _ in range(15):
            start, stop = sorted(rng.integers(0, len(values) + 1, 2))
            assert np.array_equal(file.rows(start, stop).toarray(), values[start:stop])
        assert scan_file(file).sha256 == scan_file(plain).sha256
        assert file.obs.frame().equals(plain.obs.frame())
        assert file.layers == ("double",)
    with CellFile(path, "double") as file:
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), 2 * values)


def mudata_of(path: Path, *names: str) -> Path:
    """MuData with modalities of the same cells, as mudata writes it; the values of modality i are times i + 1."""
    with settings(3), ExitStack() as stack:
        root: Any = (
            zarr.open_group(path, mode="w") if path.suffix == ".zarr" else stack.enter_context(h5py.File(path, "w"))
        )
        root.create_group("mod")
        for i, name in enumerate(names):
            adata = ad.read_h5ad(write(path.with_name(f"{name}.h5ad"), sp.csr_matrix(counts() * (i + 1))))
            ad.io.write_elem(root["mod"], name, adata)
        root.attrs["encoding-type"] = "MuData"
    return path


@pytest.mark.parametrize("suffix", [".h5mu", ".h5", ".zarr"])
def test_a_modality_of_mudata_is_read(tmp_path: Path, suffix: str) -> None:
    path = mudata_of(tmp_path / f"a{suffix}", "prot", "rna")
    with CellFile(path, modality="rna") as file:
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts() * 2)
    with pytest.raises(InputError, match=r"several modalities: prot, rna\. Choose one with --modality"):
        CellFile(path)
    with pytest.raises(InputError, match=r"no modality 'atac'\. There are: prot, rna"):
        CellFile(path, modality="atac")
    with CellFile(mudata_of(tmp_path / f"b{suffix}", "rna")) as file:
        np.testing.assert_array_equal(file.rows(0, 53).toarray(), counts())


def test_a_modality_of_a_file_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no MuData file: it has no modality 'rna'\. Leave --modality out"):
        CellFile(write(tmp_path / "a.h5ad", counts()), modality="rna")


def sound_zarr(path: Path, kind: str = "zarr3") -> Path:
    return as_zarr(path, ad.read_h5ad(write(path.with_suffix(".h5ad"), sp.csr_matrix(counts()))), kind)


@pytest.mark.parametrize("codec", ["pickle", "json2"])
def test_a_codec_that_could_run_code_is_refused_before_it_decodes(tmp_path: Path, codec: str) -> None:
    path = sound_zarr(tmp_path / "a.zarr", "zarr2")
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    column = np.array(["control"] * 53, dtype=object)
    del group["obs/n"]
    group.create_array("obs/n", shape=(53,), dtype="str", filters=[numcodecs.VLenUTF8()])[:] = column
    for name in (".zarray", "../../.zmetadata"):
        file = path / "obs" / "n" / name
        if file.exists():
            file.write_text(file.read_text().replace("vlen-utf8", codec))
    with CellFile(path) as cells, pytest.raises(InputError, match=f"codec {codec!r}, which is not read|cannot be read"):
        cells.obs["n"]


def test_a_link_in_a_zarr_store_is_refused(tmp_path: Path) -> None:
    path = sound_zarr(tmp_path / "a.zarr")
    chunk = next(part for part in (path / "X" / "data").rglob("*") if part.is_file() and part.name != "zarr.json")
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link, which is not followed"):
        CellFile(path)


def test_a_damaged_chunk_is_one_line(tmp_path: Path) -> None:
    path = sound_zarr(tmp_path / "a.zarr")
    chunk = next(part for part in (path / "X" / "data").rglob("*") if part.is_file() and part.name != "zarr.json")
    chunk.write_bytes(b"nonsense")
    with CellFile(path) as file, pytest.raises(InputError, match=r"a\.zarr cannot be read; is it damaged") as caught:
        file.rows(0, 53)
    assert "\n" not in str(caught.value)


def test_a_zarr_store_of_something_else_is_called_what_it_is(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w").create_array("x", data=np.arange(3))
    (tmp_path / "a.zarr" / "notes.txt").touch()  # zarr warns of what it does not know, which would fail this test
    with pytest.raises(InputError, match=r"is no Zarr store with cells: it has no obs, var; it has x\."):
        CellFile(tmp_path / "a.zarr")


def test_files_of_a_folder_and_names_without_endings(tmp_path: Path) -> None:
    for name in ("b.h5ad", "a.zarr.zip", "._b.h5ad", "c.txt", "d.h5mu"):
        (tmp_path / name).touch()
    assert [path.name for path in files_in(tmp_path)] == ["a.zarr.zip", "b.h5ad", "d.h5mu"]
    assert [stem_of(Path(name)) for name in ("x/a.b.h5ad", "a.zarr.zip", "a.zarr", "a.dat", "a")] == [
        "a.b", "a", "a", "a", "a"
    ]  # fmt: skip
