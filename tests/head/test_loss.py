"""The losses against a second implementation: float64, every pair of cells by itself.

Tolerances. The energy distance takes distances from Gram matrices of centred sets, in float32: of cells that differ,
the relative error is that of float32, and a cell's distance to itself is exactly 0 before the clamp.
A cell of x that equals one of y is at a distance of rounding: `noise_of`.

From half-precision Gram matrices, what 1e-4 is relative to there:

- the value: to E|x-y|, as it is a difference of three means of that size.
- the gradient: to its norm in float64 where sets differ. bfloat16 misses that (4e-4) and is held to 1.5e-4 of 1/S in
  every cell, the size of the pulls that a cell's gradient is the difference of.
- the gradient of near-identical sets: to 1/S, beside the pull 1 / (S T) of each pair that rounding cannot tell apart.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from sest.errors import InputError
from sest.head.loss import GRAMS, LOSSES, SINKHORN_WEIGHT, energy_distance, make_loss, mean_squared_error

EPS = 2.0**-23


def second_implementation(x: Tensor, y: Tensor) -> Tensor:
    """E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| in float64 from differences, squared distances clamped at 1e-8: (B,)."""

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        squared = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
        return squared.clamp_min(1e-8).sqrt().mean((1, 2))

    x, y = x.double(), y.double()
    return mean_distance(x, y) - 0.5 * mean_distance(x, x) - 0.5 * mean_distance(y, y)


CLAMP = 1e-4  # the root of the smallest squared distance


def noise_of(y: Tensor) -> float:
    """How far the mean of T x T distances is off in float32 if T of them are 0: sqrt(4 eps) max|y| / T and the clamp.

    So it is with E|x-y| of sets that are nearly the same, and with all parts of geomloss's.
    """
    return float((4 * EPS) ** 0.5 * y.double().norm(dim=-1).max() / (2 * y.shape[1])) + CLAMP


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
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=CLAMP)
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


def test_identical_sets_have_no_distance_beyond_rounding() -> None:
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
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=CLAMP + off_diagonal)
    ours.sum().backward()
    theirs.sum().backward()
    assert x.grad is not None and x64.grad is not None
    # the gradient is centred: 1000 + 4 has 6e-5 of rounding in x itself, of distances of about 8
    assert (x.grad.double() - x64.grad).norm() < 1e-4 * x64.grad.norm()


@pytest.mark.parametrize("gram", GRAMS)
def test_large_sets_scale_as_distances_do(gram: torch.dtype) -> None:
    x, y = cells(2, 8, 100, seed=7), cells(2, 8, 100, seed=8)
    scale = 2.0**20  # a power of two: all rounding, that of E|y-y'|'s diagonal too, scales with it; the clamp does not
    large = energy_distance(x * scale, y * scale, gram)
    torch.testing.assert_close(large, energy_distance(x, y, gram) * scale, rtol=1e-6, atol=1e-4 * scale)


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


def fast_errors(x: Tensor, y: Tensor, gram: torch.dtype) -> tuple[float, float, float]:
    """Of the fast form against float64, the value's error over E|x-y|, the gradient's over its norm, and over 1/S.

    The last is of the worst cell. `x` and `y` are compared as they are: rounded already where they are halves.
    """
    predicted, x64, y64 = x.clone().requires_grad_(), x.double().requires_grad_(), y.double()
    loss = energy_distance(predicted, y, gram)
    loss.sum().backward()
    distances = [
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(1e-4).mean((1, 2))
        for a, b in ((x64, y64), (x64, x64), (y64, y64))
    ]
    expected = distances[0] - 0.5 * distances[1] - 0.5 * distances[2]
    expected.sum().backward()
    assert loss.dtype == torch.float32 and predicted.grad is not None and predicted.grad.dtype == x.dtype
    assert x64.grad is not None and predicted.grad.isfinite().all()
    value = ((loss - expected).detach().abs() / distances[0].detach()).max()
    error = predicted.grad.double() - x64.grad
    return float(value), float(error.norm() / x64.grad.norm()), float(error.norm(dim=-1).max() * x.shape[1])


def different_sets(n_cells: int, kind: str) -> tuple[Tensor, Tensor]:
    """Two sets of 2 x S cells, 2,000 genes: of two distributions, of one, or with values in every gene."""
    y = cells(2, n_cells, 2000, seed=2, zeros=0.5)
    if kind == "dense":
        return y + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)), y.flip(1) + 1.0
    return cells(2, n_cells, 2000, seed=1, zeros=0.7 if kind == "two" else 0.5), y


HALVES = (torch.float16, torch.bfloat16)
# float16 holds 1e-4 of the norm with room; bfloat16 does not, see the head of this file
GRADIENT_TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-4, 1e-4), torch.bfloat16: (5e-4, 2e-4)}


@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("n_cells", [32, 128])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("kind", ["two", "one", "dense"])
def test_the_loss_of_any_gram_type_is_float64s_to_1e_4(
    kind: str, scale: float, n_cells: int, gram: torch.dtype
) -> None:
    x, y = different_sets(n_cells, kind)
    value, gradient, worst_cell = fast_errors(x * scale, y * scale, gram)
    assert value < 1e-4
    assert gradient < GRADIENT_TOLERANCE[gram][0] and worst_cell < GRADIENT_TOLERANCE[gram][1]


@pytest.mark.parametrize("gram", HALVES)
@pytest.mark.parametrize("inputs", HALVES)
def test_half_precision_cells_lose_nothing_more_in_the_fast_loss(inputs: torch.dtype, gram: torch.dtype) -> None:
    x, y = different_sets(64, "two")
    value, gradient, worst_cell = fast_errors(x.to(inputs), y.to(inputs), gram)
    assert value < 1e-4
    # the gradient comes back in the predictions' type, rounded to eps / 2 of each entry
    rounding = torch.finfo(inputs).eps / 2
    assert gradient < GRADIENT_TOLERANCE[gram][0] + rounding and worst_cell < GRADIENT_TOLERANCE[gram][1] + rounding


def test_at_full_size_the_loss_of_bf16_predictions_is_float64s() -> None:
    """As a GPU computes it in bf16: a set of 128 cells x 18,080 genes, and near-identical ones of a fresh head."""
    y = cells(1, 128, 18_080, seed=2, zeros=0.8)
    for x in (cells(1, 128, 18_080, seed=1, zeros=0.7), (0.3 + 0.01 * cells(1, 128, 18_080, seed=1))):
        value, gradient, _ = fast_errors(x.bfloat16(), y, torch.float16)
        assert value < 1e-4
        assert gradient < 1e-4 + torch.finfo(torch.bfloat16).eps / 2  # it comes back in bf16


@pytest.mark.parametrize("gram", HALVES)
@pytest.mark.parametrize("n_cells", [32, 128])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-5])
def test_the_fast_loss_of_near_identical_sets_is_off_by_no_more_than_the_pull_of_the_nearest_pair(
    gap: float, n_cells: int, gram: torch.dtype
) -> None:
    y = cells(2, n_cells, 2000, seed=5, zeros=0.5)
    x = y + gap * torch.rand(y.shape, generator=torch.Generator().manual_seed(6))
    value, _, worst_cell = fast_errors(x, y, gram)
    assert value < 1e-4
    # A pair pulls by 1 / (S T) in the direction of x - y, over which rounding is at most 1 (where the pair counts as
    # one point), and about eps / 4 |x| over |x - y| where the distance is larger: x is about gap sqrt(G / 3) away.
    distance, norm = gap * (2000 / 3) ** 0.5, float(y.norm(dim=-1).max())
    in_the_direction = min(1.0, torch.finfo(gram).eps / 2 * norm / distance)
    assert worst_cell < GRADIENT_TOLERANCE[gram][1] + 1.01 * in_the_direction / n_cells


@pytest.mark.parametrize("gram", HALVES)
def test_the_fast_loss_of_identical_sets_and_its_gradient_are_zero(gram: torch.dtype) -> None:
    y = cells(2, 64, 2000, seed=3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    for x in (y.clone(), y[:, order], torch.cat([y, y], dim=1)):  # and each cell twice: pairs of x at no distance
        x.requires_grad_()
        loss = energy_distance(x, y, gram)
        loss.sum().backward()
        # a sum of 64 products rounded in float32, of weights that cancel
        assert x.grad is not None and x.grad.norm(dim=-1).max() * x.shape[1] < 1e-5
        # E|x-y| and E|x-x'| are rounded around means that float32 sums in another order
        assert loss.abs().max() < 1e-5 * y.norm(dim=-1).max()


@pytest.mark.parametrize("gram", HALVES)
def test_the_fast_gradient_is_each_sets_own_and_follows_the_gradient_from_above(gram: torch.dtype) -> None:
    x, y = cells(3, 16, 300, seed=1).requires_grad_(), cells(3, 5, 300, seed=2)  # T is not S
    factors = torch.tensor([65536.0, -2.0, 0.0])  # a gradient scaler's, and two of another size
    (energy_distance(x, y, gram) * factors).sum().backward()
    assert x.grad is not None
    for i, factor in enumerate(factors):
        alone = x.detach()[i : i + 1].requires_grad_()
        energy_distance(alone, y[i : i + 1], gram).sum().backward()
        assert alone.grad is not None
        scale = float(alone.grad.abs().max() * factor.abs())
        torch.testing.assert_close(x.grad[i], alone.grad[0] * factor, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("gram", HALVES)
def test_autocast_and_values_that_are_not_finite_do_to_the_fast_loss_what_they_do_to_the_other(
    gram: torch.dtype,
) -> None:
    results = []
    for enabled in (False, True):
        x = cells(2, 16, 200, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = energy_distance(x, cells(2, 16, 200, seed=2), gram)
            loss.sum().backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    for value in (float("nan"), float("inf")):
        x = cells(2, 4, 9, seed=1)
        x[1, 2, 3] = value
        loss = energy_distance(x, cells(2, 4, 9, seed=2), gram)
        assert loss[0].isfinite() and not loss[1].isfinite()


@pytest.mark.parametrize("gram", GRAMS)
def test_sets_of_zeros_have_no_distance_and_no_gradient(gram: torch.dtype) -> None:
    x = torch.zeros(1, 4, 9, requires_grad=True)
    loss = energy_distance(x, torch.zeros(1, 5, 9), gram)
    loss.sum().backward()
    assert loss.abs() < 1e-6 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("gram", GRAMS)
def test_the_loss_keeps_the_centred_cells_in_the_gram_type_and_no_other_copy(gram: torch.dtype) -> None:
    x, y = cells(2, 16, 500, seed=1).requires_grad_(), cells(2, 16, 500, seed=2)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        energy_distance(x, y, gram)
    copies = [tensor for tensor in kept if tensor.data_ptr() != x.data_ptr() and tensor.shape[1] > 1]
    sizes = sorted((tuple(tensor.shape), tensor.dtype) for tensor in copies if tensor.shape[2] > 16)
    assert sizes == [((2, 40, 500), gram)]  # y, x, the shift between their means, and 7 rows that align them
    assert all(tuple(tensor.shape) == (2, 16, 16) for tensor in copies if tensor.shape[2] <= 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gram", HALVES)
@pytest.mark.parametrize("n_observed", [64, 5])
def test_a_gpus_fast_loss_is_that_of_the_cpu(n_observed: int, gram: torch.dtype) -> None:
    x, y = cells(2, 64, 2000, seed=1), cells(2, n_observed, 2000, seed=2, zeros=0.5)
    results = []
    for device in ("cpu", "cuda"):
        predicted = x.to(device, copy=True).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            loss = energy_distance(predicted, y.to(device), gram)
            loss.sum().backward()
        assert predicted.grad is not None
        results.append((loss.detach().cpu(), predicted.grad.cpu()))
    (loss, gradient), (gpu_loss, gpu_gradient) = results
    # the same rounded cells, but their mean is summed in another order and so are the products: 1e-5 of E|x-y|
    torch.testing.assert_close(gpu_loss, loss, rtol=0, atol=1e-5 * float(y.norm(dim=-1).max()))
    assert (gpu_gradient - gradient).norm() < 1e-4 * gradient.norm()


def test_a_gram_type_that_is_not_offered_is_refused() -> None:
    with pytest.raises(InputError, match=r"No energy distance from torch.float64. Available: torch.float32, "):
        energy_distance(cells(1, 4, 9, seed=1), cells(1, 4, 9, seed=2), torch.float64)


@pytest.mark.parametrize("gram", GRAMS)
def test_make_loss_passes_the_gram_type_on(gram: torch.dtype) -> None:
    x, y = cells(2, 8, 50, seed=1), cells(2, 8, 50, seed=2)
    torch.testing.assert_close(make_loss("energy", gram)(x, y), energy_distance(x, y, gram), rtol=0, atol=0)
    assert make_loss("mse", gram) is mean_squared_error


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
