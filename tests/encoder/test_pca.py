"""encoder/pca.py: the PCA is NumPy's SVD, whatever the blocks; of counts it is that of log1p of counts per 10,000."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sest.encoder.pca
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from sest.cells.inputs import Cells
from sest.encoder.pca import PcaEncoder, Projection, common_genes, fit_pca, hash_names, name_genes, name_genes_as
from sest.errors import InputError
from sest.progress import reporting

Opened = Callable[..., list[Cells]]

SPREAD = np.array([9.0, 6.0, 4.0, 2.5, 1.5, 1.0, 0.5, 0.2])  # standard deviations: well apart, so vectors are stable


def spread(n: int = 300, seed: int = 0) -> np.ndarray:
    """(n, 8) float32 rows far from zero, with directions that are not the axes."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    return ((rng.normal(size=(n, 8)) * SPREAD) @ rotation.T + rng.normal(size=8) * 20).astype(np.float32)


def test_projection_equals_numpys_svd_up_to_sign() -> None:
    x = spread()
    found = fit_pca([x], 5)
    centred = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.explained_variance, (s**2 / (s**2).sum())[:5], rtol=1e-6)
    signs = np.sign((found.basis * vt[:5].T).sum(0))
    # stored as float32: 6e-8 of numbers up to 1
    np.testing.assert_allclose(found.basis, vt[:5].T * signs, atol=1e-6)
    # x is up to 60 and stored with 24 bits: 4e-6 each
    np.testing.assert_allclose(found.apply(x), centred @ vt[:5].T * signs, atol=5e-5)
    assert found.basis.dtype == found.mean.dtype == found.apply(x).dtype == np.float32


def test_projection_does_not_depend_on_the_blocks_or_the_order_of_cells() -> None:
    x = spread()
    whole = fit_pca([x], 8)
    shuffled = x[np.random.default_rng(1).permutation(len(x))]
    empty = np.zeros((0, 8), np.float32)  # a file without sampled cells
    for blocks in (
        [x[:1], x[1:7], x[7:]],
        [empty, x[:100], empty, x[100:]],
        [shuffled],
        [shuffled[:17], shuffled[17:]],
    ):
        other = fit_pca(blocks, 8)
        np.testing.assert_allclose(other.basis, whole.basis, atol=1e-6)  # float32
        np.testing.assert_allclose(other.mean, whole.mean, rtol=1e-6)


def test_every_component_points_to_its_largest_entry() -> None:
    basis = fit_pca([spread()], 8).basis
    assert (basis[np.abs(basis).argmax(0), np.arange(8)] > 0).all()
    np.testing.assert_array_equal(fit_pca([-spread()], 8).basis.argmax(0), basis.argmax(0))  # also of mirrored cells


def test_width_is_the_rank_where_none_is_asked_and_never_more() -> None:
    flat = spread(40)
    flat[:, 5:] = flat[:, :3] @ np.ones((3, 3), np.float32)  # 3 columns follow from others, up to float32 rounding
    assert fit_pca([flat.round()], None).basis.shape == (8, 6)  # exact in float32: five free columns and one sum
    assert fit_pca([spread(5)], None).basis.shape == (8, 4)  # n cells span n - 1 directions
    assert fit_pca([spread()], None, at_most=3).basis.shape == (8, 3)
    assert fit_pca([spread()], 3, at_most=2).basis.shape == (8, 3)  # asked for: at_most is only the default


def test_a_direction_of_a_thousandth_of_the_spread_is_structure_and_one_of_rounding_is_not() -> None:
    x = np.random.default_rng(0).normal(size=(300, 4))
    assert fit_pca([x * [1, 1, 1, 1e-3]], None).basis.shape == (4, 4)
    assert fit_pca([x * [1, 1, 1, 1e-6]], None).basis.shape == (4, 3)


