"""How much memory there is to take, and how much is taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

SHARE = 0.8  # of what is available that data may take; the rest is for the step


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process can take without swapping: of the machine, or of its container or job where that has less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup of version 2, or its limit is "max"
        return free
    return min(free, max(limit - used + int(stat.get("inactive_file", 0)), 0))


def resident_bytes() -> int:
    """What this process has in the host's memory now."""
    return int(psutil.Process().memory_info().rss)


def used_bytes(device: torch.device) -> int:
    """What training takes: a GPU's most so far, or what this process has in memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()
