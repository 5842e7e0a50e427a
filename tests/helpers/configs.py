"""A configuration that trains in no time."""

from __future__ import annotations

from typing import Any

from sest.config import TrainConfig


def small_config(**changes: Any) -> TrainConfig:
    """A head of some thousand parameters and steps of milliseconds: 3 sets of 4 cells, 12 steps, one thread."""
    values: dict[str, Any] = {
        "max_steps": 12,
        "batch_size": 3,
        "set_size": 4,
        "lr": 1e-3,
        "hidden": 16,
        "n_layers": 1,
        "n_heads": 2,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "val_every": 4,
        "checkpoint_every": 4,
        "log_every": 1,
        "num_workers": 0,
        "device": "cpu",
    }
    return TrainConfig.from_values({**values, **changes}, "small_config")
