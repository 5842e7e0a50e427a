"""The training targets: expression of all cells of a cache as one CSR, in memory or in files that are mapped.

Counts stay whole numbers and gene numbers take two bytes, so an expressed gene of a cell costs four bytes;
sest.data.gather makes them dense. Shapes: N cells of all groups in the cache's order, G genes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse

from sest import progress
from sest.cache import Cache, Group
from sest.cache.disk import flush, write_durably
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

VALUES_PER_READ = (
    2**22
)  # about: 16 chunks of the cache; of larger blocks each would be new memory for the system to clear
PLACES = 4  # of a group, from which its sampled cells are read
# files of values on disk; the mark says of which cache they are, and is written last
SCRATCH_MARK, INDICES, DATA, LENGTHS, TOTALS = "targets.json", "indices.bin", "data.bin", "lengths.npy", "totals.npy"


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

    def require(self, rows: np.ndarray) -> None:
        """Check that the values of cells (n,) are here: those of others would look like zeros."""
        assert self.held is None or self.held[rows].all(), "values of cells that were not read"

    def values(self, rows: np.ndarray) -> scipy.sparse.csr_matrix:
        """Cells (n,) as stored, (n, G) CSR."""
        self.require(rows)
        indptr, indices, data = take_rows(rows, self.indptr, self.indices, self.data)
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
        where: "memory", "disk" (plain files below `scratch`, mapped), or "auto": memory if they fit.
        scratch: folder for those files. What an earlier run finished there is used again, if it is of the same cache.
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
        indices, data, lengths, total = kept.over(genes, index_type, data_type)
    elif _choose(where, _n_values(groups) * (index_type.itemsize + data_type.itemsize), scratch) == "memory":
        indices, data = np.empty(_n_values(groups), index_type), np.empty(_n_values(groups), data_type)

        def put(at: int, rows: scipy.sparse.csr_matrix) -> None:
            indices[at : at + rows.nnz], data[at : at + rows.nnz] = rows.indices, rows.data

        lengths, total = _fill(groups, genes, put, own)
    else:
        assert scratch is not None
        indices, data, lengths, total = _on_disk(scratch, cache, genes, index_type, data_type)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    is_counts = np.repeat([g.attributes["scale"] == "counts" for g in groups], [g.n_cells for g in groups])
    wanted = _target_sum(target_sum, total[is_counts])
    scales = {str(g.attributes["scale"]) for g in groups}
    return Targets(
        genes=tuple(genes),
        indptr=indptr,
        indices=indices[: indptr[-1]],
        data=data[: indptr[-1]],
        factor=np.where(is_counts, factors_to(wanted, total), 0.0).astype(np.float32),
        target_sum=wanted,
        scale=scales.pop() if len(scales) == 1 else "mixed",
        measured=_measured(groups, genes) if axis == "union" else None,
        first=np.cumsum([0, *(group.n_cells for group in groups)]),
        held=None if kept is None else controls,
    )


def _n_values(groups: list[Group]) -> int:
    """Stored values; those of genes that are left out among them."""
    return sum(int(group.indptr[-1]) for group in groups)


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


def _counted(cache: Cache) -> list[str]:
    """The groups that hold counts."""
    return [group.path for group in cache.groups.values() if group.attributes["scale"] == "counts"]


def refuse_mixed_scales(cache: Cache, target_sum: float, mixed_scales: str) -> None:
    """Refuse groups that were normalised differently, or only say so.

    Args:
        target_sum: what counts are to be normalised to.
        mixed_scales: "refuse" or "allow".

    Raises:
        InputError: they differ and that is not allowed; it says which target sum would agree, where one does.
    """
    found, counts = normalisations(cache), _counted(cache)
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


def _choose(where: str, needed: int, scratch: Path | None) -> str:
    """ "memory" or "disk" for values of `needed` bytes; refuses what has no room."""
    free = available_bytes()
    fits = needed < SHARE * free
    sizes = f"The expression values take {needed / 1e9:.1f} GB, of {free / 1e9:.1f} GB of free memory"
    if where == "disk" or (where == "auto" and not fits and scratch is not None):
        assert scratch is not None
        folder = next(parent for parent in (scratch, *scratch.absolute().parents) if parent.exists())
        room = shutil.disk_usage(folder).free
        if needed > room:
            raise InputError(
                f"{sizes} and {room / 1e9:.1f} GB of free disk at {scratch}. Name a larger disk with --scratch."
            )
        logger.info(f"{sizes}; they are read from {scratch}.")
        return "disk"
    if not fits:
        raise InputError(f"{sizes}. Use a machine with more memory, or a cache of fewer cells.")
    return "memory"


def _blocks(
    groups: list[Group], genes: list[str], own: ControlValues | None
) -> Iterator[tuple[scipy.sparse.csr_matrix, np.ndarray]]:
    """Rows of all groups over `genes`, and their totals over all genes of their file (n,) float64."""
    for group in groups:
        columns = columns_of(group, genes)
        values_a_cell = max(int(group.indptr[-1]) // max(group.n_cells, 1), 1)
        step = max(VALUES_PER_READ // values_a_cell, 1)
        for start in range(0, group.n_cells, step):
            rows = group.targets(start, min(start + step, group.n_cells))
            totals = total_counts(rows)
            if own is not None:
                own.add(rows, totals)
            yield rows if columns is None else spread(rows, columns), totals


def _fill(
    groups: list[Group],
    genes: list[str],
    put: Callable[[int, scipy.sparse.csr_matrix], None],
    own: ControlValues | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hand all rows to `put`, block by block; returns values a cell (N,) int64 and totals (N,) float64."""
    progress.begin("Loading targets", sum(g.n_cells for g in groups), "cells")
    lengths, totals, at = [], [], 0
    with closing(ahead(_blocks(groups, genes, own), 1)) as blocks:
        for rows, total in blocks:
            put(at, rows)
            at += rows.nnz
            progress.advance(rows.shape[0])
            lengths.append(np.diff(rows.indptr).astype(np.int64))
            totals.append(total)
    if own is not None:
        own.keep()
    return np.concatenate(lengths), np.concatenate(totals)


