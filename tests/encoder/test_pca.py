"""encoder/pca.py: the PCA is NumPy's SVD, whatever the blocks; of counts it is that of log1p of counts per 10,000."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sest.encoder.genes
import sest.encoder.pca
from helpers.fitted_pca import fitted
from helpers.h5ad_files import counts, gene_names, write_cells
from sest.cells.inputs import Cells
from sest.encoder.pca import PcaEncoder

Opened = Callable[..., list[Cells]]


# --- the encoder


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
    monkeypatch.setattr(sest.encoder.genes, "ROWS_PER_BLOCK", 7)  # variances add up over blocks
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


def test_a_stored_pca_encodes_new_cells_as_it_did_the_first(tmp_path: Path, opened: Opened) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    encoder = fitted(cells, 4)
    assert encoder.fitted is not None
    again = PcaEncoder.from_projection(encoder.projection_attributes()["genes"], encoder.fitted)
    np.testing.assert_array_equal(encoded(again, cells[0]), encoded(encoder, cells[0]))
