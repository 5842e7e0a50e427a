"""The cells of a prediction: of one run or of several, by the head, by baselines, or blended.

As many cells as the head counts are the head's, the others are real control cells; then the cells of each request are
moved to the blended mean. Shapes: B sets, S cells a set, n cells, E embedding width, P feature width, G genes. Space:
log1p.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
import torch

from sest.baselines.all import Baselines
from sest.baselines.effects import Contexts, Query
from sest.blend.blend import ANCHORED, HEAD, STACK, Blend
from sest.blend.transport import move_to_mean
from sest.blend.weights import Weights
from sest.cells.scale import LARGEST_PREDICTED_LOG1P
from sest.errors import InputError
from sest.evaluation.means import training_effects
from sest.head.model import StateTransition
from sest.machine.devices import autocast
from sest.prediction.controls import Pool
from sest.prediction.draws import MOVES, draws_of, random_of
from sest.prediction.requests import Request
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import Known

logger = logging.getLogger(__name__)

PAIRS_AT_ONCE = 64  # whose baselines are computed together
ROWS_AT_ONCE = 4096  # real control cells written at once


@dataclass(frozen=True, eq=False)
class Member:
    """One run of a prediction."""

    checkpoint: Checkpoint
    model: StateTransition | None  # None where it does not count
    blend: Blend | None  # None: the head's cells as they are
    vectors: Mapping[str, np.ndarray]  # perturbation -> (P,)
    control: np.ndarray  # (P,) features of the control
    batch_size: int
    set_size: int
    precision: str

    @property
    def of_head(self) -> float:
        """The share of cells that are the head's."""
        return 1.0 if self.blend is None else self.blend.of_head

    def head_cells(self, basal: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """(B, S, E) and (P,) -> (B * S, G) float32, cut at 14."""
        assert self.model is not None
        device = next(self.model.parameters()).device
        with torch.inference_mode(), autocast(device, self.precision):
            perturbation = torch.from_numpy(vector).to(device).expand(len(basal), -1)
            predicted = self.model(torch.from_numpy(basal.astype(np.float32)).to(device), perturbation)
            cells: np.ndarray = predicted.float().clamp_max(LARGEST_PREDICTED_LOG1P).flatten(0, 1).cpu().numpy()
        return cells


@dataclass
class Followed:
    """How much of a change in the controls' mean a predicted mean follows: least squares over draws of one request.

    The effect of a stack does not depend on the controls, so that its prediction follows them wholly (1); a head that
    predicts the same cells from any controls does not (0). `sest evaluate` must know it: the noise of the mean of the
    controls is in a prediction as far as that follows them.
    """

    members: Sequence[Member]
    product: float = field(default=0.0, init=False)
    square: float = field(default=0.0, init=False)

    def add(self, draw: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray] | None) -> None:
        """A draw and the one before it: mean of its controls and predicted effect, (G,) each."""
        if before is not None:
            control, effect = (now - then for now, then in zip(draw, before, strict=True))
            self.product += float(control @ effect)
            self.square += float(control @ control)

    @property
    def share(self) -> float | None:
        """The share; None where a head counts and no request had two draws."""
        of_head = float(np.mean([m.blend.weights.means.get(HEAD, 0.0) if m.blend else 1.0 for m in self.members]))
        if self.square > 0:
            return 1.0 - of_head + self.product / self.square
        return None if any(member.of_head > 0 for member in self.members) else 1.0


def weights_for(asked: str, checkpoint: Checkpoint, known: Known) -> Blend | None:
    """What counts in a prediction; None: the head alone.

    Args:
        asked: PredictConfig.blend.

    Raises:
        InputError: baselines are asked for, and what the run was trained on is not known.
    """
    if asked == "auto" and not checkpoint.has_blend:
        logger.info(
            f"{checkpoint.folder} has no blend: cells are the head's alone. `sest blend` fits what head and baselines "
            "are to count."
        )
    if asked == HEAD or (asked == "auto" and not checkpoint.has_blend):
        return None
    if asked == "auto":
        return checkpoint.blend()
    means = {STACK: 1.0 if asked == STACK else 0.0}
    weights = Weights(means, dict.fromkeys(means, 0.0), 0)
    fitted = fitted_baselines(checkpoint, known)
    if fitted is None:
        raise InputError(
            f"What {checkpoint.folder} was trained on is not known here, so --blend {asked} has nothing to go by. "
            f"Pass {'' if known.data is not None else '--cache, or '}--blend head."
        )
    return Blend(fitted, weights)


def fitted_baselines(checkpoint: Checkpoint, known: Known) -> Baselines | None:
    """Baselines fitted on the training split, where it is known which cells that is: they must not see others."""
    if checkpoint.has_blend:
        return checkpoint.blend().baselines
    if known.data is None or known.trained is None:
        return None
    return Baselines().fit(training_effects(known.data))


