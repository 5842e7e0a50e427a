"""sest/encoder/align.py: the genes of several files are aligned by name, never by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.fitted_pca import fitted, shared
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from sest.cells.inputs import Cells
from sest.encoder.align import hash_names, name_genes, name_genes_as
from sest.encoder.pca import PcaEncoder
from sest.errors import InputError
from sest.progress import reporting

Opened = Callable[..., list[Cells]]


def test_genes_that_not_all_files_have_are_left_out_and_said(tmp_path: Path, opened: Opened) -> None:
    one = write_cells(tmp_path / "a.h5ad", counts())
    other = write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[f"G{i}" for i in range(10, 40)]))
    third = write_cells(tmp_path / "c.h5ad", counts(), var=pd.DataFrame(index=[f"H{i}" for i in range(30)]))
    cells, notes = opened(one, other, third), Notes()
    with reporting(notes):
        assert shared(cells[:2]) == [f"G{i}" for i in range(10, 30)]
        assert shared(cells[:1]) == gene_names(30)
    assert notes.notes == ["20 genes are in all files, and used."]
    with pytest.raises(InputError, match=r"no gene in common: a.h5ad has G0, G1, G2.* c.h5ad has "):
        shared([cells[0], cells[2]])


def test_the_hash_of_names_knows_their_order() -> None:
    assert hash_names(["A", "B"]) == hashlib.sha256(b"A\nB").hexdigest() != hash_names(["B", "A"])
    one, other = PcaEncoder(["A", "B"]), PcaEncoder(["B", "A"])
    assert one.gene_table_sha256() == hash_names(["A", "B"]) and one.sha256 != other.sha256


def test_files_whose_index_is_row_numbers_are_aligned_by_the_column_that_names_genes(
    tmp_path: Path, opened: Opened
) -> None:
    """The same cells with their genes in opposite order."""
    values, rows = counts(), [str(i) for i in range(30)]
    symbols = pd.DataFrame({"gene_name": gene_names(30)}, index=rows)
    a = write_cells(tmp_path / "a.h5ad", values, var=symbols)
    b = write_cells(tmp_path / "b.h5ad", values[:, ::-1], var=symbols[::-1].set_index(pd.Index(rows)))
    notes = Notes()
    with reporting(notes):
        cells = opened(a, b)
        encoder = fitted(cells, 4)
    assert encoder.genes == encoder.gene_names(cells[0]) == encoder.gene_names(cells[1])[::-1] == gene_names(30)
    assert "b.h5ad: genes are named by gene_name (G29, G28, G27)." in notes.notes
    first, second = (encoder.encode(c, c.read(np.arange(40)), np.arange(40)) for c in cells)
    np.testing.assert_allclose(first, second, rtol=1e-6)
    b = write_cells(tmp_path / "c.h5ad", values, var=pd.DataFrame(index=rows))
    with pytest.raises(InputError, match=r"c\.h5ad does not name its genes.* --gene-col"):
        fitted(opened(a, b), 4)
    with reporting(notes):
        assert fitted(opened(b), 4).genes == rows
    assert "c.h5ad: its genes have no names, only numbers: no other file can be used with it." in notes.notes


def test_genes_without_a_name_of_their_own_are_never_those_of_another_file(tmp_path: Path, opened: Opened) -> None:
    names = ["", "G1", *gene_names(30)[1:29]]  # G1 twice
    var = pd.DataFrame({"symbol": names}, index=[str(i) for i in range(30)])
    files = [write_cells(tmp_path / f"{name}.h5ad", counts(), var=var) for name in "ab"]
    found = name_genes(opened(*files), None)
    assert found["a"][:3] == ["a-0", "G1-1", "G1-2"] and found["b"][:3] == ["b-0", "G1-1", "G1-2"]


def test_new_files_have_the_genes_of_a_stored_pca_by_name(tmp_path: Path, opened: Opened) -> None:
    ids = [f"ENSG{i:011d}" for i in range(30)]
    var = pd.DataFrame({"feature_name": gene_names(30)}, index=[f"{name}.3" for name in ids])
    cells = opened(write_cells(tmp_path / "a.h5ad", counts(), var=var))
    for known in (gene_names(30)[5:], ids):
        assert name_genes_as(cells, known, "the PCA", None)["a"][-1] == known[-1]
    with pytest.raises(
        InputError,
        match=r"lacks 1 of the 2 genes of the PCA: X\. Pass --missing-genes .* Its genes are G0, G1, G2; tried",
    ):
        name_genes_as(cells, ["G1", "X"], "the PCA", None)
    rows = opened(write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[str(i) for i in range(30)])))
    with pytest.raises(InputError, match="does not name its genes"):
        name_genes_as(rows, ["0", "1"], "the PCA", None)
    assert name_genes_as(rows, ["0", "1"], "the PCA", "index")["b"][1] == "1"
