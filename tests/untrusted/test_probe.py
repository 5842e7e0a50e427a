"""Files that HDF5's library does not survive are one line; a pipe without a writer stands for one it never reads."""

from __future__ import annotations

import io
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
from sest.untrusted.probe import check_bytes, check_structure


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
    with pytest.raises(InputError, match=r"a\.h5 keeps HDF5's library busy for .* seconds: it is damaged"):
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


class Counted(io.BytesIO):
    """A file at a URL: how much of it is asked for."""

    n_read = 0

    def read(self, n: int | None = -1) -> bytes:
        data = super().read(n)
        self.n_read += len(data)
        return data


def test_of_a_file_elsewhere_only_some_bytes_are_read_and_a_crash_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    sound = Counted(path.read_bytes())
    check_bytes("https://lab.org/a.h5", sound)  # type: ignore[arg-type]
    assert 0 < sound.n_read < len(sound.getvalue()) // 20
    process = probe._child._process
    assert process is not None

    class Fatal(Counted):
        def read(self, n: int | None = -1) -> bytes:
            assert process is not None
            os.kill(process.pid, signal.SIGSEGV)
            process.wait()
            return super().read(n)

    with pytest.raises(InputError, match=r"https://lab.org/a.h5 crashes HDF5's library: it is damaged"):
        check_bytes("https://lab.org/a.h5", Fatal(path.read_bytes()))  # type: ignore[arg-type]
    check_bytes("https://lab.org/a.h5", Counted(path.read_bytes()[:3000]))  # type: ignore[arg-type]


def test_what_a_server_says_is_raised_and_the_next_file_is_read(tmp_path: Path) -> None:
    class Gone(Counted):
        def read(self, n: int | None = -1) -> bytes:
            raise InputError("gone")

    data = write(tmp_path / "a.h5").read_bytes()
    with pytest.raises(InputError, match="gone"):
        check_bytes("https://lab.org/a.h5", Gone(data))  # type: ignore[arg-type]
    check_bytes("https://lab.org/a.h5", Counted(data))  # type: ignore[arg-type]


def test_a_process_that_cannot_start_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe._child.stop()
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InputError, match="No process could be started that reads HDF5 files first"):
        check_structure(write(tmp_path / "a.h5"))
    monkeypatch.undo()
    check_structure(tmp_path / "a.h5")
