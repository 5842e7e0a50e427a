"""files/obsm.py: an entry of obsm with a row for every cell, read by rows in every form."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from helpers.damaged_h5ad import counts, write
from sest.errors import InputError
from sest.files.cell_file import CellFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(counts()))
    adata = ad.read_h5ad(path)
    adata.obsm["X_a"], adata.obsm["X_sparse"] = counts(53, 4), sp.csc_matrix(counts(53, 6))
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize(("key", "width"), [("X_a", 4), ("X_sparse", 6)])
def test_rows_are_those_that_anndata_reads(path: Path, key: str, width: int) -> None:
    with CellFile(path) as file:
        entry = file.embedding(key)
        assert entry.shape == (53, width)
        for start, stop in ((0, 53), (7, 20), (52, 53)):
            np.testing.assert_array_equal(entry.dense(start, stop), counts(53, width)[start:stop])


def test_what_is_no_embedding_is_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["obsm/short"], file["obsm/flat"], file["obsm/text"] = np.ones((5, 2)), np.ones(53), np.array([[b"x"]] * 53)
        file["obsm/link"] = h5py.ExternalLink("elsewhere.h5", "x")
    with CellFile(path) as cells:
        for key, words in (
            ("short", r"/obsm/short has shape \(5, 2\); an embedding has a row for each of the 53 cells"),
            ("flat", r"/obsm/flat has shape \(53,\)"),
            ("text", "expected numbers"),
            ("link", "as a link, which is not followed"),
            ("X_b", r"no obsm 'X_b'\. There are: X_a, X_sparse, flat"),
        ):
            with pytest.raises(InputError, match=words):
                cells.embedding(key)
