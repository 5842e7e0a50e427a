"""Files that HDF5's library does not survive are one line; a pipe without a writer stands for one it never reads."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from sest.errors import InputError
from sest.untrusted import probe
from sest.untrusted.probe import check_structure


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "a.h5")
    return tmp_path / "a.h5"


def write(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("obs")
        group.attrs["encoding"] = "x"
        group["large"] = np.zeros((2**12, 2**7))
        group["itself"] = group
        group["elsewhere"] = h5py.ExternalLink("gone.h5", "/x")
        group.create_dataset("compressed", data=np.zeros(100), compression="gzip", chunks=(10,))
    return path


def test_a_sound_file_passes_is_asked_for_once_and_damage_is_left_to_its_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    check_structure(path)
    process = probe._child._process
    began = time.monotonic()
    for _ in range(1000):
        check_structure(path)
    assert time.monotonic() - began < 0.5
    (tmp_path / "b.h5").write_bytes(path.read_bytes()[:3000])
    check_structure(tmp_path / "b.h5")
    assert probe._child._process is process and process is not None and process.poll() is None


def test_what_keeps_the_library_busy_for_ever_is_one_line_and_the_next_file_is_read(
    endless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    with pytest.raises(InputError, match=r"a\.h5 keeps HDF5's library busy for more than .* seconds: it is damaged"):
        check_structure(endless)
    monkeypatch.undo()
    check_structure(write(endless.with_name("b.h5")))


def test_what_crashes_the_library_is_one_line_and_the_next_file_is_read(endless: Path) -> None:
    check_structure(write(endless.with_name("b.h5")))
    process = probe._child._process
    assert process is not None
    timer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGSEGV))
    timer.start()
    with pytest.raises(InputError, match=r"a\.h5 crashes HDF5's library: it is damaged. Copy or download it again"):
        check_structure(endless)
    timer.join()
    check_structure(write(endless.with_name("c.h5")))
