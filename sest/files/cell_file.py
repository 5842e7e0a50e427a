"""Files of cells, in HDF5 or Zarr, read in blocks of rows with bounded memory; the file is not trusted.

N cells, G genes. Every form on disk (CSR, CSC, dense; any real dtype; any layer) comes out as the same canonical rows:
CSR, float32, int32 sorted column indices, no explicit zeros, no duplicates, finite.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from sest.errors import InputError, nearest, shown
from sest.files.containers import foreign, open_container, part_of
from sest.files.matrix import open_matrix
from sest.files.nodes import Group, Node, attribute, bad, child, damage_is_bad_input, is_array
from sest.files.obsm import Embedding
from sest.files.remote import located
from sest.files.tables import Table, table_in


class CellFile:
    """Cells of an open file: their tables and expression values (of X, of one layer or of raw/X), read block by block.

    The layer "raw" is raw/X with the genes of raw/var, unless a layer has that name.

    Args:
        path: AnnData as HDF5 (.h5ad) or Zarr (a folder, or a zip archive), or MuData; a path or a URL.
        layer: what is read instead of X.
        modality: the part of a MuData file; None: the only one.

    Raises:
        InputError: on opening or on reading, for what is not a sound file of cells: another format, damaged, links or
            storage that lead outside the file, inconsistent shapes or indices, NaN, duplicate gene names, no cells.
    """

    path: Path
    n_cells: int
    n_genes: int
    layers: tuple[str, ...]  # names of the layers the file has
    choices: tuple[str, ...]  # what can be read instead of X: the layers, and "raw" where the file has raw/X
    root: Group  # where obs, var and X are

    def __init__(self, path: Path | str, layer: str | None = None, modality: str | None = None) -> None:
        self.path = located(path)
        root, self._close = open_container(self.path)
        self._layer = layer
        self._window: tuple[int, int, sp.csr_matrix] | None = None  # (first row, row after the last, canonical rows)
        try:
            with damage_is_bad_input(self.path):
                self.root = part_of(root, self.path, modality)
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
        self._close()

    @cached_property
    def obs(self) -> Table:
        """The cells' table (N rows), read a column at a time; the index holds the original names, which may repeat."""
        return self._table("obs", self.root)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The genes' table (G rows); the index holds the gene names, each once."""
        with damage_is_bad_input(self.path):
            return self._table("var", self._genes_in).frame(lenient=True)

    @property
    def log_base(self) -> float | None:
        """The base of the logarithms in X and raw/X, as scanpy.pp.log1p says it; None: not said, or of a layer."""
        with damage_is_bad_input(self.path):
            node: Any = self.root
            for name in ("uns", "log1p", "base"):
                if is_array(node) or name not in node:
                    return None
                node = child(node, name)
            if self._layer not in (None, "X", "raw") or not is_array(node) or node.shape not in ((), None):
                return None
            value = node[()]  # None is h5py.Empty in HDF5
            base = float(value) if isinstance(value, np.number | np.ndarray) and value.dtype.kind in "iuf" else 0.0
            return base if 1 < base < np.inf else None

    def embedding(self, key: str) -> Embedding:
        """The entry `key` of obsm. Raises InputError: there is none, or it is no embedding."""
        with damage_is_bad_input(self.path):
            obsm = child(self.root, "obsm") if "obsm" in self.root else {}
            if is_array(obsm):
                raise bad(obsm, "is not a group; save the file again with a recent anndata")
            if key not in obsm:
                raise InputError(f"{self.path} has no obsm {key!r}. There are: {shown(obsm)}.{nearest(key, obsm)}")
            return Embedding(child(obsm, key), self.n_cells)

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
        root = self.root
        if missing := [name for name in ("obs", "var") if name not in root]:
            raise foreign(root, self.path, missing)
        layers = child(root, "layers") if "layers" in root else {}
        if is_array(layers):
            raise bad(layers, "is not a group of layers")
        self.layers = tuple(layers)
        raw = child(root, "raw") if "raw" in root else None
        has_raw = raw is not None and not is_array(raw) and {"X", "var"} <= set(raw)
        old_raw = {"raw.X", "raw.var"} <= set(root)  # AnnData before 0.7
        self.choices = (*self.layers, *(["raw"] if (has_raw or old_raw) and "raw" not in layers else []))
        self._raw = raw if has_raw else None
        from_raw = layer == "raw" and "raw" in self.choices and layer not in layers
        self._genes_in, self._var = (raw, "var") if from_raw and has_raw else (root, "raw.var" if from_raw else "var")
        genes = self._table("var", self._genes_in)
        self._matrix = open_matrix(self._find(layer))
        self.n_cells, self.n_genes = self._matrix.shape
        if self.n_cells == 0 or self.n_genes == 0:
            raise InputError(f"{self.path} is empty: {self.n_cells} cells x {self.n_genes} genes.")
        for table, what, n in ((self.obs, "cells", self.n_cells), (genes, "genes", self.n_genes)):
            if len(table) != n:
                raise bad(table.node, f"has {len(table)} {what}, but the values are of {n}")
        twice = self.var.index[self.var.index.duplicated()].unique()
        if len(twice):
            raise InputError(
                f"{self.path} has {len(twice)} gene names more than once in var: {shown(twice)}. "
                "Sum or drop them, or rename them with adata.var_names_make_unique(), and save again."
            )

    def _find(self, layer: str | None) -> Node:
        """X or the layer, as it lies in the file."""
        root = self.root
        if layer in (None, "X"):
            if "X" in root and attribute(child(root, "X"), "encoding-type") != "null":
                return child(root, "X")
            instead = f" Pass --layer with one of its layers: {shown(self.layers)}." if self.layers else ""
            if not instead and "raw" in self.choices:
                instead = " It only has raw/X: pass --layer raw."
            raise InputError(f"{self.path} has no X.{instead}")
        if layer == "raw" and "raw" in self.choices and layer not in self.layers:
            return child(root, "raw.X") if self._raw is None else child(self._raw, "X")
        if layer not in self.layers:
            there = ("X", *self.choices)
            raise InputError(f"{self.path} has no layer {layer!r}. Layers: {shown(there)}.{nearest(str(layer), there)}")
        return child(child(root, "layers"), str(layer))

    def _table(self, name: str, group: Group) -> Table:
        """obs, or the var of the values that are read."""
        uns = child(self.root, "uns") if "uns" in self.root else None
        return table_in(group, name if name == "obs" else self._var, uns)

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
        if not block.data.all():
            block.eliminate_zeros()
        return block
