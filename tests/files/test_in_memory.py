"""Cells in memory as a file: the same cells, the caller's object untouched, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.files.in_memory import file_of


def cells() -> ad.AnnData:
    """Six cells of three genes, with a layer, an embedding and labels as text."""
    counts = scipy.sparse.csr_matrix(np.arange(18, dtype=np.float32).reshape(6, 3) % 5)
    adata = ad.AnnData(counts, obs=pd.DataFrame({"gene": list("ababab")}, index=[f"c{i}" for i in range(6)]))
    adata.layers["umi"] = 2 * counts
    adata.layers["other"] = 3 * counts
    adata.obsm["X_pca"] = np.zeros((6, 2))
    adata.uns["sest"], adata.uns["mine"] = {"seed": 1}, "text"
    return adata


def test_a_path_is_given_back_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    path.write_text("anything")
    with file_of(str(path), "real", None) as file:
        assert file == path
    assert path.read_text() == "anything"


@pytest.mark.parametrize("layer", [None, "umi"])
def test_the_file_has_what_is_read_of_the_cells_and_goes_afterwards(layer: str | None) -> None:
    adata, before = cells(), cells()
    with file_of(adata, "real", layer) as path, CellFile(path, layer) as file:
        assert path.name == "real.h5ad"
        np.testing.assert_array_equal(file.rows(0, 6).toarray(), (2 if layer else 1) * before.X.toarray())
        stored = ad.read_h5ad(path)
        assert [key for key in stored.layers if key is not None] == ([layer] if layer else []) and list(
            stored.obsm
        ) == []
        assert list(stored.uns) == ["sest"] and list(stored.obs["gene"]) == list("ababab")
    assert not path.parent.exists()
    assert adata.obs["gene"].dtype == before.obs["gene"].dtype and set(adata.layers) - {None} == {"umi", "other"}


def test_raw_is_written_where_it_is_read() -> None:
    adata = cells()
    adata.raw = adata
    adata = adata[:, :2].copy()
    with file_of(adata, "real", "raw") as path, CellFile(path, "raw") as file:
        np.testing.assert_array_equal(file.rows(0, 6).toarray(), cells().X.toarray())
    with file_of(adata, "real", None) as path, CellFile(path) as file:
        assert file.choices == ()


def test_views_and_backed_cells_are_written_too(tmp_path: Path) -> None:
    cells().write_h5ad(tmp_path / "x.h5ad")
    for some, n in ((cells()[::2], 3), (ad.read_h5ad(tmp_path / "x.h5ad", backed="r"), 6)):
        with file_of(some, "real", None) as path:
            assert ad.read_h5ad(path).n_obs == n


def test_what_cannot_be_a_file_is_one_line() -> None:
    odd = cells()
    odd.obs["when"] = pd.to_datetime("2020-01-01")
    for given, layer, message in (
        (np.zeros((2, 2)), None, r"^The new cells are of type ndarray; pass a path or an AnnData\.$"),
        (cells(), "counts", r"^The new cells have no layer 'counts'\. There are: umi, other\.$"),
        (odd, None, r"^The new cells cannot be written as an \.h5ad: .*Datetime"),
    ):
        with pytest.raises(InputError, match=message), file_of(given, "new", layer):
            pass


def test_memory_that_runs_out_is_not_called_a_fault_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ad.AnnData, path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(ad.AnnData, "write_h5ad", full)
    with pytest.raises(MemoryError), file_of(cells(), "new", None):
        pass
