"""AnnData files (.h5ad, .h5) read in blocks of rows with bounded memory; the file is not trusted.

N cells, G genes. Every form on disk (CSR, CSC, dense; any real dtype; any layer) comes out as the same canonical rows:
CSR, float32, int32 sorted column indices, no explicit zeros, no duplicates, finite.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sest.errors import InputError, nearest, shown

log = logging.getLogger(__name__)

READ_VALUES = 2**21  # values handled at once while streaming: some 100 MB of temporaries
WINDOW_VALUES = 2**24  # values of the rows kept in memory for CSC and dense files: 128 MB as CSR
CHUNK_CACHE = 2**25  # bytes of decompressed chunks HDF5 keeps for each dataset
CHUNK_LIMIT = 2**29  # bytes of one HDF5 chunk, which can only be decompressed whole
MAX_LOG1P = 35.0  # a larger value cannot be a log1p (upstream's limit per cell)
MAX_LOG1P_TOTAL = 5e6  # nor can a cell's values if sum(expm1) is larger (upstream's limit per cell)
# What h5py and AnnData's reader raise for a damaged file, wherever they first touch the damage.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True, eq=False)
class Scan:
    """What one pass over all values of a file shows; every number is of the canonical float32 rows.

    A cell can only be counts if it has a value above 35, or sum(expm1) above 5e6 (upstream's limits), or only whole
    numbers with one above 1 (log1p of a count, normalised or not, is whole only for 0). It can only be log1p if it has
    a value that is not whole and is none of the former. A cell of zeros and ones says nothing.
    """

    indptr: np.ndarray  # (N+1,) int64: where each cell's values start among the file's nonzero values
    max_value: float
    all_integer: bool
    n_negative: int  # values below zero
    n_raw_cells: int  # cells that can only be counts
    n_log1p_cells: int  # cells that can only be log1p values
    sha256: str  # of shape, gene names and values, whatever the storage form


class _Source(Protocol):
    shape: tuple[int, int]

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows to read, and to keep, when [start, stop) is wanted; they contain `start`."""

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Return rows [start, stop) with indices in range; order, duplicates and values are not yet checked."""


class CellFile:
    """An open .h5ad: its tables and its expression values (of X, or of one layer), read block by block.

    Raises InputError, on opening or on reading, for what is not a sound AnnData file: not HDF5, damaged, links or
    storage that lead outside the file, inconsistent shapes or indices, NaN, duplicate gene names, no cells.
    """

    path: Path
    n_cells: int
    n_genes: int
    layers: tuple[str, ...]  # names of the layers the file has

    def __init__(self, path: Path, layer: str | None = None) -> None:
        self.path = Path(path)
        self._file = _open(self.path)
        self._window: tuple[int, int, sp.csr_matrix] | None = None  # (first row, row after the last, canonical rows)
        try:
            with _damage_is_bad_input(self.path):
                self._check(layer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CellFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and forget the rows in memory."""
        self._window = None
        self._file.close()

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The cells' table (N rows); the index holds the original cell names, which may repeat."""
        with _damage_is_bad_input(self.path):
            return _read_table(self._table("obs"), self.n_cells)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The genes' table (G rows); the index holds the gene names, each once."""
        with _damage_is_bad_input(self.path):
            return _read_table(self._table("var"), self.n_genes)

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Return cells [start, stop): (stop-start, G) CSR, float32, int32 sorted indices, no explicit zeros.

        A CSR file is read where asked. Of CSC and dense files a window of rows stays in memory: ask in ascending order.
        """
        if not 0 <= start <= stop <= self.n_cells:
            raise IndexError(f"rows {start}:{stop} of {self.n_cells}")
        if start == stop:
            return sp.csr_matrix((0, self.n_genes), dtype=np.float32)
        pieces: list[sp.csr_matrix] = []
        while start < stop:
            if self._window is None or not self._window[0] <= start < self._window[1]:
                self._window = None  # two windows are never in memory
                with _damage_is_bad_input(self.path):
                    first, last = self._source.span(start, stop)
                    stored = self._source.read(first, last)
                block = self._canonical(stored, first)
                if (first, last) == (start, stop):  # nothing to keep for the next call
                    pieces.append(block)
                    break
                self._window = first, last, block
            first, last, block = self._window
            pieces.append(block[start - first : min(stop, last) - first].copy())
            start = min(stop, last)
        return pieces[0] if len(pieces) == 1 else sp.vstack(pieces, format="csr")

    def scan(self, on_rows: Callable[[int], None] | None = None) -> Scan:
        """Read all values once; `on_rows(n)` is told after each block that n more cells are done."""
        names = json.dumps([self.n_cells, self.n_genes, *self.var.index])
        hashes = {name: hashlib.sha256() for name in ("indptr", "indices", "data")}
        per_cell = np.zeros(self.n_cells + 1, dtype=np.int64)
        largest, negative, fractional, raw, log1p = -np.inf, 0, 0, 0, 0
        step = max(1, READ_VALUES // self.n_genes)
        for start in range(0, self.n_cells, step):
            block = self.rows(start, min(start + step, self.n_cells))
            n = block.shape[0]
            per_cell[start + 1 : start + n + 1] = np.diff(block.indptr)
            hashes["indices"].update(block.indices.astype("<i4").tobytes())
            hashes["data"].update(block.data.astype("<f4").tobytes())
            whole = block.data == np.rint(block.data)
            negative += int((block.data < 0).sum())
            fractional += int(whole.size - whole.sum())
            largest = max(largest, float(block.max()))
            if block.nnz:
                starts = block.indptr[:-1][np.diff(block.indptr) > 0]  # cells without values say nothing
                all_whole = np.logical_and.reduceat(whole, starts)
                high = np.maximum.reduceat(block.data, starts)
                total = np.add.reduceat(np.expm1(np.minimum(block.data, MAX_LOG1P + 1)), starts)
                linear = (high > MAX_LOG1P) | (total > MAX_LOG1P_TOTAL)
                raw += int((linear | (all_whole & (high > 1))).sum())
                log1p += int((~all_whole & ~linear).sum())
            if on_rows is not None:
                on_rows(n)
        indptr = np.cumsum(per_cell)
        hashes["indptr"].update(indptr.astype("<i8").tobytes())
        parts = [names, *(h.hexdigest() for h in hashes.values())]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return Scan(indptr, largest, fractional == 0, negative, raw, log1p, digest)

    def _check(self, layer: str | None) -> None:
        if missing := [name for name in ("obs", "var") if name not in self._file]:
            raise InputError(
                f"{self.path} is not an .h5ad file: it has no {shown(missing)}{_other_format(self._file)}."
            )
        tables = [(self._table("obs"), "cells"), (self._table("var"), "genes")]
        layers = _child(self._file, "layers") if "layers" in self._file else {}
        if isinstance(layers, h5py.Dataset):
            raise _bad(layers, "is not a group of layers")
        self.layers = tuple(layers)
        self._source = _source(self._matrix(layer))
        self.n_cells, self.n_genes = self._source.shape
        if self.n_cells == 0 or self.n_genes == 0:
            raise InputError(f"{self.path} is empty: {self.n_cells} cells x {self.n_genes} genes.")
        for (table, what), n in zip(tables, self._source.shape, strict=True):
            if (length := _table_length(table)) != n:
                raise _bad(table, f"has {length} {what}, but the values are of {n}")
        twice = self.var.index[self.var.index.duplicated()].unique()
        if len(twice):
            raise InputError(
                f"{self.path} has {len(twice)} gene names more than once in var: {shown(twice)}. "
                "Sum or drop them, or rename them with adata.var_names_make_unique(), and save again."
            )

    def _matrix(self, layer: str | None) -> h5py.Group | h5py.Dataset:
        if layer in (None, "X"):
            if "X" in self._file and _attribute(_child(self._file, "X"), "encoding-type") != "null":
                return _child(self._file, "X")
            instead = f" Pass --layer with one of its layers: {shown(self.layers)}." if self.layers else ""
            if not instead and "raw" in self._file:
                instead = " It only has raw/X: save adata.raw.to_adata() to a new .h5ad."
            raise InputError(f"{self.path} has no X.{instead}")
        if layer not in self.layers:
            there = ("X", *self.layers)
            raise InputError(f"{self.path} has no layer {layer!r}. Layers: {shown(there)}.{nearest(str(layer), there)}")
        return _child(_child(self._file, "layers"), str(layer))

    def _table(self, name: str) -> h5py.Group:
        table = _child(self._file, name)
        if not isinstance(table, h5py.Group) or _attribute(table, "encoding-type") != "dataframe":
            raise InputError(
                f"{self.path}: {name} is in a layout from before AnnData 0.7; "
                "open it with anndata.read_h5ad and save it again with a recent anndata."
            )
        return table

    def _canonical(self, block: sp.csr_matrix, first: int) -> sp.csr_matrix:
        """Sort, check and clean rows that start at cell `first`; in place where possible."""
        block.sort_indices()
        same = block.indices[1:] == block.indices[:-1]
        ends = block.indptr[1:-1]
        same[ends[(ends > 0) & (ends < block.nnz)] - 1] = False  # the last value of a row and the first of the next
        for problem, wrong in (("a value twice", same), ("NaN or an infinite value", ~np.isfinite(block.data))):
            if wrong.any():
                at = int(np.argmax(wrong))
                cell = first + int(np.searchsorted(block.indptr, at, side="right")) - 1
                raise InputError(
                    f"{self.path} has {problem} in cell {self.obs.index[cell]!r} (row {cell}), "
                    f"gene {self.var.index[block.indices[at]]!r}. Correct the file and save it again."
                )
        block.eliminate_zeros()
        return block


class _Csr:
    """CSR on disk: rows are read exactly where they are asked for."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._indptr, self._indices, self._data = _compressed(group, *shape)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        a, b = int(self._indptr[start]), int(self._indptr[stop])
        indices = _indices(self._indices, a, b, self.shape[1])
        indptr = self._indptr[start : stop + 1] - a
        return sp.csr_matrix((_float32(self._data[a:b]), indices, indptr), shape=(stop - start, self.shape[1]))


class _Csc:
    """CSC on disk: no row can be found without reading everything, so one pass fills a window of many rows."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._indptr, self._indices, self._data = _compressed(group, shape[1], shape[0])
        self._said = False

    @cached_property
    def _row_starts(self) -> np.ndarray:  # (N+1,) int64: stored values in the rows before each
        counts = np.zeros(self.shape[0], dtype=np.int64)
        for a in range(0, len(self._data), READ_VALUES):
            b = min(a + READ_VALUES, len(self._data))
            counts += np.bincount(_indices(self._indices, a, b, self.shape[0]), minlength=self.shape[0])
        if counts.max() > self.shape[1]:
            raise _bad(self._indices, f"is damaged: cell {int(counts.argmax())} has more values than there are genes")
        return np.concatenate([[0], np.cumsum(counts)])

    def span(self, start: int, stop: int) -> tuple[int, int]:
        starts = self._row_starts
        fit = int(np.searchsorted(starts, starts[start] + WINDOW_VALUES, side="right")) - 1
        passes = 1 + int(starts[-1]) // WINDOW_VALUES
        if passes > 2 and not self._said:
            self._said = True
            name = self._data.file.filename
            log.warning("%s is stored by gene (CSC): %d passes; saved again with X.tocsr() it takes one.", name, passes)
        return start, max(start + 1, min(fit, self.shape[0]))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        indptr = self._row_starts[start : stop + 1] - self._row_starts[start]
        fill = indptr[:-1].copy()  # where the next value of each row goes
        indices = np.empty(int(indptr[-1]), dtype=np.int32)
        data = np.empty(int(indptr[-1]), dtype=np.float32)
        for a in range(0, len(self._data), READ_VALUES):
            columns, slab = self._slab(a, min(a + READ_VALUES, len(self._data)), start, stop)
            counts = np.diff(slab.indptr)
            to = np.repeat(fill - slab.indptr[:-1], counts) + np.arange(slab.nnz)
            indices[to] = slab.indices + columns
            data[to] = slab.data
            fill += counts
        return sp.csr_matrix((data, indices, indptr), shape=(stop - start, self.shape[1]))

    def _slab(self, a: int, b: int, start: int, stop: int) -> tuple[int, sp.csr_matrix]:
        """Return the first column of stored values [a, b), and those of them in rows [start, stop), from there."""
        first = int(np.searchsorted(self._indptr, a, side="right")) - 1
        last = int(np.searchsorted(self._indptr, b, side="left"))
        rows = _indices(self._indices, a, b, self.shape[0])
        inside = (rows >= start) & (rows < stop)
        kept = np.concatenate([[0], np.cumsum(inside)])
        indptr = kept[np.clip(self._indptr[first : last + 1], a, b) - a]
        data = _float32(self._data[a:b])[inside] if kept[-1] else np.empty(0, dtype=np.float32)
        slab = sp.csc_matrix((data, rows[inside] - start, indptr), shape=(stop - start, last - first))
        return first, slab.tocsr()


class _Dense:
    """Dense on disk: windows of rows that end where its chunks end."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.shape: tuple[int, int] = dataset.shape
        self._dataset = dataset
        rows = max(1, WINDOW_VALUES // max(1, self.shape[1]))
        chunk = dataset.chunks[0] if dataset.chunks else 1
        self._rows = rows - rows % chunk if chunk <= rows else rows

    def span(self, start: int, stop: int) -> tuple[int, int]:
        first = start - start % self._rows
        return first, min(first + self._rows, self.shape[0])

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        block = self._dataset[start:stop]
        step = max(1, READ_VALUES // self.shape[1])
        pieces = [sp.csr_matrix(_float32(block[i : i + step])) for i in range(0, stop - start, step)]
        return sp.vstack(pieces, format="csr")


def decide_scale(scan: Scan, requested: str, path: Path, layers: Sequence[str] = ()) -> str:
    """Return "counts" or "log1p", the scale of the whole file; `requested`, from --counts, is auto, raw or log1p.

    auto: whole numbers with one above 1 are counts; values that are not whole, in cells that could all be log1p, are
    log1p. All else is an InputError (cells that disagree, zeros and ones only, CPM without log), which names `layers`.
    """
    there = f" Or choose with --layer: {shown(('X', *layers))}." if layers else ""
    choices = ("auto", "raw", "log1p")
    if requested not in choices:
        raise InputError(f"--counts {requested!r} is not one of {shown(choices)}.{nearest(requested, choices)}")
    if requested == "log1p":
        if scan.n_raw_cells:
            log.warning("%s: used as log1p as asked, though %d cells look like counts.", path, scan.n_raw_cells)
        return "log1p"
    if scan.n_negative and (requested == "raw" or scan.all_integer):
        raise InputError(f"{path} has {scan.n_negative} values below zero: these are not counts.{there}")
    if requested == "raw":
        if not scan.all_integer:
            log.warning("%s: used as counts as asked, though not all values are whole numbers.", path)
        return "counts"
    if scan.all_integer and scan.max_value > 1:
        return "counts"
    if scan.all_integer:
        raise InputError(
            f"{path} holds only zeros and ones: counts or log1p? Pass --counts raw or --counts log1p.{there}"
        )
    if scan.n_raw_cells and scan.n_log1p_cells:
        raise InputError(
            f"{path} mixes scales: {scan.n_raw_cells} cells can only be counts, {scan.n_log1p_cells} only log1p. "
            f"Split the file, or pass --counts raw or --counts log1p if you know that all are the same.{there}"
        )
    if scan.n_raw_cells:
        raise InputError(
            f"{path} has values that are not whole and too large for log1p (up to {scan.max_value:g}), such as CPM "
            f"without log. Pass --counts raw to use them as counts.{there}"
        )
    return "log1p"


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise InputError(f"No such file: {path}.")
    if path.is_dir():
        zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs"))
        convert = " It is a Zarr store: convert it with anndata.read_zarr(...).write_h5ad(...)." if zarr else ""
        raise InputError(f"{path} is a folder, not an .h5ad file.{convert}")
    try:
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not an .h5ad file (not HDF5){_looks_like(path)}.")
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE)
    except OSError as error:
        if "truncated" in str(error):
            raise InputError(f"{path} is truncated: copy or download it again.") from error
        raise InputError(f"{path} cannot be opened: {_one_line(error)}.") from error


def _other_format(file: h5py.File) -> str:
    if "matrix" in file and "row_attrs" in file:
        return ": it is a loom file; convert it with anndata.io.read_loom(...).write_h5ad(...)"
    if "matrix" in file:
        return ": it is a 10x Genomics .h5; convert it with scanpy.read_10x_h5(...).write_h5ad(...)"
    if "mod" in file:
        return ": it is a MuData file; save one part with mudata.read(...).mod['rna'].write_h5ad(...)"
    return f"; it has {shown(sorted(file))}"


def _looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return ": it is empty"
    for start, words in (
        (b"\x1f\x8b", "it looks like gzip; unpack it with gunzip"),
        (b"PK\x03\x04", "it looks like a zip archive; unpack it"),
        (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file with git lfs pull"),
        (b"%%MatrixMarket", "it looks like Matrix Market; read it with scanpy.read_mtx or scanpy.read_10x_mtx"),
        (b"<", "it looks like an HTML or XML page; the download failed"),
    ):
        if head.lstrip().startswith(start):
            return f": {words}"
    return ""


def _source(matrix: h5py.Group | h5py.Dataset) -> _Source:
    if isinstance(matrix, h5py.Dataset):
        _check_numbers(matrix)
        if len(matrix.shape) != 2:
            raise _bad(matrix, f"has shape {matrix.shape}; expected cells x genes")
        _check_gene_count(matrix, matrix.shape[1])
        return _Dense(matrix)
    form = _attribute(matrix, "encoding-type")
    shape = np.asarray(matrix.attrs.get("shape", ()))
    if form not in ("csr_matrix", "csc_matrix"):
        raise _bad(matrix, f"is stored as {form!r}; expected csr_matrix, csc_matrix or a dense array")
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape.astype(np.int64) < 0).any():
        raise _bad(matrix, "does not say its shape as cells x genes")
    n_cells, n_genes = (int(n) for n in shape)
    _check_gene_count(matrix, n_genes)
    return (_Csr if form == "csr_matrix" else _Csc)(matrix, (n_cells, n_genes))


def _check_gene_count(matrix: h5py.Group | h5py.Dataset, n_genes: int) -> None:
    if n_genes > WINDOW_VALUES:
        raise _bad(matrix, f"has {n_genes} genes; at most {WINDOW_VALUES} are read")


def _compressed(group: h5py.Group, n_major: int, n_minor: int) -> tuple[np.ndarray, h5py.Dataset, h5py.Dataset]:
    """Return (indptr int64 (n_major+1,), indices, data) of a CSR or CSC group, checked as far as indptr shows."""
    names = ("indptr", "indices", "data")
    if missing := [name for name in names if name not in group]:
        raise _bad(group, f"has no {shown(missing)}: it is not a sparse matrix")
    indptr_set, indices, data = (_child(group, name) for name in names)
    for part in (indptr_set, indices, data):
        _check_numbers(part)
        if len(part.shape) != 1 or (part is not data and part.dtype.kind not in "iu"):
            raise _bad(part, f"has shape {part.shape} and type {part.dtype}; expected one row of numbers")
    if len(indptr_set) != n_major + 1:
        raise _bad(indptr_set, f"has {len(indptr_set)} entries where the shape asks for {n_major + 1}")
    if len(indices) != len(data):
        raise _bad(group, f"has {len(indices)} indices for {len(data)} values")
    indptr = indptr_set[:].astype(np.int64)
    steps = np.diff(indptr)
    if indptr[0] != 0 or indptr[-1] != len(data) or (steps < 0).any():
        raise _bad(indptr_set, f"is damaged: it must rise from 0 to the number of values ({len(data)})")
    if (steps > n_minor).any():
        raise _bad(indptr_set, f"is damaged: entry {int(np.argmax(steps > n_minor))} spans more than {n_minor} values")
    return indptr, indices, data


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused
        return values.astype(np.float32)


def _indices(dataset: h5py.Dataset, start: int, stop: int, limit: int) -> np.ndarray:
    """Return stored indices [start, stop), all within [0, limit): SciPy would write outside its memory for others."""
    indices = dataset[start:stop]
    if len(indices) and (indices.min() < 0 or indices.max() >= limit):
        raise _bad(
            dataset, f"is damaged: it runs from {indices.min()} to {indices.max()}, but only 0 to {limit - 1} exist"
        )
    return indices.astype(np.int32 if limit <= np.iinfo(np.int32).max else np.int64)


def _child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """Return a member of a group, refusing links: a link can name any file the user may read."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise _bad(group, f"has {name!r} as a link, which is not followed; save a copy of the file with anndata")
    return group[name]


def _check_dataset(dataset: h5py.Dataset) -> None:
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise _bad(dataset, "is no array")
    if dataset.external or dataset.is_virtual:
        raise _bad(dataset, "is stored in another file, which is not read; save a copy of the file with anndata")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > CHUNK_LIMIT:
        raise _bad(dataset, f"has chunks of more than {CHUNK_LIMIT >> 20} MiB; save the file again with anndata")
    filters = dataset.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, _, _, name = filters.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            label = _text(name) or "no name"
            raise _bad(dataset, f"needs HDF5 filter {code} ({label}); save the file again with compression='gzip'")


def _check_numbers(dataset: h5py.Dataset) -> None:
    _check_dataset(dataset)
    if dataset.dtype.kind not in "fiub":
        raise _bad(dataset, f"has type {dataset.dtype}; expected numbers")


def _table_length(table: h5py.Group) -> int:
    index = _attribute(table, "_index") or "_index"
    if "/" in index or index not in table:
        raise _bad(table, f"has no index {index!r}")
    column = _child(table, index)
    while isinstance(column, h5py.Group):  # categorical (codes) or nullable (values)
        column = _child(column, "codes" if "codes" in column else "values")
    return int(column.shape[0]) if column.shape else 0


def _read_table(table: h5py.Group, n_rows: int) -> pd.DataFrame:
    """Read obs or var whole, after walking all that AnnData's reader may open."""
    from anndata import OldFormatWarning  # anndata is slow to import
    from anndata._io.specs.registry import IORegistryError  # not public, but what read_elem raises
    from anndata.io import read_elem

    _walk(table, n_rows, set())
    columns = [_text(name) for name in np.ravel(table.attrs.get("column-order", ()))]
    if outside := [name for name in columns if name.startswith("/")]:
        raise _bad(table, f"names columns outside itself: {shown(outside)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OldFormatWarning)  # AnnData 0.7 and 0.8 files are read all the same
        try:
            frame = read_elem(table)
        except IORegistryError as error:  # an encoding newer than the installed AnnData
            raise _bad(table, f"cannot be read: {_one_line(error)}") from error
    frame.index = frame.index.astype(str)
    return frame


def _walk(item: h5py.Group | h5py.Dataset, n_rows: int, seen: set[Any]) -> None:
    """Check every object under a table once: own storage, plausible size, an encoding that holds labels or numbers."""
    if item in seen:
        return
    seen.add(item)
    encoding = _attribute(item, "encoding-type") or "array"
    allowed = ("array", "string-array", "categorical", *(("dataframe",) if len(seen) == 1 else ()))
    if encoding not in allowed and not encoding.startswith("nullable-"):
        raise _bad(item, f"is stored as {encoding!r}, which is no column of labels or numbers")
    if "categories" in item.attrs:  # a categorical column as AnnData 0.7 wrote it
        target = item.attrs["categories"]
        if not isinstance(target, h5py.Reference):  # a name could lead through a link
            raise _bad(item, "names its categories instead of referring to them")
        _walk(item.file[target], n_rows, seen)
    if isinstance(item, h5py.Group):
        for name in item:
            _walk(_child(item, name), n_rows, seen)
        return
    _check_dataset(item)
    if item.size * item.dtype.itemsize > 1024 * max(n_rows, 2**16):
        raise _bad(item, f"is too large for a column of {n_rows} rows: {item.size} entries")


def _attribute(item: h5py.HLObject, name: str) -> str:
    """Return a text attribute, or "" where there is none."""
    return _text(item.attrs.get(name, ""))


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


@contextmanager
def _damage_is_bad_input(path: Path) -> Iterator[None]:
    """Turn what the readers raise for a damaged file into an InputError; an InputError passes as it is."""
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path} cannot be read; is it damaged? {type(error).__name__}: {_one_line(error)}."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _bad(item: h5py.HLObject, problem: str) -> InputError:
    return InputError(f"{item.file.filename}: {item.name} {problem}.")
