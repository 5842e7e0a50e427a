"""AnnData files (.h5ad, .h5) read in blocks of rows with bounded memory; the file is not trusted.

N cells, G genes. Every form on disk (CSR, CSC, dense; any real dtype; any layer) comes out as the same canonical rows:
CSR, float32, int32 sorted column indices, no explicit zeros, no duplicates, finite.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sest.errors import InputError, nearest, shown
from sest.files.hdf5 import (
    attribute,
    bad,
    child,
    damage_is_bad_input,
    open_hdf5,
    other_format,
    read_table,
    table_length,
)
from sest.files.matrix import open_matrix


class CellFile:
    """An open .h5ad: its tables and its expression values (of X, of one layer or of raw/X), read block by block.

    The layer "raw" is raw/X with the genes of raw/var, unless a layer has that name.

    Raises InputError, on opening or on reading, for what is not a sound AnnData file: not HDF5, damaged, links or
    storage that lead outside the file, inconsistent shapes or indices, NaN, duplicate gene names, no cells.
    """

    path: Path
    n_cells: int
    n_genes: int
    layers: tuple[str, ...]  # names of the layers the file has
    choices: tuple[str, ...]  # what can be read instead of X: the layers, and "raw" where the file has raw/X

    def __init__(self, path: Path, layer: str | None = None) -> None:
        self.path = Path(path)
        self._file = open_hdf5(self.path)
        self._window: tuple[int, int, sp.csr_matrix] | None = None  # (first row, row after the last, canonical rows)
        try:
            with damage_is_bad_input(self.path):
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
        with damage_is_bad_input(self.path):
            return read_table(self._table("obs"), self.n_cells)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The genes' table (G rows); the index holds the gene names, each once."""
        with damage_is_bad_input(self.path):
            return read_table(self._genes, self.n_genes)

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
                with damage_is_bad_input(self.path):
                    first, last = self._matrix.span(start, stop)
                    stored = self._matrix.read(first, last)
                block = self._canonical(stored, first)
                if (first, last) == (start, stop):  # nothing to keep for the next call
                    pieces.append(block)
                    break
                self._window = first, last, block
            first, last, block = self._window
            pieces.append(block[start - first : min(stop, last) - first].copy())
            start = min(stop, last)
        return pieces[0] if len(pieces) == 1 else sp.vstack(pieces, format="csr")

    def _check(self, layer: str | None) -> None:
        if missing := [name for name in ("obs", "var") if name not in self._file]:
            raise InputError(f"{self.path} is not an .h5ad file: it has no {shown(missing)}{other_format(self._file)}.")
        layers = child(self._file, "layers") if "layers" in self._file else {}
        if isinstance(layers, h5py.Dataset):
            raise bad(layers, "is not a group of layers")
        self.layers = tuple(layers)
        raw = child(self._file, "raw") if "raw" in self._file else None
        has_raw = isinstance(raw, h5py.Group) and {"X", "var"} <= set(raw)
        self.choices = (*self.layers, *(["raw"] if has_raw and "raw" not in layers else []))
        from_raw = layer == "raw" and layer not in layers and has_raw
        self._genes = self._table("var", raw if from_raw else None)
        tables = [(self._table("obs"), "cells"), (self._genes, "genes")]
        self._matrix = open_matrix(self._find(layer))
        self.n_cells, self.n_genes = self._matrix.shape
        if self.n_cells == 0 or self.n_genes == 0:
            raise InputError(f"{self.path} is empty: {self.n_cells} cells x {self.n_genes} genes.")
        for (table, what), n in zip(tables, self._matrix.shape, strict=True):
            if (length := table_length(table)) != n:
                raise bad(table, f"has {length} {what}, but the values are of {n}")
        twice = self.var.index[self.var.index.duplicated()].unique()
        if len(twice):
            raise InputError(
                f"{self.path} has {len(twice)} gene names more than once in var: {shown(twice)}. "
                "Sum or drop them, or rename them with adata.var_names_make_unique(), and save again."
            )

    def _find(self, layer: str | None) -> h5py.Group | h5py.Dataset:
        """X or the layer, as it lies in the file."""
        if layer in (None, "X"):
            if "X" in self._file and attribute(child(self._file, "X"), "encoding-type") != "null":
                return child(self._file, "X")
            instead = f" Pass --layer with one of its layers: {shown(self.layers)}." if self.layers else ""
            if not instead and "raw" in self.choices:
                instead = " It only has raw/X: pass --layer raw."
            raise InputError(f"{self.path} has no X.{instead}")
        if layer == "raw" and "raw" in self.choices and layer not in self.layers:
            return child(child(self._file, "raw"), "X")
        if layer not in self.layers:
            there = ("X", *self.choices)
            raise InputError(f"{self.path} has no layer {layer!r}. Layers: {shown(there)}.{nearest(str(layer), there)}")
        return child(child(self._file, "layers"), str(layer))

    def _table(self, name: str, group: h5py.Group | None = None) -> h5py.Group:
        table = child(self._file if group is None else group, name)
        if not isinstance(table, h5py.Group) or attribute(table, "encoding-type") != "dataframe":
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
