"""How much head and baselines are to count in a run's predictions: fitted at the end of training, or by `sest blend`.

Shapes: K validation pairs, G genes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sest.blend.blend import HEAD, STACK, Blend, fit_blend
from sest.cells.split_file import VAL
from sest.config import BlendConfig, TrainConfig
from sest.data.dataset import Dataset, read_dataset
from sest.data.resident import ResidentCells, resident_cells
from sest.errors import InputError
from sest.evaluation.means import query_of, split_ceilings
from sest.evaluation.pairs import HeldOut, head_effects, held_out, measured_effects
from sest.head.model import StateTransition
from sest.machine.devices import autocast, choose_device, choose_precision
from sest.runs.checkpoint import add_blend, find_checkpoint, sound_checkpoint
from sest.runs.provenance import check_data, find_data, saw_the_same_split
from sest.runs.run_folder import stored_features

logger = logging.getLogger(__name__)

FEW_PAIRS = 8  # beside the four perturbations that the prior of the weights counts as


def blend_run(run: Path, config: BlendConfig) -> tuple[Path, list[str]]:
    """Fit the blend of a run's checkpoint on the run's validation pairs, and keep it in the checkpoint.

    Args:
        run: a run folder, or one of its checkpoint folders.

    Returns:
        the checkpoint's folder, and what the parts count (see `say_blend`).

    Raises:
        InputError, CacheError: no such checkpoint, or its cache, features or splits are not there or are others.
    """
    checkpoint = sound_checkpoint(find_checkpoint(run, config.checkpoint))
    device = choose_device(config.device)
    train_config, cache, _ = find_data(checkpoint, config.cache, config.perturbations)
    data = read_dataset(cache, train_config, stored=stored_features(checkpoint))
    check_data(checkpoint, data)
    if not saw_the_same_split(checkpoint, data):
        raise InputError(
            f"{checkpoint.folder} does not say which cells of {cache.path} it was trained on, so none are known to be "
            "new to it: there is nothing to fit a blend on."
        )
    held = held_out(data, train_config, VAL, train_config.val_sets)
    nothing = np.array(
        [c.context for c in split_ceilings(data, VAL, train_config.seed, of_split=False) if c.verdict], int
    )
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, device)
    cast = partial(autocast, device, choose_precision("auto", device, training=False))
    model = checkpoint.model().to(device) if checkpoint.has_head else None
    blend = blend_of(model, data, cells, held, nothing, train_config, cast)
    add_blend(checkpoint.folder, blend)
    return checkpoint.folder, say_blend(blend, data, held)


def blend_of(
    model: StateTransition | None,
    data: Dataset,
    cells: ResidentCells,
    held: HeldOut,
    nothing: np.ndarray,
    config: TrainConfig,
    cast: Callable[[], AbstractContextManager[Any]],
) -> Blend:
    """Fit the weights of a head (None: of the stack alone) on the validation pairs `held`.

    `nothing`: codes of contexts whose real cells show no effect: what a head is worth does not show there.
    """
    pairs = held.pairs
    control = pairs.control
    parts = {STACK: measured_effects(data, pairs, held.stack)}
    learned = np.ones(len(control), bool)
    if model is not None:
        learned &= ~np.isin(pairs.context, nothing)
        parts |= head_effects(model, data, cells, held, config.batch_size, cast)
        never = set(data.never_learned())
        learned &= np.array([data.labels.perturbations[p] not in never for p in pairs.perturbation])
        if not learned.any():
            logger.info(
                "No validation pair has an effect that can be measured and a perturbation that can be learned: what "
                "the head is worth is not known, and the stack is taken as it is."
            )
    chosen = {name: effects[learned] for name, effects in parts.items()}
    observed = (pairs.observed - control)[learned]
    return fit_blend(held.fitted, chosen, observed, pairs.context[learned], pairs.perturbation[learned], config.seed)


def say_blend(blend: Blend, data: Dataset, held: HeldOut) -> list[str]:
    """What the parts count in the contexts of the validation pairs, a sentence each, and how sure that is."""
    weights = blend.weights
    if not weights.n_pairs:
        return [*blend.said(query_of(data, held.pairs)), "Not fitted: there is no validation pair to fit them on."]
    spread = ", ".join(f"{name} ± {sd:.2f}" for name, sd in weights.spread.items())
    fitted = f"Fitted on {weights.n_pairs:,} validation pairs (spread over resamples: {spread})."
    if HEAD in weights.means and weights.n_pairs < FEW_PAIRS:
        fitted += (
            " These are few, so the head counts little whatever it is worth: hold out more (a val split, or "
            "--val-fraction)."
        )
    return [*blend.said(query_of(data, held.pairs)), fitted]
