"""Batches in order, prepared ahead by threads, divided among processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.data.batches import BatchSource
from sest.data.dataset import Dataset, read_dataset
from sest.data.resident import Batch, resident_cells
from sest.data.sampler import SetSampler
from sest.machine.ranks import SINGLE, Ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A count file and a log1p file: every path of the gathering is used."""
    groups = [small_screen("a"), small_screen("b", scale="log1p", seed=1)]
    return read_dataset(write_cache(tmp_path_factory.mktemp("s") / "s.zarr", groups), small_config())


def batches(data: Dataset, n_workers: int, ranks: Ranks = SINGLE, on_device: bool = False) -> Iterator[Batch]:
    """Copies of batches 0 .. 19, then of 19 and 3 again, as after running out of memory."""
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, CPU, on_device=on_device)
    with closing(BatchSource(sampler, cells, 4, n_workers, ranks)) as source:
        for number in (*range(20), 19, 3):
            yield Batch(**{key: tensor.clone() for key, tensor in source.get(number).items()})  # type: ignore


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("basal", "perturbation", "target", "number"))


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("n_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(data: Dataset, n_workers: int, on_device: bool) -> None:
    for alone, ahead in zip(batches(data, 0), batches(data, n_workers, on_device=on_device), strict=True):
        assert alone["basal"].shape == (4, 4, 6) and alone["target"].shape == (4, 4, 20)
        assert alone["perturbation"].shape == alone["number"].shape == (4,)
        if on_device:  # log1p of torch, not of numba: float32 rounding
            torch.testing.assert_close(alone["target"], ahead["target"], rtol=3e-7, atol=0)
            ahead["target"] = alone["target"]
        assert same(alone, ahead)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_divide_every_batch_without_changing_it(data: Dataset, world_size: int) -> None:
    parts = [batches(data, 1, Ranks(rank, world_size)) for rank in range(world_size)]
    for whole, *mine in zip(batches(data, 0), *parts, strict=True):
        for rank, part in enumerate(mine):
            assert same(part, Batch(**{key: t[rank::world_size] for key, t in whole.items()}))  # type: ignore


def test_a_batch_is_good_until_the_next_is_asked_for_and_its_memory_is_used_again(data: Dataset) -> None:
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, CPU)
    with closing(BatchSource(sampler, cells, 3, 2)) as source:
        places = set()
        for number in range(30):
            batch = source.get(number)
            places.add(batch["target"].data_ptr())
            rows = sampler.sets(np.arange(3 * number, 3 * number + 3))["targets"]
            assert torch.equal(batch["target"], cells.expression(rows))
        assert len(places) <= 4  # one in use, two ahead, one between
        assert source.waited > 0


def test_an_error_while_a_batch_is_prepared_reaches_the_caller(data: Dataset) -> None:
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    cells = resident_cells(data.targets, data.embeddings, np.array([len(data.labels)]), CPU)
    with closing(BatchSource(sampler, cells, 3, 2)) as source, pytest.raises(AssertionError, match="no control"):
        source.get(0)
