"""The words error lines are made of."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from sest.errors import Error, InputError, brief, is_out_of_memory, nearest_file, one_line, shown, visible, what_it_is


def test_the_first_line_of_what_an_error_says_is_cut_at_a_limit() -> None:
    assert one_line(OSError("\n  no  such   file.\nTry another.")) == "no such file"
    assert one_line(ValueError("abc" * 5), limit=4) == "abca"
    assert one_line(MemoryError()) == "MemoryError"


def test_a_line_of_a_megabyte_loses_its_middle() -> None:
    line = str(InputError(f"Unknown key '{'x' * 10**6}' in run.toml. Known: lr, seed."))
    assert (
        len(line) <= 2000
        and line.startswith("Unknown key 'xxx")
        and line.endswith("xxx' in run.toml. Known: lr, seed.")
    )
    assert str(InputError("y" * 2000)) == "y" * 2000


def test_a_value_is_shown_as_json_of_at_most_60_characters() -> None:
    assert brief({"b": None, "a": [1, "x"]}) == '{"a": [1, "x"], "b": null}'
    assert len(brief("x" * 100)) == 60 and brief("x" * 100).endswith("x...")
    assert brief("x" * 58) == f'"{"x" * 58}"'


def test_what_a_terminal_obeys_and_what_is_unseen_is_shown_and_the_rest_stays() -> None:
    for text in ("STAT1 + JAK2 [red]", "k562-β", "Ünï 細胞 café 🧬", ""):
        assert visible(text) == text
    assert visible("\x1b]0;x\x07\n\t\x9b") == r"\x1b]0;x\x07\n\t\x9b"  # title, bell, new line, one-byte CSI
    assert visible("A\u202eB\u2066C\u200bD\xa0E\ufeff") == r"A\u202eB\u2066C\u200bD\xa0E\ufeff"
    assert visible("a\u3164\ufe0f\U000e0101\ud800") == r"a\u3164\ufe0f\U000e0101\ud800"


def test_a_list_of_names_says_how_many_it_leaves_out() -> None:
    assert shown([]) == "(none)"
    assert shown(["a", "b"]) == "a, b"
    assert shown("abcd", limit=2) == "a, b and 2 more"


def test_bad_input_is_an_error_of_the_package_and_a_value_error() -> None:
    assert issubclass(InputError, Error) and issubclass(Error, ValueError)


def test_no_memory_is_known_however_it_is_said() -> None:
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**60, np.uint8)
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (of_numpy.value, of_torch.value, MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")):
        assert is_out_of_memory(error), error
    assert is_out_of_memory(ImportError("libtorch.so: failed to map segment from shared object"))
    for other in (RuntimeError("no"), OSError(errno.ENOSPC, "No space left"), ValueError("can't allocate memory")):
        assert not is_out_of_memory(other), other


def test_a_file_that_is_not_there_is_answered_with_the_nearest_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cells.h5ad", "other.txt", ".cells2.h5ad"):
        (tmp_path / name).touch()
    assert nearest_file(tmp_path / "cell.h5ad") == " Did you mean 'cells.h5ad'?"
    assert nearest_file(f"{tmp_path}/cels.h5ad/") == " Did you mean 'cells.h5ad'?"
    assert nearest_file(tmp_path / "zzz") == nearest_file(tmp_path / "no" / "cells.h5ad") == ""
    monkeypatch.chdir(tmp_path)
    assert nearest_file("Cells.h5ad") == " Did you mean 'cells.h5ad'?"


def test_what_stands_at_a_path_instead_is_said_with_the_command_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "cells.h5").write_bytes(b"\x89HDF\r\n\x1a\n and more")
    (tmp_path / "table.csv").write_text("a,b")
    for folder, file, text in (
        ("cache", "zarr.json", '{"attributes": {"sest": {}}}'),
        ("store", "zarr.json", "{}"),
        ("run", "config.toml", ""),
        ("checkpoint", "state.json", "{}"),
        ("of {run}", "pipeline.toml", ""),
        ("none", "other.json", ""),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    assert what_it_is(tmp_path / "cells.h5") == " It is a file of cells, which `sest embed` takes."
    assert what_it_is(tmp_path / "cache") == " It is a cache, which `sest train` takes."
    assert what_it_is(str(tmp_path / "store")) == " It is a Zarr store, which `sest embed` takes."
    assert what_it_is(tmp_path / "run") == " It is a run folder, which `sest predict` takes."
    assert what_it_is(tmp_path / "checkpoint") == " It is a checkpoint folder, which `sest predict` takes."
    assert (
        what_it_is(tmp_path / "of {run}")
        == f" It is a folder of `sest run`; the run in it is {tmp_path}/of {{run}}/run."
    )
    assert what_it_is(tmp_path / "none") == what_it_is(tmp_path / "table.csv") == what_it_is(tmp_path / "gone") == ""


def test_a_name_of_a_megabyte_is_cut() -> None:
    assert shown(["x" * 10**6, "y"]) == f"{'x' * 200}..., y"
