"""The losses against a second implementation: float64, every pair of cells by itself.

Tolerances. The energy distance takes distances from Gram matrices in float32, so a squared distance is wrong by up to
about eps = 1.2e-7 times the squared norms it is made of. Two parts differ in that:

- E|x-y| and E|x-x'| are centred: of cells that differ, the relative error is that of float32.
- E|y-y'| is left as geomloss computes it, uncentred and with the noise of its diagonal, by intent (it has no gradient,
  and so a loss can be held against upstream's). Each of the T diagonal terms is then up to sqrt(n eps) |y| instead of
  1e-4, and the mean over T x T pairs is off by up to sqrt(n eps) |y| / T; `noise_of` says how much that is.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from sest.errors import InputError
from sest.loss import LOSSES, SINKHORN_WEIGHT, energy_distance, make_loss, mean_squared_error

EPS = 2.0**-23


def second_implementation(x: Tensor, y: Tensor) -> Tensor:
    """E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| in float64 from differences, squared distances clamped at 1e-8: (B,)."""

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        squared = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
        return squared.clamp_min(1e-8).sqrt().mean((1, 2))

    x, y = x.double(), y.double()
    return mean_distance(x, y) - 0.5 * mean_distance(x, x) - 0.5 * mean_distance(y, y)


def noise_of(y: Tensor) -> float:
    """How far the diagonal of E|y-y'| may be off in float32 (see above): 0.5 sqrt(4 eps) max|y| / T, and the clamp."""
    return float((4 * EPS) ** 0.5 * y.double().norm(dim=-1).max() / (2 * y.shape[1])) + 1e-4


