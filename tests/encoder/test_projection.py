"""sest/encoder/projection.py: the PCA is NumPy's SVD, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest

from sest.encoder.projection import Projection, fit_pca
from sest.errors import InputError

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
