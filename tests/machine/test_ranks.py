"""machine/ranks.py: which of how many processes this one is, and which GPU and pieces of the work are its own."""

from __future__ import annotations

import pytest
import torch

from sest.errors import InputError
from sest.machine.ranks import SINGLE, Ranks, device_of_rank, ranks_of

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


def test_ranks_come_from_the_options_or_from_torchrun_or_there_is_one_process() -> None:
    assert ranks_of(None, None, {}) == SINGLE == Ranks(0, 1)
    assert ranks_of(None, None, {"RANK": "3", "WORLD_SIZE": "9"}) == SINGLE  # set by something else than torchrun
    assert ranks_of(None, None, TORCHRUN) == Ranks(2, 4)
    assert ranks_of(0, 3, TORCHRUN) == Ranks(0, 3)
    for rank, world_size, message in (
        (1, None, "belong together"),
        (None, 2, "belong together"),
        (2, 2, "ranks run from 0 to 1"),
        (-1, 2, "ranks run from 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            ranks_of(rank, world_size, {})


def test_every_piece_of_work_has_exactly_one_owner() -> None:
    for world_size in (1, 2, 3, 7):
        owners = [[Ranks(rank, world_size).owns(n) for rank in range(world_size)] for n in range(20)]
        assert all(sum(row) == 1 for row in owners)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_with_torchrun_every_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of_rank(device, TORCHRUN) == "cuda:2"
    assert device_of_rank("cuda:1", TORCHRUN) == "cuda:1"
    assert device_of_rank(device, {}) == device


def test_a_device_that_was_named_is_kept_and_without_gpus_auto_stays_auto() -> None:
    assert device_of_rank("cpu", TORCHRUN) == "cpu"
    assert device_of_rank("auto", {}) == "auto"
    assert device_of_rank("auto", TORCHRUN) in ("auto", "cuda:2")
