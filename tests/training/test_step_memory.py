"""--batch-size auto: how many sets a step has memory for; and how long a step is."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sest.training.step_memory
from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.notes import Notes
from sest.errors import InputError
from sest.head.loss import energy_distance, mean_squared_error
from sest.head.model import HeadSizes, StateTransition, new_model
from sest.machine.memory import SHARE
from sest.progress import reporting
from sest.runs.run_folder import read_run_config, resumed_config
from sest.training.step_memory import (
    BYTES_A_PARAMETER,
    LARGEST_BATCH,
    bytes_of_set,
    largest_batch,
)
from sest.training.train import train

SIZES = HeadSizes(dim=8, n_features=5, n_genes=3000, hidden=16, n_layers=1, n_heads=2, ffn=32)


def head(sizes: HeadSizes = SIZES) -> StateTransition:
    return new_model(sizes, 0).train()


def test_a_sets_bytes_grow_with_cells_and_genes_and_leave_the_model_as_it_was() -> None:
    model = head()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = bytes_of_set(model, SIZES, 32, energy_distance, nullcontext)
    wide = 32 * SIZES.n_genes * 4
    assert 5 * wide < small < 12 * wide  # the predicted and observed cells, their gradient and copies are most of it
    # twice the cells: twice the bytes, but for the (S, S) matrices, rows that fill up, and the encoded perturbation
    assert bytes_of_set(model, SIZES, 64, energy_distance, nullcontext) == pytest.approx(2 * small, rel=0.05)
    assert bytes_of_set(model, SIZES, 32, mean_squared_error, nullcontext) > 4 * wide
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_the_copies_of_weights_that_autocast_makes_are_no_part_of_a_set() -> None:
    sizes = HeadSizes(dim=8, n_features=5, n_genes=20, hidden=256, n_layers=2, n_heads=2, ffn=512)
    model = head(sizes)
    halves = 2 * sum(p.numel() for p in model.parameters())
    with_halves = bytes_of_set(model, sizes, 2, energy_distance, lambda: torch.autocast("cpu", torch.bfloat16))
    assert with_halves < 0.2 * halves


def test_the_batch_is_the_largest_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = head()
    one = bytes_of_set(model, SIZES, 8, energy_distance, nullcontext)
    fixed = BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())

    def fits(n_sets: float) -> int:
        monkeypatch.setattr(
            sest.training.step_memory, "available_bytes", lambda: int((n_sets * one + fixed + 1) / SHARE) + 1
        )
        return largest_batch(model, SIZES, 8, energy_distance, nullcontext)

    assert [fits(n) for n in (1, 1.9, 2, 3.99, 4, 31, 1e6)] == [1, 1, 2, 2, 4, 16, LARGEST_BATCH]
    with pytest.raises(InputError, match=r"A set of 8 cells takes 0\.0 GB .*smaller --set-size or --hidden"):
        fits(0.9)


def test_what_was_chosen_is_the_runs_batch_size_from_then_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_cache(tmp_path / "s.zarr", [small_screen()])
    monkeypatch.setattr(sest.training.step_memory, "LARGEST_BATCH", 4)
    notes, run = Notes(), tmp_path / "run"
    with reporting(notes):
        train(cache, run, small_config(batch_size=0, max_steps=2))
    assert "4 sets a batch fit the free memory." in notes.notes
    assert read_run_config(run)[0]["batch_size"] == 4
    monkeypatch.setattr(sest.training.step_memory, "LARGEST_BATCH", 64)
    config = resumed_config(run, "auto", {"batch_size": 0, "max_steps": 3})
    assert config.batch_size == 4
    train(cache, run, config, resume="auto")


def test_the_measured_bytes_are_what_a_step_takes_on_the_cpu() -> None:
    """Against the growth of the process's memory between one set and five, in a fresh process."""
    import subprocess
    import sys

    code = """
import torch
from contextlib import nullcontext
from sest.head.loss import energy_distance
from sest.head.model import HeadSizes, new_model
from sest.head.dropout import dropout_keys
from sest.training.step_memory import bytes_of_set
sizes = HeadSizes(dim=64, n_features=64, n_genes=8000, hidden=128, n_layers=2, n_heads=4, ffn=256)
model = new_model(sizes, 0).train()
one = bytes_of_set(model, sizes, 64, energy_distance, nullcontext)
def peak(n):
    target = torch.zeros(n, 64, 8000).add_(1)
    predicted = model(torch.randn(n, 64, 64), torch.randn(n, 64), dropout_keys(0, torch.arange(n)))
    energy_distance(predicted, target).sum().backward()
    # not ru_maxrss, which begins at what the process that started this one had
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
first = peak(30)
print(one, (peak(70) - first) / 40)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    said, grown = map(float, done.stdout.split())
    assert 0.6 < grown / said < 1.15, (said, grown)  # an estimate that is rather too large than too small


def test_storages_that_several_tensors_share_are_counted_once() -> None:
    model = head()

    def criterion(predicted: Tensor, target: Tensor) -> Tensor:
        return (predicted * predicted.flatten().view_as(predicted)).sum((1, 2))

    plain = bytes_of_set(model, SIZES, 8, lambda predicted, target: predicted.square().sum((1, 2)), nullcontext)
    assert bytes_of_set(model, SIZES, 8, criterion, nullcontext) == plain
