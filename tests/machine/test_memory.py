"""machine/memory.py: a container's limit counts where it is below the machine's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from sest.machine.memory import available_bytes, resident_bytes, used_bytes

GB = 10**9


@pytest.fixture(autouse=True)
def _machine_with_8_gb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 8 * GB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def cgroup(folder: Path, limit: str, used: int, stat: str = "anon 5\ninactive_file 0\n") -> Path:
    """The files of a container (cgroup v2)."""
    folder.mkdir()
    for name, content in (("max", limit), ("current", str(used)), ("stat", stat)):
        (folder / f"memory.{name}").write_text(content)
    return folder


def test_without_a_container_or_a_limit_it_is_what_the_machine_has_free(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none") == 8 * GB
    assert available_bytes(cgroup(tmp_path / "unlimited", "max\n", 3 * GB)) == 8 * GB


def test_a_containers_limit_counts_less_what_it_uses_but_for_files_it_could_forget(tmp_path: Path) -> None:
    assert available_bytes(cgroup(tmp_path / "a", f"{4 * GB}\n", 3 * GB)) == 1 * GB
    stat = f"anon 5\ninactive_file {2 * GB}\nactive_file {1 * GB}\n"
    assert available_bytes(cgroup(tmp_path / "b", f"{4 * GB}\n", 3 * GB, stat)) == 3 * GB
    assert available_bytes(cgroup(tmp_path / "c", f"{4 * GB}\n", 3 * GB, "anon 5\n")) == 1 * GB
    assert available_bytes(cgroup(tmp_path / "d", f"{40 * GB}\n", 3 * GB)) == 8 * GB  # the machine has less
    assert available_bytes(cgroup(tmp_path / "full", f"{3 * GB}\n", 4 * GB)) == 0


def test_memory_in_use_is_that_of_this_process() -> None:
    before = resident_bytes()
    held = np.ones(2 * 10**7)  # 160 MB, every page touched
    assert resident_bytes() - before == pytest.approx(held.nbytes, rel=0.1)
    assert used_bytes(torch.device("cpu")) == pytest.approx(resident_bytes(), rel=0.1)
