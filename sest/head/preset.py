"""Presets of a training: the head, the steps and the rate that fit the data.

`full` is the recipe of upstream's heads, the defaults of every option, made for the Virtual Cell Challenge's cells. On
a screen of some thousand cells it takes days on a CPU. What did well there (benchmarks/README.md, Real cells and
Recipe) is `small`: a head of 128 units without dropout, about 30 passes over the cells at ten times the rate, and the
average of the last weights. Twice the width and two layers are a little better for four times the work, which `medium`
spends where there are more cells, or a GPU. Where small ends and full begins is judgement: sizes between were not
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

AUTO, SMALL, MEDIUM, FULL = "auto", "small", "medium", "full"
SHAPE = ("hidden", "n_layers", "n_heads", "ffn", "n_encoder_layers", "n_decoder_layers")  # what a head's size is

MEDIUM_CELLS, MEDIUM_CELLS_GPU = 20_000, 5_000  # training cells from which on it is medium, on a CPU and on a GPU
FULL_CELLS, FULL_PERTURBATIONS, FULL_GENES = 100_000, 50, 2_000  # all three, for full
EPOCHS = 30  # passes over the training cells of small and medium
LEAST_STEPS, MOST_STEPS = 1_680, 40_000
VALIDATIONS = 16  # in all

HEADS: dict[str, dict[str, Any]] = {  # options of sest.config.TrainConfig; full is what they are without any
    SMALL: {"hidden": 128, "n_layers": 1, "n_heads": 4, "ffn": 256, "lr": 1e-3},
    MEDIUM: {"hidden": 256, "n_layers": 2, "n_heads": 4, "ffn": 512, "lr": 5e-4},
}
OPTIONS = frozenset(  # whose values a preset chooses, unless they are given
    "max_steps batch_size set_size lr ema hidden n_layers n_heads ffn n_encoder_layers n_decoder_layers dropout "
    "control_targets val_every checkpoint_every log_every".split()
)
CELLS_A_STEP, LARGEST_SET = {SMALL: 256, MEDIUM: 1024}, {SMALL: 32, MEDIUM: 64}  # more sets of fewer cells did better


@dataclass(frozen=True)
class TrainingData:
    """How much there is to learn from, and on what."""

    n_cells: int  # perturbed cells that train
    n_perturbations: int  # of these cells
    n_genes: int
    set_size: int  # cells that half of the training pairs fill
    unseen: bool  # a cell type is held out whole, so that no target shows it
    on_gpu: bool


def level_of(preset: str, data: TrainingData) -> str:
    """Which of small, medium and full a preset is for these data."""
    if preset != AUTO:
        return preset
    large = data.n_cells >= FULL_CELLS and data.n_perturbations >= FULL_PERTURBATIONS and data.n_genes >= FULL_GENES
    if large:
        return FULL
    return MEDIUM if data.n_cells >= (MEDIUM_CELLS_GPU if data.on_gpu else MEDIUM_CELLS) else SMALL


def preset_values(preset: str, data: TrainingData, *, max_steps: int | None = None) -> dict[str, Any]:
    """Options of a training that a preset stands for; those that it leaves at their defaults are not in it.

    Args:
        preset: auto, small, medium or full.
        data: what trains.
        max_steps: the steps, where they were given; then validations and checkpoints are spread over these.
    """
    level = level_of(preset, data)
    if level == FULL:  # sets of 128, as upstream's, unless the data choose
        return {"set_size": data.set_size} if preset == AUTO else {}
    set_size = min(data.set_size, LARGEST_SET[level])
    passes = math.ceil(EPOCHS * data.n_cells / CELLS_A_STEP[level] / 20) * 20
    steps = max_steps or min(max(passes, LEAST_STEPS), MOST_STEPS)
    return {
        **HEADS[level],
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "dropout": 0.0,  # its noise passes for variation between cells, and is gone at prediction
        "ema": 0.99,
        "control_targets": data.unseen,
        "max_steps": steps,
        "set_size": set_size,
        "batch_size": CELLS_A_STEP[level] // set_size,
        "val_every": max(steps // VALIDATIONS, 1),
        "checkpoint_every": max(steps // 4, 1),
        "log_every": min(max(steps // 80, 1), 50),
    }


def why(preset: str, data: TrainingData) -> str:
    """What a preset was chosen from, and where the others begin, as a sentence."""
    medium = MEDIUM_CELLS_GPU if data.on_gpu else MEDIUM_CELLS
    device = "a GPU" if data.on_gpu else "a CPU"
    chosen = (
        f"{data.n_cells:,} training cells of {data.n_perturbations:,} perturbations, {data.n_genes:,} genes, {device}"
    )
    if preset != AUTO:
        return f"for {chosen}"
    return (
        f"chosen for {chosen} (on {device} medium is from {medium:,} cells; full from {FULL_CELLS:,} cells, "
        f"{FULL_PERTURBATIONS} perturbations and {FULL_GENES:,} genes)"
    )
