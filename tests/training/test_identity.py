"""A checkpoint is continued with its own data and configuration only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.runs import files, metrics
from sest.errors import InputError
from sest.runs.run_folder import resumed_config
from sest.training.train import train


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"batch_size": 4}, "config.batch_size: 3 there, 4 now"),
        ({"seed": 1}, "config.seed: 0 there, 1 now"),
        ({"loss": "mse"}, 'config.loss: "energy" there, "mse" now'),
        ({"hidden": 8}, "config.hidden: 16 there, 8 now; sizes.hidden: 16 there, 8 now; sizes.ffn: 64 there, 32 now"),
        ({"val_sets": 1}, "config.val_sets: 0 there, 1 now"),
        ({"dropout": 0.2, "accumulate": 2}, "config.accumulate: 1 there, 2 now; config.dropout: 0.1 there, 0.2 now"),
    ],
)
def test_resuming_with_another_configuration_is_refused_with_the_difference(
    cache: Path, whole: Path, tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(InputError) as error:
        train(cache, run, small_config(**changes), resume="auto")
    assert difference in str(error.value) and "another --run folder" in str(error.value)
    assert files(run) == files(whole) and metrics(run) == metrics(whole)
    with pytest.raises(InputError, match=r"--[a-z-]+ .* would make another run; this one has"):
        resumed_config(run, "auto", changes)


def test_resuming_with_another_store_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    other = write_cache(tmp_path / "other.zarr", [small_screen(seed=5)])
    with pytest.raises(InputError, match=r"is of another run \(another cache"):
        train(other, run, small_config(), resume="auto")
    narrow = write_cache(tmp_path / "narrow.zarr", [small_screen(sizes={"P": 8, "Q": 5})])
    with pytest.raises(InputError, match=r"one-hot features of other perturbations"):
        train(narrow, run, small_config(), resume="auto")
    assert files(run) == files(whole)
