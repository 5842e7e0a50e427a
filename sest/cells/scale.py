"""What the values of a file are: counts or log1p, and how counts become log1p values.

N or n cells, G genes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from sest.errors import InputError, nearest, shown

logger = logging.getLogger(__name__)

LARGEST_LOG1P_OF_COUNTS = 35.0  # a larger value cannot be a log1p (upstream's limit per cell)
LARGEST_TOTAL_OF_COUNTS = 5e6  # nor can a cell's values if sum(expm1) is larger (upstream's limit per cell)
LARGEST_PREDICTED_LOG1P = 14.0  # predicted values are cut here: cell-eval takes 15 and more for counts


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


def scan_blocks(
    blocks: Iterable[sp.csr_matrix], n_cells: int, genes: Sequence[str], on_rows: Callable[[int], None] | None = None
) -> Scan:
    """Scan all cells of a file, given as blocks of canonical rows in order; `on_rows(n)` is told after each block."""
    hashes = {name: hashlib.sha256() for name in ("indptr", "indices", "data")}
    per_cell = np.zeros(n_cells + 1, dtype=np.int64)
    start, largest, negative, fractional, raw, log1p = 0, -np.inf, 0, 0, 0, 0
    for block in blocks:
        n = block.shape[0]
        per_cell[start + 1 : start + n + 1] = np.diff(block.indptr)
        hashes["indices"].update(block.indices.astype("<i4").tobytes())
        hashes["data"].update(block.data.astype("<f4").tobytes())
        whole = block.data == np.rint(block.data)
        negative += int((block.data < 0).sum())
        fractional += int(whole.size - whole.sum())
        largest = max(largest, float(block.max()))
        n_raw, n_log1p = _cells_of_one_scale(block, whole)
        raw, log1p, start = raw + n_raw, log1p + n_log1p, start + n
        if on_rows is not None:
            on_rows(n)
    indptr = np.cumsum(per_cell)
    hashes["indptr"].update(indptr.astype("<i8").tobytes())
    parts = [json.dumps([n_cells, len(genes), *genes]), *(h.hexdigest() for h in hashes.values())]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Scan(indptr, largest, fractional == 0, negative, raw, log1p, digest)


def _cells_of_one_scale(block: sp.csr_matrix, whole: np.ndarray) -> tuple[int, int]:
    """Cells of a block that can only be counts, and that can only be log1p; `whole` (nnz,) marks whole numbers."""
    starts = block.indptr[:-1][np.diff(block.indptr) > 0]  # cells without values say nothing
    if not len(starts):
        return 0, 0
    all_whole = np.logical_and.reduceat(whole, starts)
    high = np.maximum.reduceat(block.data, starts)
    total = np.add.reduceat(np.expm1(np.minimum(block.data, LARGEST_LOG1P_OF_COUNTS + 1)), starts)
    linear = (high > LARGEST_LOG1P_OF_COUNTS) | (total > LARGEST_TOTAL_OF_COUNTS)
    return int((linear | (all_whole & (high > 1))).sum()), int((~all_whole & ~linear).sum())


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
            logger.warning("%s: used as log1p as asked, though %d cells look like counts.", path, scan.n_raw_cells)
        return "log1p"
    if scan.n_negative and (requested == "raw" or scan.all_integer):
        raise InputError(f"{path} has {scan.n_negative} values below zero: these are not counts.{there}")
    if requested == "raw":
        if not scan.all_integer:
            logger.warning("%s: used as counts as asked, though not all values are whole numbers.", path)
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


def total_counts(rows: sp.csr_matrix) -> np.ndarray:
    """(n,) float64: the sum of each row, which SciPy adds up in float32 if the values are: exact up to 2**24 counts."""
    return np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()


def factors_to(target_sum: float, totals: np.ndarray) -> np.ndarray:
    """What the counts of cells with these totals (n,) are multiplied with: float64, 0 for a cell without counts."""
    return np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)


def log1p_rows(values: sp.csr_matrix, factor: np.ndarray) -> sp.csr_matrix:
    """log1p(count * factor) of CSR rows as float32, computed in the type of `factor` (n,) if that is float64.

    Rows with factor 0 hold log1p values already and stay.
    """
    per_value = np.repeat(factor, np.diff(values.indptr))
    data = values.data.astype(np.float32)
    logs = data * per_value
    np.copyto(data, np.log1p(logs, out=logs), where=per_value > 0)  # rounds what was computed in float64
    return sp.csr_matrix((data, values.indices, values.indptr), shape=values.shape)