def _on_disk(
    scratch: Path, cache: Cache, genes: list[str], index_type: np.dtype, data_type: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mapped indices and data, and in memory values a cell and totals (see `_fill`); written if not there already."""
    identity = {
        "store": cache.sha256,  # the key of older files: a scratch folder outlives a version
        "genes": hashlib.sha256("\n".join(genes).encode()).hexdigest(),
        "types": [str(index_type), str(data_type)],
    }
    text, mark = json.dumps(identity, sort_keys=True), scratch / SCRATCH_MARK
    if mark.is_file() and mark.read_text() == text:
        logger.info(f"The values in {scratch} are used again.")
    else:
        _write_scratch(scratch, text, list(cache.groups.values()), genes, index_type, data_type)
    return (
        _mapped(scratch / INDICES, index_type),
        _mapped(scratch / DATA, data_type),
        np.load(scratch / LENGTHS),
        np.load(scratch / TOTALS),
    )


def _write_scratch(
    scratch: Path, text: str, groups: list[Group], genes: list[str], index_type: np.dtype, data_type: np.dtype
) -> None:
    """Write the values as plain files, then the mark that says which values they are."""
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / SCRATCH_MARK).unlink(missing_ok=True)
        with open(scratch / INDICES, "wb") as indices, open(scratch / DATA, "wb") as data:

            def put(at: int, rows: scipy.sparse.csr_matrix) -> None:
                indices.write(rows.indices.astype(index_type).tobytes())
                data.write(rows.data.astype(data_type).tobytes())

            lengths, totals = _fill(groups, genes, put)
        np.save(scratch / LENGTHS, lengths)
        np.save(scratch / TOTALS, totals)
        for name in (INDICES, DATA, LENGTHS, TOTALS):
            flush(scratch / name)
        write_durably(scratch / SCRATCH_MARK, text.encode())
    except OSError as error:
        raise InputError(f"Cannot write to {scratch}: {error.strerror}. Name another folder with --scratch.") from error


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    """A file's numbers, read when they are used."""
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    values = np.memmap(file, dtype, "r")
    values._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined] # cells come in any order: no reading ahead
    return values


def remove_scratch(scratch: Path) -> None:
    """Delete the files that read_targets made in `scratch`, and the folder if nothing else is in it.

    Where that fails it is said: what they served is done.
    """
    try:
        for name in (SCRATCH_MARK, INDICES, DATA, LENGTHS, TOTALS):
            (scratch / name).unlink(missing_ok=True)
        if scratch.is_dir() and not any(scratch.iterdir()):
            scratch.rmdir()
    except OSError as error:
        logger.warning(f"{scratch} could not be deleted ({error.strerror}); nothing needs it any more.")


def _target_sum(asked: float | str, totals: np.ndarray) -> float:
    if asked == "median":
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
