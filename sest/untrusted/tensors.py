"""Tensors and named vectors in files that nobody vouches for: .safetensors, .npz, .pt, .pickle, .csv, .tsv.

Whatever is wrong with one becomes an InputError of one line. P: width of a vector.
"""

from __future__ import annotations

import csv
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sest.errors import InputError, nearest_file, shown, what_it_is
from sest.untrusted.unpickle import DAMAGE, damaged, read_dictionary, read_plain_pickle

MAX_VECTOR_BYTES = 64 * 2**30
SMALL, MOST_INFLATED = 2**29, 100  # bytes that any file may become, and how many times its own size
INDEX_NAMES = frozenset(
    ("gene", "gene_name", "name", "index", "perturbation", "target_gene", "drug", "id")
)  # of tables
TABLES = {".csv": ",", ".tsv": "\t"}  # ending -> what separates the columns


def read_vectors(path: Path) -> tuple[tuple[str, ...], torch.Tensor]:
    """Names and vectors, one (n, P) float32 matrix, in the file's order.

    Of a `.pt` or `.pickle` (a dict name -> vector), an `.npz` or `.safetensors` (an array a name), a `.csv` or `.tsv`
    (a row a name, which comes first; a line of column names above them or not).

    Raises InputError unless all are one-dimensional, equally long and finite.
    """
    content = _dictionary(path)
    _check_inflated(path, sum(4 * value.numel() for value in content.values() if isinstance(value, torch.Tensor)))
    return stack_vectors(content, path.name)


def stack_vectors(content: Mapping[Any, Any], file: str) -> tuple[tuple[str, ...], torch.Tensor]:
    """Check a mapping of names to vectors; return the names and the vectors as one (n, P) float32 matrix."""
    if not content:
        raise InputError(f"{file} holds no vectors.")
    unnamed = [f"{str(key)[:40]} ({type(key).__name__})" for key in content if not isinstance(key, str)]
    if unnamed:
        raise InputError(f"{file}: names must be text. Not so: {shown(unnamed, 4)}.")
    rows = {str(key): _tensor(value) for key, value in content.items()}  # numpy.str_ becomes str
    width = next((len(row) for row in rows.values() if row is not None and row.ndim == 1), 0)
    bad = [
        f"{name} ({'not numbers' if row is None else tuple(row.shape)})"
        for name, row in rows.items()
        if row is None or tuple(row.shape) != (width,)
    ]
    if bad or width == 0:
        raise InputError(f"{file}: every value must be a vector of {width or 'some'} numbers. Not so: {shown(bad, 4)}.")
    if 4 * width * len(rows) > MAX_VECTOR_BYTES:
        raise InputError(f"{file}: {len(rows)} vectors of {width} numbers are more than 64 GiB.")
    matrix = torch.empty((len(rows), width), dtype=torch.float32)
    for target, row in zip(matrix, rows.values(), strict=True):
        assert row is not None
        target.copy_(row)
    if not _finite(matrix):
        check_finite(file, dict(zip(rows, matrix, strict=True)))
    return tuple(rows), matrix


def _dictionary(path: Path) -> Mapping[Any, Any]:
    refuse_impostor(path)
    if path.suffix in (".pt", ".pth", ".torch"):
        return read_dictionary(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix == ".npz":
        return _npz(path)
    if path.suffix in (".pickle", ".pkl"):
        return read_plain_pickle(path)
    if path.suffix in TABLES:
        return _table(path)
    raise InputError(f"{path.name}: vectors are read from .pt, .pickle, .npz, .safetensors, .csv or .tsv files.")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        _check_inflated(path, size)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except InputError:
        raise
    except (*DAMAGE, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, error) from error


def _check_inflated(path: Path, size: int) -> None:
    """Refuse a file that becomes far larger in memory than it is: compressed zeros, or one number for all entries."""
    if size > MAX_VECTOR_BYTES or size > max(SMALL, MOST_INFLATED * path.stat().st_size):
        raise InputError(f"{path.name} unpacks to {size / 1e9:.1f} GB, more than features of its size can be.")


def _table(path: Path) -> dict[str, np.ndarray]:
    """Rows of a table by the name in their first column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, delimiter=TABLES[path.suffix]) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, error) from error
    if rows and _names_columns(rows[0]):
        rows = rows[1:]
    names = [row[0].strip() for row in rows]
    if twice := sorted({name for name, count in Counter(names).items() if count > 1}):
        raise InputError(f"{path.name} has {len(twice)} names more than once: {shown(twice)}.")
    bad = [name for name, row in zip(names, rows, strict=True) if not _all_numbers(row[1:]) or len(row) != len(rows[0])]
    if bad:
        raise InputError(f"{path.name}: every row must be a name and the same number of numbers. Not so: {shown(bad)}.")
    return {name: np.array(row[1:], np.float32) for name, row in zip(names, rows, strict=True)}


def _names_columns(first: Sequence[str]) -> bool:
    """Whether the first line of a table names its columns, with words or with their numbers.

    Numbers of one or two columns, as "gene,0,1", can be a vector as well: they are names below one of INDEX_NAMES.
    """
    name, cells = first[0].strip(), [cell.strip() for cell in first[1:]]
    if not name or not _all_numbers(cells):
        return True
    numbered = any(cells == [str(i + start) for i in range(len(cells))] for start in (0, 1))
    return numbered and not _all_numbers([name]) and (len(cells) > 2 or name.casefold() in INDEX_NAMES)


def _all_numbers(cells: Sequence[str]) -> bool:
    try:
        [float(cell) for cell in cells]
    except ValueError:
        return False
    return True


def _tensor(value: Any) -> torch.Tensor | None:
    """`value` as a tensor of real numbers, or None if it is nothing of the kind."""
    if isinstance(value, list) and value and all(type(number) in (int, float) for number in value):
        value = np.array(value, np.float64)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        with np.errstate(over="ignore"):  # infinite then, which is found later
            return torch.from_numpy(value.astype(np.float32))
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return None if value.is_complex() or value.is_quantized else value.detach()
    return None


def check_finite(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    with ThreadPoolExecutor() as threads:
        finite = list(threads.map(lambda tensor: _finite(tensor.float()), tensors.values()))
    bad = [key for key, good in zip(tensors, finite, strict=True) if not good]
    if bad:
        raise InputError(f"{name}: NaN or infinite numbers in {shown(bad)}. Take them out or get an intact file.")


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates; unlike isfinite, no second array
    return bool(torch.isfinite(low) and torch.isfinite(high))


def refuse_impostor(path: Path) -> None:
    """Raise InputError for a missing or empty file and for what failed downloads leave under a weights name."""
    if not path.is_file():
        raise InputError(f"No file at {path}.{what_it_is(path) if path.exists() else nearest_file(path)}")
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise damaged(path, error) from error
    if not start:
        raise InputError(f"{path.name} is empty. Download it again.")
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise InputError(f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    if re.match(rb"\s*(<!doctype html|<html|<\?xml)", start, re.IGNORECASE):
        raise InputError(f"{path.name} is a web page (a failed download), not weights. Download it again.")
