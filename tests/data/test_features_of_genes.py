"""Vectors of genes from control cells: NumPy's SVD of the centred controls, whatever the order of the cells."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from sest.data.features import WIDTH, gene_loadings
from sest.data.targets import Targets
from sest.errors import InputError


def targets(values: np.ndarray) -> Targets:
    """Log1p cells (n, G) as targets."""
    x = scipy.sparse.csr_matrix(values.astype(np.float32))
    genes = tuple(f"G{i}" for i in range(values.shape[1]))
    return Targets(
        genes,
        x.indptr.astype(np.int64),
        x.indices.astype(np.uint16),
        x.data,
        np.zeros(len(values), np.float32),
        1e4,
        "log1p",
    )


def cells(n: int = 60, n_genes: int = 20, rank: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Cells of two contexts whose genes vary together in `rank` programmes; (n, G) and codes (n,)."""
    rng = np.random.default_rng(0)
    context = np.arange(n) % 2
    programmes = rng.normal(size=(n, rank)) * [3, 2, 1][:rank] @ rng.normal(size=(rank, n_genes))
    return programmes + 5 * context[:, None] + 20, context


def test_loadings_are_the_singular_vectors_of_controls_centred_by_context() -> None:
    values, context = cells()
    found = gene_loadings(targets(values), np.arange(60), context, seed=0)
    centred = values.astype(np.float32).astype(np.float64)
    for code in (0, 1):
        centred[context == code] -= centred[context == code].mean(0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    assert found.matrix.shape[0] == 20 and found.name == "genes"
    for i in range(3):
        own, other = found.matrix[:, i], vt[i] * np.sqrt(20)
        np.testing.assert_allclose(own, other * np.sign(own @ other), atol=1e-4)  # float32 cells, float64 Lanczos
        assert own[np.abs(own).argmax()] > 0
    assert np.mean(np.square(found.matrix)) == pytest.approx(1, abs=1e-5)


def test_the_order_of_cells_is_nothing_and_the_width_is_bounded() -> None:
    values, context = cells()
    order = np.random.default_rng(1).permutation(60)
    one = gene_loadings(targets(values), np.arange(60), context, 0).matrix
    other = gene_loadings(targets(values[order]), np.arange(60), context[order], 0).matrix
    np.testing.assert_allclose(one[:, :3], other[:, :3], atol=1e-4)
    wide = np.random.default_rng(2).random((200, 100))
    assert gene_loadings(targets(wide), np.arange(200), np.zeros(200, int), 0).width == WIDTH


def test_too_few_or_equal_controls_are_refused() -> None:
    values, context = cells()
    with pytest.raises(InputError, match="needs more than 2 control cells"):
        gene_loadings(targets(values), np.arange(2), context[:2], 0)
    with pytest.raises(InputError, match="all the same"):
        gene_loadings(targets(np.ones((9, 5))), np.arange(9), np.zeros(9, int), 0)
