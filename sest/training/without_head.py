"""A run without a head (`--head none`): the stack of baselines alone, in a run folder like any other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from sest import __version__
from sest.blend.blend import Blend
from sest.config import TrainConfig
from sest.data.dataset import Dataset
from sest.data.resident import resident_cells
from sest.errors import InputError
from sest.head.loss import make_loss
from sest.machine.devices import choose_device
from sest.machine.team import ALONE
from sest.runs.checkpoint import save_checkpoint
from sest.runs.curves import METRICS as SCORES
from sest.runs.known import CELLS, cells_to_keep, features_to_keep
from sest.runs.run_folder import METRICS, append_metrics, find_start, opened_run
from sest.runs.schema import BEST
from sest.training.blend import blend_of
from sest.training.identity import identity_of, projection_to_keep
from sest.training.prepare import head_sizes, read_in_turn, say_what_is_not_learned, settled
from sest.training.trainer import RunState
from sest.training.validate import Validator


def fit_without_head(
    cache: Path,
    run: Path,
    config: TrainConfig,
    *,
    resume: str | None = None,
    on_start: Callable[[Dataset], None] | None = None,
) -> tuple[Validator, Blend, dict[str, Any]]:
    """Fit the stack, validate it and write best/.

    Returns:
        the validation, the stack as a blend of one part, and the line of metrics.jsonl.

    Raises:
        InputError, CacheError: bad input; nothing was written.
    """
    if resume is not None:
        raise InputError("A run without a head (--head none) is done at once: there is nothing to resume.")
    if config.init_from is not None or config.freeze is not None:
        raise InputError(
            "A run without a head (--head none) has none to go on with: leave --init-from and --freeze out."
        )
    if config.preset is not None:
        raise InputError("--preset chooses a head, and --head none leaves it out. Leave one of the two out.")
    find_start(run, None, config)
    device = choose_device(config.device)
    data = read_in_turn(cache, config, None, ALONE)
    config = settled(config, data)
    say_what_is_not_learned(data)
    if on_start is not None:
        on_start(data)
    identity = identity_of(data, config, "fp32")
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, device, on_device=False)
    validator = Validator(data, cells, config, device, make_loss(config.loss, torch.float32))
    held, scores = validator.held, validator.baselines
    blend = blend_of(None, data, cells, held, validator.not_measurable, config, nullcontext)
    line = {"step": 0, **{m: scores[f"{m}_stack"] for m in SCORES if f"{m}_stack" in scores}, **scores}
    state = RunState(0, 0, line["val_loss"], line["val_loss"])
    with opened_run(run, config, data, None, 0):
        append_metrics(run / METRICS, line)
        save_checkpoint(
            run / BEST,
            {
                "sest_version": __version__,
                "step": 0,
                "run": vars(state),
                "scaler": {},
                "sizes": head_sizes(data, config).to_values(),
                "trainable_parameters": 0,
                "genes": list(data.targets.genes),
                CELLS: cells_to_keep(data),
                **identity,
            },
            None,
            blend=blend,
            projection=projection_to_keep(data),
            features=features_to_keep(data),
        )
    return validator, blend, line
