"""Losses between a predicted and an observed set of cells.

Shapes: B sets, S predicted cells, T observed cells, G genes. All are computed outside autocast: products of halves
would round away what an energy distance is, a small difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sest.errors import InputError
from sest.head import kernels

MIN_SQUARED_DISTANCE = 1e-8  # geomloss clamps here before the root
SINKHORN_WEIGHT = 0.01
ALIGNED_ROWS = 8  # of halves: rows of products that divide by it take the fast kernels
LOSSES = ("energy", "mse", "energy+sinkhorn")
# What a Gram matrix's inputs are rounded to, and the part of |a|^2 + |b|^2 below which a squared distance is taken for
# zero: rounding of the inputs makes about eps^2 / 24 (eps^2 / 8 for bfloat16), that of float32 sums less than 2^-19 at
# 18,080 genes. float32 has the clamp alone.
GRAMS = {torch.float32: 0.0, torch.bfloat16: 2.0**-17, torch.float16: 2.0**-19}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b of float32 or half-precision inputs, summed and returned in float32.

    A GPU multiplies halves so; a CPU would round the result to a half, and multiplies the same numbers as float32.
    """
    if a.dtype != torch.float32 and a.device.type != "cpu":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _power_of_two(largest: Tensor, gram: torch.dtype) -> Tensor:
    """(B,) largest magnitudes -> (B, 1, 1) factors that bring them into [2^13, 2^14]; 1 where `gram` needs none.

    float16 overflows at 65,504 and loses digits below 2^-14; the other types reach as far as float32 does.
    """
    if gram != torch.float16:
        return torch.ones_like(largest, dtype=torch.float32).view(-1, 1, 1)
    exponent = torch.frexp(largest.float()).exponent
    return torch.exp2((14 - exponent).clamp(-60, 60).float()).view(-1, 1, 1)  # 60: its square is a float32 as well