def cells(*shape: int, seed: int, zeros: float = 0.7) -> Tensor:
    """Sparse values as log1p expression: not negative, mostly 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(*shape, generator=generator) * 4
    return values * (torch.rand(*shape, generator=generator) > zeros)


@pytest.mark.parametrize(
    ("n_predicted", "n_observed", "n_genes"), [(8, 8, 40), (16, 5, 300), (2, 9, 3), (32, 32, 2000)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_energy_distance_and_its_gradient_equal_the_second_implementation(
    n_predicted: int, n_observed: int, n_genes: int, seed: int
) -> None:
    x = cells(3, n_predicted, n_genes, seed=seed).requires_grad_()
    y = cells(3, n_observed, n_genes, seed=seed + 10, zeros=0.5)
    x64 = x.detach().double().requires_grad_()
    ours, theirs = energy_distance(x, y), second_implementation(x64, y)
    assert ours.shape == (3,) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=noise_of(y))
    weights = torch.tensor([1.0, -2.0, 0.5])  # every set has a gradient of its own
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert x.grad is not None and x64.grad is not None
    # sums of S + T float32 terms, each good to eps |x| / |x - y|
    assert (x.grad.double() - x64.grad).norm() < 1e-5 * x64.grad.norm()


def test_energy_distance_of_hand_computed_sets() -> None:
    x, y = torch.tensor([[[0.0], [3.0]]]), torch.tensor([[[1.0], [1.0]]])
    # E|x-y| = (1 + 1 + 2 + 2) / 4, E|x-x'| = (0 + 3 + 3 + 0) / 4, E|y-y'| = 0; the clamp adds 1e-4 to every 0
    assert float(energy_distance(x, y)) == pytest.approx(1.5 - 0.75, abs=2e-4)


def test_identical_sets_have_no_distance_beyond_the_noise_of_the_diagonal() -> None:
    y = cells(4, 32, 2000, seed=3)
    assert energy_distance(y.clone(), y).abs().max() < 2 * noise_of(y)
    assert noise_of(y) < 1e-3 * float(energy_distance(cells(4, 32, 2000, seed=4), y).max())


def test_the_gradient_of_identical_sets_is_finite_and_stays_small() -> None:
    y = cells(2, 16, 500, seed=3)
    x = y.clone().requires_grad_()
    energy_distance(x, y).sum().backward()
    x64 = y.double().requires_grad_()
    second_implementation(x64, y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x64.grad is not None and x64.grad.norm() < 1e-9  # by symmetry: the pulls of x and y cancel
    # A cell and its copy lie at a rounded distance d of about sqrt(eps) |x| instead of 0, where the gradient is
    # (x - y) / d: rounding of x over d, so sqrt(eps); and 1 / S^2 of it for each of S cells.
    assert x.grad.norm(dim=-1).max() < 10 * EPS**0.5 / 16


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_nearly_identical_sets_are_as_far_apart_as_the_second_implementation_says(gap: float) -> None:
    y = cells(2, 16, 200, seed=5)
    shift = torch.rand(2, 16, 200, generator=torch.Generator().manual_seed(6)) * gap
    x = (y + shift).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    ours, theirs = energy_distance(x, y), second_implementation(x64, y)
    # the diagonal of E|x-y| is now near 0 as well: its noise is that of E|y-y'|
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=3 * noise_of(y))
    ours.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.norm(dim=-1).max() < 2 / 16  # |gradient| <= 2 / S


def test_huge_values_far_from_the_origin_keep_their_distance_and_gradient() -> None:
    offset = 1000.0
    x = (cells(2, 8, 100, seed=7) + offset).requires_grad_()
    y = cells(2, 8, 100, seed=8) + offset
    x64 = x.detach().double().requires_grad_()
    ours, theirs = energy_distance(x, y), second_implementation(x64, y)
    # uncentred E|y-y'|: the off-diagonal pairs lose digits too, |y|^2 eps / (2 d) each
    d = 8.0
    off_diagonal = float(4 * EPS * y.double().square().sum(-1).max()) / (2 * d)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=noise_of(y) + off_diagonal)
    ours.sum().backward()
    theirs.sum().backward()
    assert x.grad is not None and x64.grad is not None
    # the gradient is centred: 1000 + 4 has 6e-5 of rounding in x itself, of distances of about 8
    assert (x.grad.double() - x64.grad).norm() < 1e-4 * x64.grad.norm()


def test_large_sets_scale_as_distances_do() -> None:
    x, y = cells(2, 8, 100, seed=7), cells(2, 8, 100, seed=8)
    torch.testing.assert_close(energy_distance(x * 1e6, y * 1e6), energy_distance(x, y) * 1e6, rtol=1e-4, atol=0)


def test_the_written_out_gradient_is_the_slope_of_the_loss() -> None:
    x, y = cells(2, 6, 30, seed=1), cells(2, 7, 30, seed=2)
    x.requires_grad_()
    energy_distance(x, y).sum().backward()
    assert x.grad is not None
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    step = 1e-2  # large enough that float32 resolves the difference; the curvature's error is step^2
    with torch.no_grad():
        slope = (energy_distance(x + step * direction, y) - energy_distance(x - step * direction, y)).sum() / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(float(slope), rel=2e-3)


def test_the_target_gets_no_gradient() -> None:
    x, y = cells(1, 4, 9, seed=1).requires_grad_(), cells(1, 4, 9, seed=2).requires_grad_()
    energy_distance(x, y).sum().backward()
    assert x.grad is not None and y.grad is None


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = cells(1, 4, 9, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(energy_distance(x, cells(1, 4, 9, seed=2)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad"):
        gradient.sum().backward()


def test_values_that_are_not_finite_give_a_loss_that_is_not_finite() -> None:
    for value in (float("nan"), float("inf")):
        x = cells(2, 4, 9, seed=1)
        x[1, 2, 3] = value
        loss = energy_distance(x, cells(2, 4, 9, seed=2))
        assert loss[0].isfinite() and not loss[1].isfinite()


def test_autocast_changes_neither_the_loss_nor_its_gradient() -> None:
    results = []
    for enabled in (False, True):
        x = cells(2, 16, 200, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = energy_distance(x, cells(2, 16, 200, seed=2))
            loss.sum().backward()  # inside as well: nothing in it may be cast
        assert loss.dtype == torch.float32
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_half_precision_predictions_are_measured_in_float32() -> None:
    x, y = cells(2, 16, 200, seed=1).bfloat16().requires_grad_(), cells(2, 16, 200, seed=2)
    loss = energy_distance(x, y)
    torch.testing.assert_close(loss, energy_distance(x.detach().float(), y), rtol=0, atol=0)
    loss.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_mean_squared_error_pairs_the_cells_by_row() -> None:
    predicted, target = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    assert mean_squared_error(predicted, target).tolist() == [(4 + 9) / 4]
    assert make_loss("mse") is mean_squared_error


def test_every_loss_named_in_the_configuration_exists_and_others_are_refused() -> None:
    from sest.config import TrainConfig

    field = next(f for f in TrainConfig.__dataclass_fields__.values() if f.name == "loss")
    assert field.metadata["choices"] == LOSSES
    with pytest.raises(InputError, match=r"No loss 'huber'. Available: energy, mse"):
        make_loss("huber")


def test_energy_and_sinkhorn_is_the_energy_distance_plus_a_hundredth_of_geomloss_sinkhorn() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = cells(3, 8, 20, seed=1), cells(3, 8, 20, seed=2)
    expected = energy_distance(x, y) + SINKHORN_WEIGHT * geomloss.SamplesLoss("sinkhorn", blur=0.05)(x, y)
    assert SINKHORN_WEIGHT == 0.01
    torch.testing.assert_close(make_loss("energy+sinkhorn")(x, y), expected)


def test_energy_distance_is_geomloss_energy() -> None:
    geomloss = pytest.importorskip("geomloss")
    x, y = cells(3, 32, 400, seed=1), cells(3, 32, 400, seed=2)
    # geomloss leaves the diagonal noise of E|x-x'| in too
    expected = geomloss.SamplesLoss("energy")(x, y)
    torch.testing.assert_close(energy_distance(x, y), expected, rtol=1e-5, atol=noise_of(x) + noise_of(y))


def test_sinkhorn_without_geomloss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geomloss", None)  # makes `import geomloss` fail
    with pytest.raises(InputError, match=r"needs geomloss. Run `pip install 'sest\[sinkhorn\]'`"):
        make_loss("energy+sinkhorn")
