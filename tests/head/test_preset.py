"""Which head, steps and rate fit which data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sest.config import TrainConfig
from sest.head.model import HeadSizes, StateTransition, n_parameters
from sest.head.preset import (
    AUTO,
    FULL,
    HEADS,
    MEDIUM,
    OPTIONS,
    SHAPE,
    SMALL,
    TrainingData,
    level_of,
    preset_values,
    why,
)

CHALLENGE = TrainingData(150_000, 150, 18_080, 128, unseen=False, on_gpu=True)
SCREEN = TrainingData(14_000, 25, 299, 128, unseen=False, on_gpu=False)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("preset", [AUTO, FULL])
def test_on_the_challenges_cells_it_is_the_full_recipe(preset: str, on_gpu: bool) -> None:
    config = TrainConfig(**preset_values(preset, replace(CHALLENGE, on_gpu=on_gpu)))
    assert (config.lr, config.max_steps, config.batch_size, config.set_size) == (1e-4, 40_000, 16, 128)
    assert (config.ema, config.dropout, config.control_targets) == (0.0, 0.1, False)
    shape = {name: getattr(config, name) for name in SHAPE} | {"ffn": 4 * config.hidden}
    with torch.device("meta"):
        head = StateTransition(HeadSizes(dim=512, n_features=5120, n_genes=18_080, **shape))
    assert n_parameters(head) == 48_931_616


def test_on_a_small_screen_it_is_what_was_measured_there() -> None:
    """benchmarks/real_cells.py: 1,680 steps of 8 sets of 32 cells, 128 units, one layer, MLPs of two, no dropout."""
    config = TrainConfig(**preset_values(AUTO, SCREEN))
    assert (config.hidden, config.n_layers, config.n_heads, config.ffn) == (128, 1, 4, 256)
    assert (config.n_encoder_layers, config.n_decoder_layers, config.dropout) == (2, 2, 0.0)
    assert (config.max_steps, config.batch_size, config.set_size, config.lr, config.ema) == (1_680, 8, 32, 1e-3, 0.99)
    assert config.val_every == 105 and config.checkpoint_every == 420 and config.log_every == 21


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, SMALL),
        ({"on_gpu": True}, MEDIUM),
        ({"n_cells": 19_999}, SMALL),
        ({"n_cells": 20_000}, MEDIUM),
        ({"n_cells": 4_999, "on_gpu": True}, SMALL),
        ({"n_cells": 10**7}, MEDIUM),  # 25 perturbations of 299 genes
        ({"n_cells": 100_000, "n_perturbations": 50, "n_genes": 2_000}, FULL),
        ({"n_cells": 99_999, "n_perturbations": 50, "n_genes": 2_000}, MEDIUM),
        ({"n_cells": 100_000, "n_perturbations": 49, "n_genes": 2_000}, MEDIUM),
        ({"n_cells": 100_000, "n_perturbations": 50, "n_genes": 1_999}, MEDIUM),
    ],
)
def test_each_begins_where_it_says(changes: dict[str, Any], level: str) -> None:
    assert level_of(AUTO, replace(SCREEN, **changes)) == level
    assert {level_of(preset, replace(SCREEN, **changes)) for preset in (SMALL,)} == {SMALL}  # what is named stays


def test_steps_are_thirty_passes_between_those_measured_and_those_of_full() -> None:
    cells = [1_000, 14_000, 19_000, 30_000, 99_000, 10**9]
    found = [preset_values(AUTO, replace(SCREEN, n_cells=n)) for n in cells]
    assert [values["max_steps"] for values in found] == [1_680, 1_680, 2_240, 1_680, 2_920, 40_000]
    for n, values in zip(cells[2:5:2], found[2:5:2], strict=True):
        passes = values["max_steps"] * values["batch_size"] * values["set_size"] / n
        assert 30 <= passes < 31


def test_a_step_has_as_many_cells_whatever_the_sets_hold() -> None:
    for preset, cells in ((SMALL, 256), (MEDIUM, 1024)):
        for set_size in (8, 16, 32, 64, 128):
            values = preset_values(preset, replace(SCREEN, set_size=set_size))
            assert values["batch_size"] * values["set_size"] == cells and values["set_size"] <= set_size


def test_steps_that_were_given_are_validated_as_often_and_kept_four_times() -> None:
    values = preset_values(SMALL, SCREEN, max_steps=160)
    assert (values["max_steps"], values["val_every"], values["checkpoint_every"]) == (160, 10, 40)
    assert preset_values(SMALL, SCREEN, max_steps=1)["val_every"] == 1


def test_a_cell_type_held_out_whole_is_learned_from_its_controls() -> None:
    assert preset_values(SMALL, replace(SCREEN, unseen=True))["control_targets"]
    assert "control_targets" not in preset_values(AUTO, replace(CHALLENGE, unseen=True))


def test_what_the_help_says_a_preset_chooses_is_what_it_chooses() -> None:
    assert set(preset_values(SMALL, SCREEN)) == set(preset_values(MEDIUM, SCREEN)) == OPTIONS


def test_every_value_is_an_option_of_training_and_heads_divide_the_width() -> None:
    for preset in HEADS:
        config = TrainConfig(**preset_values(preset, SCREEN))
        assert config.hidden % config.n_heads == 0


def test_the_reason_names_the_data_and_where_the_others_begin() -> None:
    said = why(AUTO, SCREEN)
    assert "14,000 training cells of 25 perturbations, 299 genes, a CPU" in said and "medium is from 20,000" in said
    assert "medium" not in why(SMALL, SCREEN)
