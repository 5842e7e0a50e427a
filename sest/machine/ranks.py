"""Several processes that share one job without talking to each other: which of how many this one is.

torchrun says it in RANK, WORLD_SIZE and LOCAL_RANK; a SLURM array is told with --rank and --world-size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sest.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def owns(self, number: int) -> bool:
        """Whether piece `number` of the work is this process's: every world_size-th is."""
        return number % self.world_size == self.rank


SINGLE = Ranks()


def ranks_of(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Ranks:
    """From --rank and --world-size, else from torchrun's environment, else one process.

    Raises:
        InputError: one of the two without the other, or a rank that is not below the world size.
    """
    if rank is None and world_size is None:
        if "TORCHELASTIC_RUN_ID" not in environment:  # RANK alone may be some other program's
            return SINGLE
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank is None or world_size is None:
        raise InputError("--rank and --world-size belong together: which process this is, and of how many.")
    if not 0 <= rank < world_size:
        raise InputError(f"--rank {rank} of --world-size {world_size}: ranks run from 0 to {world_size - 1}.")
    return Ranks(rank, world_size)


def device_of_rank(device: str, environment: Mapping[str, str]) -> str:
    """With torchrun and --device auto or cuda every process takes a GPU of its own, where there are any."""
    if device in ("auto", "cuda") and "TORCHELASTIC_RUN_ID" in environment:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{int(environment['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device