@pytest.mark.parametrize(
    ("blocks", "dim", "message"),
    [
        ([spread(5)], 5, r"--dim 5 is above the rank of the data \(4, from 5 cells\). Use --dim 4 or less."),
        ([spread()], 9, "above the rank of the data"),
        ([np.full((50, 8), 3.3, np.float32)], None, "all sampled cells are the same"),
        ([np.zeros((50, 8), np.float32)], 1, "all sampled cells are the same"),
        ([spread(1)], 1, "at least two cells"),
        ([], None, "at least two cells"),
        ([np.zeros((0, 8), np.float32)], None, "at least two cells"),
    ],
)
def test_what_has_no_pca_is_refused(blocks: list[np.ndarray], dim: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_pca(blocks, dim)


def test_the_hash_knows_mean_and_basis() -> None:
    projection = fit_pca([spread()], 4)
    assert projection.sha256 == Projection(**projection.arrays()).sha256
    for name in ("mean", "basis"):
        changed = {key: value.copy() for key, value in projection.arrays().items()}
        changed[name].flat[0] += 1
        assert Projection(**changed).sha256 != projection.sha256


# --- the encoder


def shared(cells: Sequence[Cells]) -> list[str]:
    return common_genes(cells, name_genes(cells, None))


def everything(cells: Sequence[Cells]) -> list[np.ndarray]:
    return [np.arange(c.file.n_cells) for c in cells]


def fitted(cells: Sequence[Cells], dim: int) -> PcaEncoder:
    """An encoder of the files' common genes, fitted on all their cells."""
    names = name_genes(cells, None)
    encoder = PcaEncoder(common_genes(cells, names), names)
    encoder.prepare(cells, everything(cells), dim, dim)
    return encoder


def encoded(encoder: PcaEncoder, cells: Cells) -> np.ndarray:
    """The projected rows of a whole file."""
    numbers = np.arange(cells.file.n_cells)
    assert encoder.fitted is not None
    return encoder.fitted.apply(encoder.encode(cells, cells.read(numbers), numbers))


def normalised(values: np.ndarray) -> np.ndarray:
    """Counts (n, G) as log1p of counts per 10,000; an empty cell stays empty."""
    total = values.sum(1, keepdims=True, dtype=np.float64)
    return np.log1p(values * np.divide(1e4, total, out=np.zeros_like(total), where=total > 0))


def svd_scores(x: np.ndarray, dim: int) -> np.ndarray:
    """PCA by NumPy's SVD, every component pointing to its largest entry."""
    centred = x - x.mean(0)
    vt = np.linalg.svd(centred, full_matrices=False)[2][:dim]
    return centred @ (vt * np.sign(vt[np.arange(dim), np.abs(vt).argmax(1)])[:, None]).T


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_counts_are_normalised_and_log1p_values_used_as_they_are(tmp_path: Path, opened: Opened, scale: str) -> None:
    values = counts() if scale == "counts" else normalised(counts()).astype(np.float32)
    cells = opened(write_cells(tmp_path / "a.h5ad", values))
    assert cells[0].scale == scale
    expected = svd_scores(normalised(values) if scale == "counts" else values.astype(np.float64), 4)
    # values up to 8 in float32, scores up to 15
    np.testing.assert_allclose(encoded(fitted(cells, 4), cells[0]), expected, atol=2e-5)


def test_native_rows_are_log1p_of_counts_per_ten_thousand_and_an_empty_cell_is_zero(
    tmp_path: Path, opened: Opened
) -> None:
    values = counts()
    cells = opened(write_cells(tmp_path / "a.h5ad", values))
    rows = PcaEncoder(gene_names(30)).encode(cells[0], cells[0].read(np.arange(40)), np.arange(40))
    np.testing.assert_allclose(rows, normalised(values), rtol=1e-6)  # float32
    assert (rows[1] == 0).all()


def test_the_most_variable_genes_are_kept_where_there_are_too_many(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sest.encoder.pca, "PCA_GENES", 12)
    monkeypatch.setattr(sest.encoder.pca, "ROWS_PER_BLOCK", 7)  # variances add up over blocks
    values = normalised(counts()).astype(np.float32)
    cells = opened(write_cells(tmp_path / "a.h5ad", values))
    assert PcaEncoder(gene_names(30)).native_dim == 12
    encoder = fitted(cells, 3)
    kept = np.sort(np.argsort(-values.var(0, dtype=np.float64), kind="stable")[:12])
    assert encoder.projection_attributes() == {"genes": [f"G{i}" for i in kept]}
    np.testing.assert_allclose(encoded(encoder, cells[0]), svd_scores(values[:, kept].astype(float), 3), atol=2e-5)


def test_several_files_are_encoded_by_the_genes_they_share_by_name(tmp_path: Path, opened: Opened) -> None:
    names, values = gene_names(30), counts()
    order = np.random.default_rng(0).permutation(30)
    one = write_cells(tmp_path / "a.h5ad", values[:25])
    other = write_cells(tmp_path / "b.h5ad", values[25:][:, order], var=pd.DataFrame(index=np.array(names)[order]))
    both, whole = opened(one, other), opened(write_cells(tmp_path / "ab.h5ad", values))
    found = fitted(both, 4)
    parts = np.concatenate([encoded(found, c) for c in both])
    np.testing.assert_allclose(parts, encoded(fitted(whole, 4), whole[0]), atol=2e-5)


def test_genes_that_not_all_files_have_are_left_out_and_said(tmp_path: Path, opened: Opened) -> None:
    one = write_cells(tmp_path / "a.h5ad", counts())
    other = write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[f"G{i}" for i in range(10, 40)]))
    third = write_cells(tmp_path / "c.h5ad", counts(), var=pd.DataFrame(index=[f"H{i}" for i in range(30)]))
    cells, notes = opened(one, other, third), Notes()
    with reporting(notes):
        assert shared(cells[:2]) == [f"G{i}" for i in range(10, 30)]
        assert shared(cells[:1]) == gene_names(30)
    assert notes.notes == ["The PCA uses the 20 genes that all files have."]
    with pytest.raises(InputError, match=r"no gene in common: a.h5ad has G0, G1, G2.* c.h5ad has "):
        shared([cells[0], cells[2]])


def test_a_stored_pca_encodes_new_cells_as_it_did_the_first(tmp_path: Path, opened: Opened) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    encoder = fitted(cells, 4)
    assert encoder.fitted is not None
    again = PcaEncoder.from_projection(encoder.projection_attributes()["genes"], encoder.fitted)
    np.testing.assert_array_equal(encoded(again, cells[0]), encoded(encoder, cells[0]))


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
    with pytest.raises(InputError, match=r"lacks 1 of the 2 genes of the PCA: X. Its genes are G0, G1, G2; tried"):
        name_genes_as(cells, ["G1", "X"], "the PCA", None)
    rows = opened(write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[str(i) for i in range(30)])))
    with pytest.raises(InputError, match="does not name its genes"):
        name_genes_as(rows, ["0", "1"], "the PCA", None)
    assert name_genes_as(rows, ["0", "1"], "the PCA", "index")["b"][1] == "1"
