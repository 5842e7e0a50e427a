"""Vectors by name in files nobody vouches for: equal, finite and named, or refused in one line."""

from __future__ import annotations

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sest.errors import InputError
from sest.untrusted.tensors import check_finite, read_safetensors, read_vectors, refuse_impostor


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"A": np.zeros(3), "B": np.zeros(4)}, r"a vector of 3 numbers. Not so: B \(\(4,\)\)"),
        ({"A": np.zeros((2, 3))}, r"A \(\(2, 3\)\)"),
        ({"A": np.array(["x", "y"])}, r"A \(not numbers\)"),
        ({"A": np.array([1.0, np.inf]), "B": np.zeros(2)}, "infinite numbers in A"),
        ({"A": np.array([1e300])}, "infinite numbers in A"),  # does not fit float32
        ({"A": np.array([{}], dtype=object)}, "cannot be read"),
        ({}, "holds no vectors"),
    ],
)
def test_values_that_are_not_equal_finite_vectors_are_named(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "x.npz", **content)
    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / "x.npz")


def test_pt_files_that_are_no_named_vectors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.ones(2)], path)
    with pytest.raises(InputError, match="holds a list, not a dict"):
        read_vectors(path)
    torch.save({1: torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"names must be text. Not so: 1 \(int\)"):
        read_vectors(path)
    torch.save({"A": torch.ones(2), np.str_("A\0"): torch.ones(2)}, path)
    with pytest.raises(InputError, match="the same name twice"):
        read_vectors(path)
    with pytest.raises(InputError, match="No file at"):
        read_vectors(tmp_path / "gone.pt")
    with pytest.raises(InputError, match=r"read from \.pt, \.pickle, \.npz, \.safetensors, \.csv or \.tsv"):
        read_vectors(Path(__file__))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A,1,2\nB,1\n", r"the same number of numbers. Not so: B"),
        ("gene,x,y\nA,1,2\nB,1,high\n", "Not so: B"),
        ("A,1\nB,2\nA,3\n", "1 names more than once: A"),
        ("gene,x\nA,nan\n", "NaN or infinite numbers in A"),
        ("", "is empty"),
        ("gene,x\n", "holds no vectors"),
    ],
)
def test_tables_that_are_no_vectors_by_name_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("first", "is_header"),
    [
        ("gene,0,1,2", True),  # as pandas writes an index with a name and columns without
        ("gene,1,2,3", True),
        ("whatever,0,1,2", True),
        ("gene,0", True),
        ("A,0,1", False),  # one of two one-hot columns
        ("A,0.0,1.0,2.0", False),
        ("A,0,1,3", False),
        ("7,0,1,2", False),  # a name that is a number
    ],
)
def test_a_first_line_of_column_numbers_is_no_vector(first: str, is_header: bool, tmp_path: Path) -> None:
    row = ",".join(["B", *["0.5"] * first.count(",")])
    (tmp_path / "x.csv").write_text(f"{first}\n{row}\n")
    assert read_vectors(tmp_path / "x.csv")[0] == (("B",) if is_header else (first.split(",")[0], "B"))


def test_vectors_keep_the_order_of_the_file(tmp_path: Path) -> None:
    torch.save({name: torch.full((2,), float(i)) for i, name in enumerate(["TP53", "ACTB", "MYC"])}, tmp_path / "x.pt")
    names, matrix = read_vectors(tmp_path / "x.pt")
    assert names == ("TP53", "ACTB", "MYC") and matrix.dtype == torch.float32
    assert matrix.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_tensors_with_nan_are_named_and_empty_or_whole_ones_pass() -> None:
    good = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(2, dtype=torch.int64)}
    check_finite("w.ckpt", good)
    with pytest.raises(InputError, match=r"w\.ckpt: NaN or infinite numbers in d, e\."):
        check_finite("w.ckpt", {"d": torch.tensor([1.0, torch.nan]), **good, "e": torch.tensor([-torch.inf])})


def test_a_damaged_safetensors_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"x\.safetensors cannot be read"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\n<HTML>", "web page")],
)
def test_what_a_failed_download_left_is_no_vectors_file(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("x.pt", "x.npz", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_vectors(tmp_path / name)
        with pytest.raises(InputError, match=message):
            refuse_impostor(tmp_path / name)


def test_a_file_that_becomes_far_larger_than_it_is_is_refused_before_that(tmp_path: Path) -> None:
    """The case faults/npz-bomb: zeros of 6 GB in 6 MB; and one number that stands for 10^12."""
    npz = tmp_path / "x.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (3 * 2**28,)})
    archive = zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("A.npy", "w", force_zip64=True) as member:
        member.write(header.getvalue())
        for _ in range(24):
            member.write(bytes(2**25))
    began = time.monotonic()
    with pytest.raises(InputError, match=r"x\.npz unpacks to 0\.8 GB, more than features of its size can be"):
        read_vectors(npz)
    torch.save({"A": torch.zeros(1).expand(10**12)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt unpacks to 4000\.0 GB"):
        read_vectors(tmp_path / "x.pt")
    assert time.monotonic() - began < 2
