"""The processes of one training: `torchrun --nproc-per-node N -m sest train ...` starts N that share every batch.

Each takes every N-th set of a batch; gradients are averaged by DistributedDataParallel. Alone, everything here does
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sest.errors import InputError, TrainingFailed
from sest.machine.ranks import SINGLE, Ranks

LONGEST_WAIT = timedelta(
    days=7
)  # the first process may write the values of all cells; one that ends is noticed at once


@dataclass(frozen=True)
class Team:
    """This process among those that train together."""

    ranks: Ranks
    hosts: Any = None  # process group over the hosts, beside the GPUs' own

    @property
    def leads(self) -> bool:
        """Whether this process writes files and lines."""
        return self.ranks.rank == 0

    @property
    def size(self) -> int:
        return self.ranks.world_size

    def ddp(self, model: nn.Module, gradients: str) -> nn.Module:
        """The model, with gradients averaged over the team after every backward pass; `gradients`: fp32 or bf16."""
        if self.size == 1:
            return model
        network = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)  # one copy of them
        if gradients == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            network.register_comm_hook(None, bf16_compress_hook)
        return network

    def no_sync(self, network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: all but the last one of a step add up gradients in each process alone."""
        if self.size == 1 or last:
            return nullcontext()
        assert isinstance(network, nn.parallel.DistributedDataParallel)
        return network.no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the team, in place and without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; does not wait for the devices."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.hosts)
        return int(numbers)

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)


ALONE = Team(SINGLE)


@contextmanager
def join_team(ranks: Ranks, device: torch.device, environment: Mapping[str, str] = os.environ) -> Iterator[Team]:
    """Join the processes that torchrun started (its environment says where they meet).

    Raises:
        InputError: fewer GPUs than processes on this machine.
        TrainingFailed: another process has ended, as what was waited for from it shows.
    """
    if ranks.world_size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        here, gpus = int(environment.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus and "CUDA_VISIBLE_DEVICES" not in environment:  # else each process may be shown its own
            raise InputError(
                f"{here} processes, but this machine has {gpus} CUDA GPUs: each needs its own. Start {gpus} "
                f"(torchrun --nproc-per-node {gpus}), or train with --device cpu."
            )
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=ranks.rank, world_size=ranks.world_size)
    try:
        yield Team(ranks, dist.new_group(backend="gloo", timeout=LONGEST_WAIT))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):  # gloo's own have no type
            raise
        raise TrainingFailed(
            f"Another of the {ranks.world_size} processes has ended, or cannot be reached: what it said is why. Start "
            "all of them again with --resume auto: they go on from the last checkpoint."
        ) from error
    finally:
        dist.destroy_process_group()