def _place(cells: Tensor, centre: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write scale * (cells - centre) into `out`, rounded once to its type; exact but for that, as scale is 2^k."""
    if torch.compiler.is_compiling():  # which takes no part of a tensor as `out`, and makes one pass of this
        out.copy_(torch.addcmul(-scale * centre, cells, scale))
    else:
        torch.addcmul(-scale * centre, cells, scale, out=out)


def _squared_norms(cells: Tensor) -> Tensor:
    """(B, S, G) -> (B, S) float32, in one pass and without a copy of the cells."""
    return torch.linalg.vector_norm(cells, dim=-1, dtype=torch.float32).square()


def _squared(gram: Tensor, norms_a: Tensor, norms_b: Tensor, unit: Tensor, noise: float) -> Tensor:
    """Squared distances (B, S, T) from a Gram matrix (B, S, T) and squared norms (B, S), (B, T), in units of `unit`.

    Zero where they are rounding alone; not a number stays what it is.
    """
    squares = norms_a.unsqueeze(2) + norms_b.unsqueeze(1)
    squared = torch.sub(squares, gram, alpha=2.0)
    if noise:
        squared.masked_fill_(squared < noise * squares, 0.0)
    return squared.div_(unit)


def _distance(squared: Tensor) -> Tensor:
    """|a_i - b_j|, clamped."""
    return squared.clamp_min(MIN_SQUARED_DISTANCE).sqrt_()


def _weight(squared: Tensor, distance: Tensor) -> Tensor:
    """The w of d|a_i - b_j| / da_i = w_ij (a_i - b_j): 1 / |a_i - b_j|, or zero where the clamp or rounding holds."""
    return torch.where(squared > MIN_SQUARED_DISTANCE, distance.reciprocal(), 0.0)


class _EnergyDistance(torch.autograd.Function):
    """E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| with its gradient for x written out.

    Distances do not change when a set is moved, but |a|^2 + |b|^2 - 2ab loses fewer digits near the origin: each set is
    centred on its own mean, and E|x-y| adds the shift between the two, as one more row of the Gram matrix. So all cells
    are rounded and multiplied once. Each set's own norms are its Gram matrix's diagonal, so that a cell's distance to
    itself is 0, where geomloss in float32 has noise. E|y-y'| has no gradient. Beside (B, S, T) matrices only the
    centred cells are kept, in the Gram matrices' type, and never (B, S, T, G).
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, gram: torch.dtype) -> Tensor:
        (n_sets, n_x, n_genes), n_y = predicted.shape, target.shape[1]
        noise, n_cells = GRAMS[gram], n_y + n_x
        if gram == torch.float16:
            look = kernels.operator_or(kernels.plain_centre_and_largest, kernels.centre_and_largest, predicted.device)
            (centre_x, largest_x), (centre_y, largest_y) = look(predicted), look(target)  # (B, 1, G), (B,)
            scale = _power_of_two(2 * torch.maximum(largest_x, largest_y), gram)  # 2: centred, it may be twice as large
        else:
            centre_x, centre_y = (cells.mean(1, keepdim=True, dtype=torch.float32) for cells in (predicted, target))
            scale = _power_of_two(centre_x[:, 0, 0], gram)
        shift = centre_x - centre_y
        # y, x, shift, and rows of 0 up to a multiple of what tensor cores take
        n_rows = -(-(n_cells + 1) // ALIGNED_ROWS) * ALIGNED_ROWS
        cells = torch.empty(n_sets, n_rows, n_genes, dtype=gram, device=predicted.device)
        y, x = cells[:, :n_y], cells[:, n_y:n_cells]
        _place(target, centre_y, scale, out=y)
        _place(predicted, centre_x, scale, out=x)
        cells[:, n_cells] = (shift * scale).squeeze(1)
        cells[:, n_cells + 1 :].zero_()

        yy, of_x = _product(y, y.mT), _product(cells[:, n_y:], cells.mT)
        xx, xy = of_x[:, :n_x, n_y:n_cells], of_x[:, :n_x, :n_y]
        y_shift, x_shift, shift_shift = of_x[:, n_x, : n_cells + 1].split([n_y, n_x, 1], dim=1)
        norms_x, norms_y = xx.diagonal(dim1=1, dim2=2), yy.diagonal(dim1=1, dim2=2)
        norms_moved = norms_x + 2 * x_shift + shift_shift  # of x around the mean of y
        unit = scale * scale
        squared_yy = _squared(yy, norms_y, norms_y, unit, noise)
        squared_xy = _squared(xy + y_shift.unsqueeze(1), norms_moved, norms_y, unit, noise)
        squared_xx = _squared(xx, norms_x, norms_x, unit, noise)
        d_yy, d_xy, d_xx = map(_distance, (squared_yy, squared_xy, squared_xx))
        weight_xy, weight_xx = _weight(squared_xy, d_xy), _weight(squared_xx, d_xx)
        weight_xy /= n_x * n_y
        weight_xx /= n_x * n_x
        ctx.save_for_backward(predicted, cells, shift, scale, weight_xy, weight_xx)
        return d_xy.mean((1, 2)) - 0.5 * d_xx.mean((1, 2)) - 0.5 * d_yy.mean((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """sum_j w_ij (x_i - y_j) - sum_j v_ij (x_i - x_j); pairs (i, j) and (j, i) of E|x-x'| undo its 0.5.

        With a_i = sum_j w_ij and b_i = sum_j v_ij, and both sets centred, it is
        (a_i - b_i) x_i + a_i (mean x - mean y) - sum_j w_ij y_j + sum_j v_ij x_j.
        """
        predicted, cells, shift, scale, w, v = ctx.saved_tensors
        (n_y, n_cells), gram = (w.shape[2], w.shape[2] + v.shape[2]), cells.dtype
        y_and_x = cells[:, :n_cells]
        factor = gradients[0].float().view(-1, 1, 1)
        with torch.autocast(predicted.device.type, enabled=False):  # `backward` may be called inside autocast
            if gram == torch.float32:
                a, b = w.sum(2, keepdim=True), v.sum(2, keepdim=True)
                pull = torch.cat([-w, v], dim=2) * factor  # (B, S, T + S)
                pull[:, :, n_y:].diagonal(dim1=1, dim2=2).copy_(((a - b) * factor).squeeze(2))  # v_ii is 0
                gradient = _product(pull, y_and_x)
                gradient.addcmul_(a * factor, shift)
                return gradient.to(predicted.dtype), None, None
            w, v = w * factor, v * factor
            # Centred cells sum to 0, so a constant may be taken off each row of weights. Off comes the mean: what
            # all cells' rounding has in common (that of an unexpressed gene, say) is then weighted by about 0.
            pull = torch.cat([w.mean(2, keepdim=True) - w, v - v.mean(2, keepdim=True)], dim=2)
            weight_scale = _power_of_two(pull.abs().amax((1, 2)), gram)
            pull = (pull * weight_scale).to(gram)
            # the weights' rounding goes into a and b too: x_i - y_j of a near pair must not be torn apart
            rounded = pull.float()
            a = w.sum(2, keepdim=True) * weight_scale - rounded[:, :, :n_y].sum(2, keepdim=True)
            b = v.sum(2, keepdim=True) * weight_scale + rounded[:, :, n_y:].sum(2, keepdim=True)
            add = kernels.operator_or(kernels.plain_weighted_sum, kernels.weighted_sum, w.device)
            of_shift, unit = a * scale, 1.0 / (scale * weight_scale)
            pulled = _product(pull, y_and_x)
            return add(pulled, y_and_x[:, n_y:], a - b, shift, of_shift, unit, predicted.dtype), None, None


def energy_distance(predicted: Tensor, target: Tensor, gram: torch.dtype = torch.float32) -> Tensor:
    """Energy distance of every set: E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'|, Euclidean norm, means over all pairs with i=j.

    As geomloss `SamplesLoss("energy")`: squared distances are clamped at 1e-8 before the root. Zero means (up to that
    clamp) that both sets are the same. Source: Szekely & Rizzo 2013; Feydy et al. 2019 for the convention.

    In float32 it is the number of geomloss in float64, to rounding. With `gram` a half, each cell is rounded to it
    once, around the set's mean; norms come from the rounded numbers and all sums are float32. That is for GPUs: a CPU
    only loses time. float16 costs what bfloat16 does and has three bits more, whatever type the model computes in; each
    set is scaled by a power of two, so it overflows at no size. Where the gradient is not the exact one:

    - near-identical sets: a cell of y at a small distance d of one of x pulls it by 1 / (S T) whatever d is, and a
      Gram matrix does not hold the direction: it is off by rounding / d. A pair whose squared distance `GRAMS` takes
      for zero does not pull at all; of x = y the gradient is 0, as it should be;
    - sets far from the origin for their spread: it is off by up to the float32 rounding of their mean over the spread.

    Args:
        predicted: (B, S, G) predicted cells, log1p.
        target: (B, T, G) observed cells, log1p; gets no gradient.
        gram: what the Gram matrices' inputs are rounded to: float32 (not at all), float16 or bfloat16.

    Returns:
        (B,) float32, one number a set.

    Raises:
        InputError: `gram` is another type.
    """
    if gram not in GRAMS:
        raise InputError(f"No energy distance from {gram}. Available: {', '.join(map(str, GRAMS))}.")
    with torch.autocast(predicted.device.type, enabled=False):
        return _EnergyDistance.apply(predicted, target, gram)


class ObservedSets:
    """Observed sets of cells, and what distances to several predictions of them have in common. No gradient.

    Distances do not change when both sets are moved: all are computed around the mean of the observed cells.
    """

    def __init__(self, target: Tensor, *, numbers: np.ndarray | None = None, within: Tensor | None = None) -> None:
        """Sets of observed cells.

        Args:
            target: (B, T, G) log1p.
            numbers: (B, T) which cell each is, as small sets are filled with copies; None: all are different.
            within: `within` of the same sets, where that is known.
        """
        self._target, self._numbers = target, numbers
        self._centre = target.mean(1, keepdim=True, dtype=torch.float32)  # (B, 1, G)
        if within is not None:
            self.within = within

    @cached_property
    def within(self) -> Tensor:
        """(B,) mean distance of all pairs of observed cells, each with itself too."""
        placed = (self._placed(self._target, part) for part in self._parts())
        return torch.cat([self._mean_distance(cells, cells) for cells in placed])

    def energy_distances(
        self,
        predicted: Tensor,
        *,
        other: Tensor | None = None,
        controls: tuple[np.ndarray, np.ndarray] | tuple[np.ndarray] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`energy_distance` of every set, and the same of different cells, (B,) float32 both, at the cost of one.

        The other is E|x-y| - 0.5 E|x-x'| - 0.5 E|y-y'| where x and x' are different cells, and y and y' (else NaN): the
        U-statistic, whose mean over sets of one distribution is 0. `energy_distance` counts each cell's zero distance
        to itself, which takes a part 1 / S off the spread of a set: a prediction of too little spread earns by it.

        Args:
            predicted: (B, S, G).
            other: (B, S, G) cells predicted from other controls, to take x' from. That mean holds for independent
                cells; a head that sees all cells of a set can set them further apart than independent ones are.
            controls: (B, S) which control each predicted cell is from, and each other one: cells from one control are
                not independent, so they are no x and x'. None: all are from different ones.
        """
        found = [self._distances(predicted, other, controls, part) for part in self._parts()]
        between, within, apart = (torch.cat(mean) for mean in zip(*found, strict=True))
        observed = _of_different(self.within, self._target.shape[1], self._numbers)
        return between - 0.5 * within - 0.5 * self.within, between - 0.5 * apart - 0.5 * observed

    def _parts(self) -> list[slice]:
        """Sets that are taken at once: all on a GPU; on a CPU one, which stays in its cache, whatever the batch is."""
        n, alone = len(self._target), self._target.device.type == "cpu"
        return [slice(i, i + 1) for i in range(n)] if alone else [slice(0, n)]

    def _distances(
        self, predicted: Tensor, other: Tensor | None, controls: tuple[np.ndarray, ...] | None, part: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the sets of a part: mean distances between the sides, within the prediction, and of different cells."""
        x, y = self._placed(predicted, part), self._placed(self._target, part)
        within, numbers = self._mean_distance(x, x), [rows[part] for rows in controls or ()]
        if other is None:
            apart = _of_different(within, x.shape[1], *numbers)
        else:
            apart = self._mean_distance(x, self._placed(other, part), *numbers)
        return self._mean_distance(x, y), within, apart

    def _placed(self, cells: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            return cells[part].float() - self._centre[part]

    @staticmethod
    def _mean_distance(a: Tensor, b: Tensor, *numbers: np.ndarray) -> Tensor:
        """(B, S, G), (B, T, G) -> (B,) mean over all pairs; with `numbers` (B, S), (B, T) over those that differ."""
        one = torch.ones(len(a), 1, 1, device=a.device)
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            gram = _product(a, b.mT)
            norms = [gram.diagonal(dim1=1, dim2=2)] * 2 if a is b else [_squared_norms(cells) for cells in (a, b)]
            distances = _distance(_squared(gram, norms[0], norms[1], one, GRAMS[a.dtype]))
            if not numbers:
                return distances.mean((1, 2))
            differ = torch.from_numpy(~_same(*numbers)).to(a.device)
            return (distances * differ).sum((1, 2)) / differ.sum((1, 2))  # 0 / 0 is NaN: there are none


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(B, S, T) bool: which of the cells with numbers (B, S) and (B, T) are one."""
    same: np.ndarray = a[:, :, None] == b[:, None, :]
    return same


def _of_different(mean: Tensor, n: int, numbers: np.ndarray | None = None) -> Tensor:
    """Mean distance of different cells, from that of all pairs of n cells: a cell's own is the clamp's root, not 0.

    `numbers`: (B, n) which cell each is, as of two copies the distance is a cell's own too; None: all are different.
    NaN where there are none.
    """
    same = np.full(len(mean), n) if numbers is None else _same(numbers, numbers).sum((1, 2))
    of_one = torch.from_numpy(same).to(mean.device, torch.float32)
    found = (mean * n**2 - MIN_SQUARED_DISTANCE**0.5 * of_one) / (n**2 - of_one)
    return torch.where(of_one < n**2, found, torch.nan)


def mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference cell by cell (row i against row i): (B, S, G), (B, S, G) -> (B,) float32."""
    return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2))


class HeadLoss(nn.Module):
    """A head and its loss as one network: what is compiled, and what is averaged over processes.

    Args:
        criterion: of `make_loss`.
        autocast: makes the context in which the head predicts.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.model, self.criterion, self._autocast = model, criterion, autocast

    def forward(
        self, basal: Tensor, features: Tensor, keys: Tensor, target: Tensor, measured: Tensor | None = None
    ) -> Tensor:
        """The loss of every set, (B,) float32.

        Args:
            basal: (B, S, E) embeddings of control cells.
            features: (B, P) vectors of the perturbations.
            keys: (B,) int32 of `sest.head.dropout.dropout_keys`.
            target: (B, T, G) observed cells, log1p.
            measured: (B, 1, G) 1 for genes that have a target, else 0; None: all have.
        """
        with self._autocast():
            predicted = self.model(basal, features, keys)
        if measured is not None:  # of a gene that its file lacks a set has no target
            predicted = predicted * measured
        return self.criterion(predicted, target)


def is_energy_distance(loss: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a loss of `make_loss` is the energy distance in float32, which `ObservedSets` computes too."""
    if isinstance(loss, partial):
        return loss.func is energy_distance and loss.keywords == {"gram": torch.float32}
    return loss is energy_distance


def make_loss(name: str, gram: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of that name: (B, S, G) predicted, (B, S, G) observed -> (B,).

    Args:
        name: one of `LOSSES`.
        gram: see `energy_distance`; the other losses are float32 whatever it is.

    Raises:
        InputError: no such loss, or its library is not installed.
    """
    if name == "energy":
        return partial(energy_distance, gram=gram)
    if name == "mse":
        return mean_squared_error
    if name == "energy+sinkhorn":
        return _energy_and_sinkhorn(partial(energy_distance, gram=gram))
    raise InputError(f"No loss '{name}'. Available: {', '.join(LOSSES)}.")


def _energy_and_sinkhorn(energy: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        from geomloss import SamplesLoss
    except ImportError as error:
        raise InputError("The loss 'energy+sinkhorn' needs geomloss. Run `pip install 'sest[sinkhorn]'`.") from error
    sinkhorn = SamplesLoss("sinkhorn", blur=0.05)  # blur: upstream's default, in units of log1p expression

    def loss(predicted: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(predicted.device.type, enabled=False):
            return energy(predicted, target) + SINKHORN_WEIGHT * sinkhorn(predicted.float(), target.float())

    return loss
