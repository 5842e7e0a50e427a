"""The training targets: expression of all cells of a cache as one CSR, in memory or in files that are mapped.

Counts stay whole numbers and gene numbers take two bytes, so an expressed gene of a cell costs four bytes;
sest.data.gather makes them dense. Shapes: N cells of all groups in the cache's order, G genes.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse

from sest import progress
from sest.cache import Cache, Group
from sest.cache.derived import Unfinished, folder_of, lacking_bytes, read_folder, write_once
from sest.cache.disk import sha256
from sest.cells.scale import (
    SAMPLED_CELLS,
    Normalisation,
    cell_sums,
    differing_scales,
    factors_to,
    log1p_rows,
    normalisation_of,
    total_counts,
)
from sest.data.control_values import ControlValues, columns_of, index_type_of, spread
from sest.data.gather import take_rows
from sest.errors import InputError, shown
from sest.machine.ahead import ahead
from sest.machine.memory import SHARE, available_bytes

logger = logging.getLogger(__name__)

# About 8 chunks of the cache. Larger blocks would each be new memory, which the system clears first.
VALUES_PER_READ = 2**21
PLACES = 4  # of a group, from which its sampled cells are read
VALUES = "values"  # what their files are called beside a cache, see sest.cache.derived


class _Values(NamedTuple):
    """The CSR of all cells, and their total counts; in memory, or mapped from files."""

    indices: np.ndarray  # (nnz,)
    data: np.ndarray  # (nnz,)
    indptr: np.ndarray  # (N + 1,) int64
    totals: np.ndarray  # (N,) float64, over all genes of a cell's file


@dataclass(frozen=True, eq=False)
class Targets:
    """Expression of all cells, as one CSR over the run's genes, with what turns it into log1p targets."""

    genes: tuple[str, ...]  # (G,)
    indptr: np.ndarray  # (N + 1,) int64
    indices: np.ndarray  # (nnz,) uint16, or int32 where there are more genes than that numbers
    data: np.ndarray  # (nnz,) int16, int32 or float32
    factor: np.ndarray  # (N,) float32: target_sum / total counts; 0 marks a log1p source, used as it is
    target_sum: float  # counts a cell is normalised to
    scale: str  # "counts", "log1p", or "mixed" over files
    measured: np.ndarray | None = None  # (files, G) bool: the genes that each has; None: all have all
    first: np.ndarray | None = None  # (files + 1,) where the cells of each begin, with `measured`
    held: np.ndarray | None = None  # (N,) bool: the cells whose values are here; None: those of all

    def measured_by(self, rows: np.ndarray) -> np.ndarray | None:
        """(n, G) bool: the genes of the file that each cell (n,) is of; None: all of them."""
        if self.measured is None or self.first is None:
            return None
        genes: np.ndarray = self.measured[np.searchsorted(self.first, rows, side="right") - 1]
        return genes

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.data.nbytes + self.factor.nbytes)

    @property
    def on_disk(self) -> bool:
        """Whether the values are mapped from files."""
        return isinstance(self.data, np.memmap)

    @property
    def folder(self) -> Path | None:
        """That of the files."""
        return Path(str(self.data.filename)).parent if isinstance(self.data, np.memmap) else None

    def require(self, rows: np.ndarray) -> None:
        """Check that the values of cells (n,) are here: those of others would look like zeros."""
        assert self.held is None or self.held[rows].all(), "values of cells that were not read"

    def values(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """Cells (n,) as stored, (n, G) CSR."""
        self.require(rows)
        indptr, indices, data = take_rows(rows, self.indptr, self.indices, self.data, len(self.genes))
        return scipy.sparse.csr_matrix((data, indices, indptr), shape=(len(rows), len(self.genes)))

    def log1p(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """Cells (n,) as log1p values, (n, G) CSR float32."""
        return log1p_rows(self.values(rows), self.factor[rows])


def read_targets(
    cache: Cache,
    target_sum: float | str,
    *,
    axis: str = "common",
    where: str = "auto",
    scratch: Path | None = None,
    controls: np.ndarray | None = None,
    only_controls: bool = False,
) -> Targets:
    """Read the targets of all groups.

    Args:
        axis: their genes: "common", those that all groups have, or "union", those that any has.
        target_sum: a number, or "median" of the cells' total counts.
        where: "memory", "disk" (plain files, mapped), or "auto": memory if they fit.
        scratch: folder for those files; None: beside the cache. They are written once for a cache and its genes, and
            stay for whoever needs them next.
        controls: (N,) bool. Their values are kept beside the cache, and the total counts of all cells.
        only_controls: read them from there and no others, if they are there.

    Raises:
        InputError: no expression values in the cache, no gene in common, an unusable target sum, no room for them.
    """
    if not cache.attributes.get("targets", True):
        raise InputError(
            f"{cache.path} holds no expression values (an unfinished --to-h5ad made it). Embed with --cache."
        )
    groups = list(cache.groups.values())
    genes = _union_of_genes(groups) if axis == "union" else _common_genes(groups)
    index_type = index_type_of(len(genes))
    data_type = np.result_type(*(group.target_dtype for group in groups))
    own = ControlValues(cache, controls) if controls is not None else None
    kept = own.read() if own is not None and only_controls else None
    own = None if own is not None and own.is_kept else own
    if kept is not None:
        indices, data, lengths, totals = kept.over(genes, index_type, data_type)
        values = _Values(indices, data, np.concatenate([[0], np.cumsum(lengths)]), totals)
    elif _is_for_memory(where, needed := _needed(groups, index_type, data_type)):
        values = _in_memory(groups, genes, index_type, data_type, own)
    else:
        values = _on_disk(scratch, cache, genes, index_type, data_type, own, needed)
    first = np.cumsum([0, *(group.n_cells for group in groups)])
    counts = [
        slice(a, b) for g, a, b in zip(groups, first, first[1:], strict=False) if g.attributes["scale"] == "counts"
    ]
    wanted = _target_sum(target_sum, [values.totals[of] for of in counts])
    factor = np.zeros(first[-1], np.float32)
    for of in counts:
        factors_to(wanted, values.totals[of], out=factor[of])
    scales = {str(g.attributes["scale"]) for g in groups}
    return Targets(
        genes=tuple(genes),
        indptr=values.indptr,
        indices=values.indices[: values.indptr[-1]],
        data=values.data[: values.indptr[-1]],
        factor=factor,
        target_sum=wanted,
        scale=scales.pop() if len(scales) == 1 else "mixed",
        measured=_measured(groups, genes) if axis == "union" else None,
        first=first,
        held=None if kept is None else controls,
    )


def _needed(groups: list[Group], index_type: np.dtype, data_type: np.dtype) -> int:
    """Bytes of all values at most, as those of genes that are left out are among them, and 16 for each cell."""
    values = sum(group.n_values for group in groups)
    return values * (index_type.itemsize + data_type.itemsize) + 16 * sum(group.n_cells for group in groups)


def normalisations(cache: Cache) -> dict[str, Normalisation]:
    """How the log1p values of each group that holds some were made, by the group's path; from a few of its cells."""
    found = {}
    for group in cache.groups.values():
        if group.attributes["scale"] == "counts" or not cache.attributes.get("targets", True):
            continue
        n = SAMPLED_CELLS // PLACES
        starts = sorted({int(at) for at in np.linspace(0, max(group.n_cells - n, 0), PLACES)})
        rows = [group.targets(at, min(at + n, group.n_cells)) for at in starts]
        found[group.path] = normalisation_of(np.concatenate([cell_sums(part) for part in rows]))
    return found


def refuse_mixed_scales(cache: Cache, target_sum: float, mixed_scales: str) -> None:
    """Refuse groups that were normalised differently, or only say so.

    Args:
        target_sum: what counts are to be normalised to.
        mixed_scales: "refuse" or "allow".

    Raises:
        InputError: they differ and that is not allowed; it says which target sum would agree, where one does.
    """
    found = normalisations(cache)
    counts = [group.path for group in cache.groups.values() if group.attributes["scale"] == "counts"]
    for path, normalisation in found.items():
        logger.info(f"{path}: {normalisation}; its values are targets as they are.")
    differing = differing_scales(found, target_sum, counts)
    if not differing:
        return
    if mixed_scales == "allow":
        logger.warning(f"Files that were normalised differently are trained on together, as asked: {differing}.")
        return
    known = [n.total for n in found.values() if n.total is not None]
    agree = f"pass --target-sum {known[0]:.0f}, or " if known and not differing_scales(found, known[0], counts) else ""
    raise InputError(
        f"The files of the cache were normalised differently: {differing}. "
        f"{agree[:1].upper() + agree[1:]}{'n' if agree else 'N'}ormalise them alike and embed them again; "
        "--mixed-scales allow trains on them as they are."
    )


def _is_for_memory(where: str, needed: int) -> bool:
    """Whether values of `needed` bytes go into memory; refuses what is to and does not fit."""
    fits = needed < SHARE * available_bytes()
    if where == "memory" and not fits:
        raise InputError(f"{_sizes(needed)}. Use a machine with more memory, or a cache of fewer cells.")
    return where == "memory" or (where == "auto" and fits)


def _sizes(needed: int) -> str:
    return f"The expression values take {needed / 1e9:.1f} GB, of {available_bytes() / 1e9:.1f} GB of free memory"


def _blocks(
    groups: list[Group], genes: list[str], own: ControlValues | None, first: int
) -> Iterator[tuple[scipy.sparse.csr_matrix, np.ndarray]]:
    """Rows of all groups over `genes`, from cell `first` on, and their totals over all genes of their file (n,)."""
    for group in groups:
        columns = columns_of(group, genes)
        step = max(VALUES_PER_READ // max(group.n_values // max(group.n_cells, 1), 1), 1)
        for start in range(min(first, group.n_cells), group.n_cells, step):
            rows = group.targets(start, min(start + step, group.n_cells))
            totals = total_counts(rows)
            if own is not None:
                own.add(rows, totals)
            yield rows if columns is None else spread(rows, columns), totals
        first = max(first - group.n_cells, 0)


def _fill(
    groups: list[Group],
    genes: list[str],
    put: Callable[[scipy.sparse.csr_matrix, np.ndarray], None],
    own: ControlValues | None = None,
    first: int = 0,
) -> None:
    """Hand all cells from `first` on to `put`, block by block: rows over `genes`, and totals (n,) float64."""
    progress.begin("Loading targets", sum(g.n_cells for g in groups), "cells", first)
    with closing(ahead(_blocks(groups, genes, own, first), 1)) as blocks:
        for rows, totals in blocks:
            put(rows, totals)
            progress.advance(rows.shape[0])
    if own is not None:
        own.keep()


def _in_memory(
    groups: list[Group], genes: list[str], index_type: np.dtype, data_type: np.dtype, own: ControlValues | None
) -> _Values:
    n_cells, n_values = (sum(n) for n in zip(*((g.n_cells, g.n_values) for g in groups), strict=True))
    values = _Values(
        np.empty(n_values, index_type),
        np.empty(n_values, data_type),
        np.zeros(n_cells + 1, np.int64),
        np.empty(n_cells),
    )
    cell = 0

    def put(rows: scipy.sparse.csr_matrix, totals: np.ndarray) -> None:
        nonlocal cell
        at, stop = values.indptr[cell], cell + len(totals)
        values.indices[at : at + rows.nnz], values.data[at : at + rows.nnz] = rows.indices, rows.data
        values.indptr[cell + 1 : stop + 1] = at + rows.indptr[1:]
        values.totals[cell:stop] = totals
        cell = stop

    _fill(groups, genes, put, own)
    return values


def _on_disk(
    scratch: Path | None,
    cache: Cache,
    genes: list[str],
    index_type: np.dtype,
    data_type: np.dtype,
    own: ControlValues | None,
    needed: int,
) -> _Values:
    """Mapped from files, which are written first, or to their end, if they are not there. `own`: if from the start."""
    types = {"indices": index_type, "data": data_type, "indptr": np.dtype(np.int64), "totals": np.dtype(np.float64)}
    key = {
        "cache": cache.sha256,
        "genes": sha256("\n".join(genes).encode()),
        "types": {name: str(dtype) for name, dtype in types.items()},
    }
    folder = folder_of(cache.storage, VALUES, key, scratch)
    if folder is None:
        raise InputError(
            f"{_sizes(needed)}, and no files of them can be mapped beside {cache.path}, which is on object storage. "
            "Name a folder on a disk with --scratch."
        )

    def write(files: Unfinished) -> None:
        first = files.n["totals"]
        if first:
            logger.info(f"{folder} was begun before: {first:,} cells are there, the others follow.")
        else:
            files.append(indptr=np.zeros(1 - files.n["indptr"], np.int64))

        def put(rows: scipy.sparse.csr_matrix, totals: np.ndarray) -> None:
            ends = files.n["data"] + rows.indptr[1:].astype(np.int64)
            files.append(indices=rows.indices, data=rows.data, indptr=ends, totals=totals)

        _fill(list(cache.groups.values()), genes, put, None if first else own, first)

    found = read_folder(folder, key, types)
    if found is None and (lacking := lacking_bytes(folder, needed)):
        lacks = f"{lacking / 1e9:.1f} GB more than the disk of {folder.parent} has free"
        raise InputError(f"{_sizes(needed)}, and {lacks}. Name a larger disk with --scratch.")
    stay = "They serve later runs too; rm -r of that folder loses nothing but time."
    logger.info(f"{_sizes(needed)}; they are read from {folder}. {stay}")
    if found is not None:
        logger.info(f"The values in {folder} are used again.")
    else:
        try:
            found = write_once(folder, key, types, write)
        except OSError as error:
            why = f"Cannot write to {folder.parent}: {error.strerror}."
            raise InputError(f"{why} Name another folder with --scratch.") from error
    values = _Values(**found)
    if not _is_csr(values, types, cache.n_cells):
        raise InputError(f"The values in {folder} are damaged. Delete that folder: it is made again.")
    for array in (values.indices, values.data):
        if isinstance(array, np.memmap):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined] # cells come in any order
    return values


def _is_csr(found: _Values, types: dict[str, np.dtype], n_cells: int) -> bool:
    """Whether mapped arrays are the rows of so many cells; gene numbers are checked as they are gathered."""
    ends, n_values, shapes = found.indptr, len(found.data), [values.shape for values in found]
    known = shapes == [(n_values,), (n_values,), (n_cells + 1,), (n_cells,)]
    known &= all(getattr(found, name).dtype == dtype for name, dtype in types.items())
    return known and bool(ends[0] == 0 and ends[-1] == n_values and (ends[1:] >= ends[:-1]).all())


def _target_sum(asked: float | str, of_groups: list[np.ndarray]) -> float:
    if asked == "median":
        totals = np.concatenate([*of_groups, np.zeros(0)])
        return float(np.median(totals[totals > 0])) if (totals > 0).any() else 10_000.0
    if isinstance(asked, str) or not 0 < asked < float("inf"):
        raise InputError(f"target-sum is {asked}; it takes a number above 0, or 'median'.")
    return float(asked)


def _union_of_genes(groups: list[Group]) -> list[str]:
    """The genes that any group has: the first one's in its order, then what each further one adds."""
    if len(groups) > 1 and any(all(name.isdecimal() for name in group.genes) for group in groups):
        raise InputError("The genes of this cache are numbers, which are not told apart: no --gene-axis union of them.")
    genes = list(dict.fromkeys(name for group in groups for name in group.genes))
    if shared := len(set.intersection(*(set(group.genes) for group in groups))):
        logger.info(f"Training on the {len(genes):,} genes that any file has; all have {shared:,} of them.")
    else:
        raise InputError(f"The groups have no gene in common ({shown(g.path for g in groups)}).")
    return genes


def _measured(groups: list[Group], genes: list[str]) -> np.ndarray | None:
    """(groups, G) bool: which of `genes` each group has; None: all have all."""
    every = set(genes)
    if all(every.issubset(group.genes) for group in groups):
        return None
    return np.array([np.isin(genes, group.genes) for group in groups])


def _common_genes(groups: list[Group]) -> list[str]:
    """The genes that all groups have, in the first one's order."""
    first = groups[0].genes
    shared = set(first).intersection(*(g.genes for g in groups[1:]))
    genes = [name for name in first if name in shared]
    if not genes:
        raise InputError(f"The groups have no gene in common ({shown(g.path for g in groups)}).")
    if len(groups) > 1 and all(name.isdecimal() for name in genes):
        logger.info("The genes of this cache are numbers: files with the same number are taken to mean one gene.")
    most = max(g.n_genes for g in groups)
    if len(genes) < most:
        logger.info(f"Training on the {len(genes):,} genes that all groups have (of up to {most:,}).")
    return genes