def query_of(requests: Sequence[Request], vectors: Mapping[str, np.ndarray]) -> Query:
    """What asks baselines for the effects of the requests, in their order."""
    pools = list({id(request.pool): request.pool for request in requests}.values())
    moments = [pool.moments for pool in pools]
    controls = Contexts(
        names=tuple(pool.context or f"new controls/{pool.cell_type}" for pool in pools),
        mean=np.stack([mean for mean, _ in moments]),
        variance=np.stack([variance for _, variance in moments]),
        n_cells=np.array([len(pool) for pool in pools]),
    )
    at = {id(pool): i for i, pool in enumerate(pools)}
    names = tuple(request.perturbation for request in requests)
    return Query(
        controls, np.array([at[id(r.pool)] for r in requests]), names, np.stack([vectors[name] for name in names])
    )


def baseline_effects(members: Sequence[Member], asked: Sequence[Request]) -> Iterator[list[np.ndarray]]:
    """For every request its stack's effect (G,) by every member; zeros where that does not count."""
    for start in range(0, len(asked), PAIRS_AT_ONCE):
        part = asked[start : start + PAIRS_AT_ONCE]
        found = []
        for member in members:
            effects = np.zeros((len(part), part[0].pool.expression.shape[1]))
            if member.blend is not None and member.blend.weights.means[STACK] > 0:
                effects = member.blend.stack.predict(query_of(part, member.vectors))
            found.append(effects)
        yield from (list(rows) for rows in zip(*found, strict=True))


def predicted_effects(
    request: Request, members: Sequence[Member], effects: Sequence[np.ndarray], seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """By draw the control cells (n,) that a request's cells start from, and the effect (G,) that all members predict.

    Args: as `predicted_cells`.
    """
    first = members[0]
    for draw in draws_of(request, first.set_size, first.batch_size, seed):
        own = [
            _of_member(member, request, draw.sets, of_stack)[0]
            for member, of_stack in zip(members, effects, strict=True)
        ]
        yield draw.sets.ravel()[: draw.n_cells], np.mean(own, axis=0)


def predicted_cells(
    request: Request,
    members: Sequence[Member],
    effects: Sequence[np.ndarray],
    seed: int,
    followed: Followed | None = None,
) -> Iterator[tuple[np.ndarray, scipy.sparse.csr_matrix]]:
    """Predicted cells of a request by draw, and the control cells (n,) they start from.

    Several members predict every set; set i is written as member i mod their number predicts it, so that the cells are
    a sample of what all of them say, and moved to the mean of their means. A member's cells are the head's with the
    chance that is the head's weight, else the controls that the head was given.

    Args:
        effects: (G,) of the stack, by member.
        seed: of the choice of control cells, and of what is switched on and off.
        followed: is shown every draw.
    """
    first, n_sets, before = members[0], 0, None
    rng = random_of(request, seed, MOVES)
    for draw in draws_of(request, first.set_size, first.batch_size, seed):
        rows = draw.sets
        cells, effect = request.pool.expression[rows.ravel()].toarray(), np.zeros(1)
        by = np.repeat((n_sets + np.arange(len(rows))) % len(members), rows.shape[1])
        n_sets += len(rows)
        chance = rng.random(len(by))
        control = cells.mean(0, dtype=np.float64)
        for number, (member, of_stack) in enumerate(zip(members, effects, strict=True)):
            own, predicted = _of_member(member, request, rows, of_stack)
            effect = effect + own / len(members)
            if predicted is not None:
                mine = (by == number) & (chance < member.of_head)
                cells[mine] = predicted[mine]
        if followed is not None:
            followed.add((control, effect), before)
            before = control, effect
        cells = cells[: draw.n_cells]
        if len(members) > 1 or first.blend is not None:
            mean = np.maximum(request.pool.moments[0] + effect, 0.0)
            cells = move_to_mean(cells, mean, request.pool.donors, rng)
        yield rows.ravel()[: draw.n_cells], scipy.sparse.csr_matrix(cells)


def _of_member(
    member: Member, request: Request, rows: np.ndarray, of_stack: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """The effect (G,) that a member predicts, and its head's cells for sets of controls (B, S), if it counts."""
    pool, blend = request.pool, member.blend
    if blend is not None and blend.of_head == 0:
        return blend.effect({STACK: of_stack}), None
    basal = pool.embeddings[rows]
    cells = member.head_cells(basal, member.vectors[request.perturbation])
    if not np.isfinite(cells).all():
        raise InputError(f"The prediction of {request.perturbation} is not finite. Try --precision fp32.")
    mean = cells.mean(0, dtype=np.float64)
    if blend is None:
        return mean - pool.moments[0], cells
    parts = {STACK: of_stack, HEAD: mean - pool.moments[0]}
    if blend.weights.means[ANCHORED] > 0:
        parts[ANCHORED] = mean - member.head_cells(basal, member.control).mean(0, dtype=np.float64)
    return blend.effect(parts), cells


def real_cells(pool: Pool, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, scipy.sparse.csr_matrix]]:
    """The control cells `chosen` (n,), in blocks: which, and their expression (rows, G)."""
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        rows = chosen[start : start + ROWS_AT_ONCE]
        yield rows, pool.expression[rows]
