"""The values of a cache's control cells, and the total counts of all cells, kept beside the cache.

Predictions and reports need no other values, and controls are scattered over all cells: read once from every cell, then
from there. Shapes: N cells of all groups in the cache's order, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse

from sest.cache import Cache, Group
from sest.cache.derived import Blocks, forget_derived, is_derived, keep_derived, read_derived
from sest.cache.disk import sha256
from sest.cache.reader import wrong_genes, wrong_values

NAME = "controls"
MOST_BYTES = 2**32  # of the values, which are gathered in memory before they are kept


@dataclass(eq=False)
class ControlValues:
    """Gathers values block by block while all cells are read, and keeps them; or reads those that were kept."""

    cache: Cache
    controls: np.ndarray  # (N,) bool
    _parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # indices and data of a block's controls
    _totals: list[np.ndarray] = field(default_factory=list)
    _n_bytes: int = 0
    _at: int = 0  # the next cell

    @property
    def is_kept(self) -> bool:
        """Whether they are kept already."""
        return is_derived(self.cache.storage, NAME, self._key)

    def add(self, rows: scipy.sparse.csr_matrix, totals: np.ndarray) -> None:
        """The next cells: values over all genes of their group (n, genes), and total counts (n,)."""
        mine = self.controls[self._at : self._at + rows.shape[0]]
        self._at += rows.shape[0]
        self._totals.append(totals)
        if self._n_bytes <= MOST_BYTES:
            part = rows[mine]
            self._parts.append((part.indices.astype(index_type_of(rows.shape[1])), part.data))
            self._n_bytes += sum(array.nbytes for array in self._parts[-1])

    def keep(self) -> None:
        """Keep what was gathered; more than MOST_BYTES is not kept."""
        assert self._at == len(self.controls)
        if self._n_bytes <= MOST_BYTES:
            indices, data = (_one_array([part[i] for part in self._parts]) for i in (0, 1))
            totals = np.concatenate(self._totals)
            keep_derived(self.cache.storage, NAME, self._key, {"indices": indices, "data": data, "totals": totals})
        self._parts.clear()
        self._totals.clear()

    def read(self) -> KeptValues | None:
        """What was kept of this cache; None where nothing was, or it is not what this cache's controls have."""
        arrays = read_derived(self.cache.storage, NAME, self._key, ("indices", "data", "totals"))
        if arrays is None:
            return None
        kept = KeptValues(list(self.cache.groups.values()), self.controls, **arrays)
        if kept.is_sound:
            return kept
        forget_derived(self.cache.storage, NAME, self._key)
        return None

    @property
    def _key(self) -> dict[str, Any]:
        return {"cache": self.cache.sha256, "controls": sha256(np.packbits(self.controls).tobytes())}


@dataclass(frozen=True, eq=False)
class KeptValues:
    """The control cells of all groups, each over all genes of its own group."""

    groups: list[Group]
    controls: np.ndarray  # (N,) bool
    indices: np.ndarray
    data: np.ndarray
    totals: np.ndarray  # (N,) float64 total counts of all cells

    @property
    def is_sound(self) -> bool:
        """Whether these are values of the controls: as many, of genes that their groups have, and of their scale."""
        n_values = sum(int(np.diff(group.indptr)[self.controls[of]].sum()) for group, of in self._groups())
        if (
            self.indices.shape != (n_values,)
            or self.data.shape != (n_values,)
            or self.totals.shape != self.controls.shape
        ):
            return False
        return not any(
            wrong_genes(rows) or wrong_values(rows.data, group.attributes["scale"]) for group, _, rows in self._rows()
        )

    def _groups(self) -> Iterator[tuple[Group, slice]]:
        """Every group, and where its cells stand among all."""
        cell = 0
        for group in self.groups:
            yield group, slice(cell, cell + group.n_cells)
            cell += group.n_cells

    def _rows(self) -> Iterator[tuple[Group, slice, scipy.sparse.csr_matrix]]:
        """Of every group: where its cells stand among all, and the values of its controls over its genes."""
        value = 0
        for group, of in self._groups():
            ends = np.concatenate([[0], np.cumsum(np.diff(group.indptr)[self.controls[of]])])
            part = slice(value, value + int(ends[-1]))
            yield (
                group,
                of,
                scipy.sparse.csr_matrix(
                    (self.data[part], self.indices[part].astype(np.int32), ends), shape=(len(ends) - 1, group.n_genes)
                ),
            )
            value = part.stop

    def over(
        self, genes: list[str], index_type: np.dtype, data_type: np.dtype
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Over the genes (G,): indices, data, values a cell (N,) int64, 0 for all but controls, and totals (N,)."""
        lengths, indices, data = np.zeros(len(self.controls), np.int64), [], []
        for group, of, rows in self._rows():
            mine = self.controls[of]
            if (columns := columns_of(group, genes)) is not None:
                rows = spread(rows, columns)
            lengths[of][mine] = np.diff(rows.indptr)
            indices.append(rows.indices.astype(index_type))
            data.append(rows.data.astype(data_type))
        return np.concatenate(indices), np.concatenate(data), lengths, self.totals


def _one_array(parts: list[np.ndarray]) -> Blocks:
    """Some arrays as one, which is never in memory beside them."""
    dtype = np.result_type(*parts)
    return Blocks((sum(map(len, parts)),), dtype, lambda: (part.astype(dtype, copy=False) for part in parts))


def index_type_of(n_genes: int) -> np.dtype:
    """The type of gene numbers."""
    return np.dtype(np.uint16 if n_genes <= 2**16 else np.int32)


def columns_of(group: Group, genes: list[str]) -> np.ndarray | None:
    """(G,) where the genes stand among the group's, -1 for one that it lacks; None: they are the group's, in order."""
    if group.genes == genes:
        return None
    place = {name: i for i, name in enumerate(group.genes)}
    return np.array([place.get(name, -1) for name in genes])


def spread(rows: scipy.sparse.csr_matrix, columns: np.ndarray) -> scipy.sparse.csr_matrix:
    """Columns of rows by number, (G,); -1: a gene that they do not have, of which nothing is stored."""
    there = columns >= 0
    if there.all():
        return rows[:, columns]
    found = rows[:, columns[there]]
    return scipy.sparse.csr_matrix(
        (found.data, np.flatnonzero(there)[found.indices], found.indptr), shape=(rows.shape[0], len(columns))
    )
