"""Pickles nobody vouches for: what is hostile or damaged is refused in one line and never runs."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.pickles import Pickled, pretend_module
from sest.errors import InputError
from sest.untrusted.unpickle import (
    StandIn,
    allowed_in_checkpoint,
    allowed_in_dictionary,
    read_checkpoint,
    read_dictionary,
    read_pickle,
    read_plain_pickle,
)


@pytest.mark.parametrize("allowed", [allowed_in_checkpoint, allowed_in_dictionary])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, r"builtins\.eval"),
        (exec, r"builtins\.exec"),
        (getattr, r"builtins\.getattr"),
        (__import__, r"builtins\.__import__"),
        (shutil.rmtree, r"shutil\.rmtree"),
        (torch.hub.load, r"torch\.hub\.load"),
    ],
)
def test_functions_off_the_short_list_are_refused_by_name(
    function: Callable[..., Any], name: str, allowed: Callable[[str], bool], tmp_path: Path
) -> None:
    torch.save({"a": torch.ones(2), "b": Pickled(function, f"open({str(tmp_path / 'ran')!r}, 'w')")}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=name):
        read_pickle(tmp_path / "x.pt", allowed)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("function", [eval, shutil.rmtree, np.zeros, dict.fromkeys])
def test_a_plain_pickle_imports_nothing(function: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps({"A": [1.0], "B": Pickled(function, str(tmp_path))}))
    with pytest.raises(InputError, match=r"x\.pickle: a pickle that asks Python to import .* is refused"):
        read_plain_pickle(path)
    path.write_bytes(pickle.dumps([1.0]))
    with pytest.raises(InputError, match="holds a list, not a dict"):
        read_plain_pickle(path)
    whole = pickle.dumps({"A": [1.0, 2.0]})
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(InputError):
            read_plain_pickle(path)


def test_listed_packages_are_never_imported_or_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(path: str) -> None:
        Path(path).touch()

    pretend_module(monkeypatch, "state.trap", run)  # importable: only the stand-in keeps it from running
    torch.save({"x": Pickled(run, str(tmp_path / "ran"))}, tmp_path / "x.ckpt")
    content = read_pickle(tmp_path / "x.ckpt", allowed_in_checkpoint)
    assert isinstance(content["x"], StandIn) and content["x"].args == (str(tmp_path / "ran"),)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match=r"state\.trap\.run"):
        read_pickle(tmp_path / "x.ckpt", allowed_in_dictionary)


def test_reading_leaves_no_safe_globals_behind(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({np.str_("A"): torch.ones(2)}, tmp_path / "x.pt")
    assert list(read_dictionary(tmp_path / "x.pt")) == ["A"]
    assert set(torch.serialization.get_safe_globals()) == before


def test_a_crash_of_the_reading_process_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho giving up >&2\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crash))
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    with pytest.raises(InputError, match=r"its reader ended with -11 \(giving up\)"):
        read_checkpoint(tmp_path / "model.ckpt", genes=False)


def test_damaged_pickles_are_one_line_errors(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    torch.save({"TP53": torch.ones(6), "ACTB": torch.zeros(6)}, whole)
    part.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        read_dictionary(part)
    part.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InputError, match=r"bare pickle or was saved by PyTorch before 1\.6"):
        read_dictionary(part)
    part.write_bytes(b"not a checkpoint at all")
    with pytest.raises(InputError, match="not a PyTorch file"):
        read_dictionary(part)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb: torch.save never compresses
        archive.writestr("part/data.pkl", bytes(10_000_000))
    with pytest.raises(InputError, match="unpacks to more than its size"):
        read_dictionary(part)


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    torch.save({np.str_("A"): np.arange(3.0), "B": torch.ones(3)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    rng = np.random.default_rng([0])
    refused = 0
    for _ in range(150):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # checksums fit: only the pickle itself is wrong
            for name, data in members.items():
                damaged = bytearray(data)
                if name.endswith("data.pkl"):
                    damaged[rng.integers(len(data))] = rng.integers(256)
                archive.writestr(name, bytes(damaged))
        try:
            read_dictionary(tmp_path / "x.pt")
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 75  # most bytes of a pickle matter
