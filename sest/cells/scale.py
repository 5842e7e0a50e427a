"""What the values of a file are: counts or log1p, of which total, and how counts become log1p values.

N or n cells, G genes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from sest.cells.csr import LARGEST_LOG1P_OF_COUNTS, scan_values
from sest.errors import InputError, nearest, shown
from sest.files.cell_file import CellFile
from sest.files.matrix import rows_at_once

logger = logging.getLogger(__name__)

LARGEST_PREDICTED_LOG1P = 14.0  # predicted values are cut here: cell-eval takes 15 and more for counts
SAMPLED_CELLS = 256  # at most, evenly spaced over a file: their sums tell how it was normalised
FEWEST_CELLS = 10  # whose sums tell anything
ONE_TOTAL = 0.02  # (95% - 5% quantile) / median of sums that are one total; rounding to three digits gives 0.001
SAME_TOTAL = 0.05  # relative difference of totals that are taken for the same
ROUNDING = 1e-3  # how far expm1 of float32 log1p values, and the like, may be from the whole numbers they were
EXACT = 0.002  # another logarithm than log1p is believed where its sums agree so well,
CLEARLY = 10  # and so many times better than those of expm1
# what could have made the values, and what takes it back to (normalised) counts; the order of the columns of cell_sums
INVERSE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log1p": np.expm1,
    "log2": lambda x: np.expm1(x * np.log(2)),
    "log10": lambda x: np.expm1(x * np.log(10)),
    "no log": lambda x: x,
}


@dataclass(frozen=True)
class Normalisation:
    """How the values of a file that holds no counts were made, as far as the sums of its cells tell."""

    log: str = "log1p"  # a name of INVERSE
    total: float | None = None  # counts a cell was normalised to; None: the sums are not one total
    is_whole: bool = False  # taken back, the values are whole numbers: counts that were not normalised
    sums: tuple[float, float, float] | None = None  # 5%, 50%, 95% quantile over cells; None: too few to tell

    def __str__(self) -> str:
        if self.is_whole:
            return f"{self.log} of counts that were not normalised"
        if self.total is not None:
            if self.log == "no log":
                return f"counts normalised to {_total(self.total)}, without log"
            what = "CPM, counts" if abs(self.total / 1e6 - 1) < ONE_TOTAL else "counts"
            return f"{self.log} of {what} normalised to {_total(self.total)}"
        if self.sums is None:
            return self.log
        low, middle, high = (f"{value:,.4g}" if value < 100 else f"{value:,.0f}" for value in self.sums)
        return f"{self.log} of values whose sums differ from cell to cell ({low} to {high}, median {middle})"

    def differs_from(self, other: Normalisation) -> bool:
        """Whether the cells are certainly not normalised as others are.

        Sums that differ from cell to cell may be of a selection of genes, which has less than the total.
        """
        if self.sums is None or other.sums is None:
            return False
        if (self.log, self.is_whole) != (other.log, other.is_whole):
            return True
        if self.total is not None and other.total is not None:
            return abs(self.total / other.total - 1) > SAME_TOTAL
        known, sums = (self.total, other.sums) if other.total is None else (other.total, self.sums)
        return known is not None and sums[1] > (1 + SAME_TOTAL) * known


def normalised_to(total: float) -> Normalisation:
    """log1p of counts that are normalised to a total."""
    return Normalisation(total=total, sums=(total, total, total))


def _total(total: float) -> str:
    return f"{total:,.0f}" if total >= 100 else f"{total:.4g}"


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
    sha256: str  # of shape, gene names and values, whatever the storage form; "" where none was wanted
    n_whole_cells: int  # of n_raw_cells: those of whole numbers
    n_fractional: int  # values that are not whole
    mean: float  # over all cells and genes
    sums: np.ndarray  # (n, 7) float64: cell_sums of at most SAMPLED_CELLS cells, NaN where all cells near are whole
    near_whole: float  # share of these cells' values that are whole numbers but for ROUNDING

    @property
    def normalisation(self) -> Normalisation:
        """How the values were made, if they are no counts."""
        return normalisation_of(self.sums)

    @property
    def is_scaled(self) -> bool:
        """Whether the values are z-scores: many below zero, few whole, their mean near 0."""
        n_values = max(int(self.indptr[-1]), 1)
        return self.n_negative > 0.2 * n_values and self.n_fractional > 0.9 * n_values and abs(self.mean) < 0.25

    @property
    def is_nearly_counts(self) -> bool:
        """Whether nearly all values are whole, or would be but for rounding, and they are not of counts and others."""
        n_values, n_cells = int(self.indptr[-1]), len(self.indptr) - 1
        fill = 0 < self.n_log1p_cells * n_values <= 2 * self.n_fractional * n_cells  # whether fractions fill some cells
        nearly = 0 < self.n_fractional <= 0.01 * n_values or (self.n_fractional > 0 and self.near_whole > 0.99)
        return nearly and not (fill and 2 * self.n_whole_cells > self.n_raw_cells)


def scan_file(file: CellFile, on_rows: Callable[[int], None] | None = None) -> Scan:
    """Read all values of a file once; `on_rows(n)` is told after each block that n more cells are done."""
    n, step = file.n_cells, rows_at_once(file.n_genes)
    blocks = (file.rows(start, min(start + step, n)) for start in range(0, n, step))
    return scan_blocks(blocks, n, list(file.var.index), on_rows)


def scan_blocks(
    blocks: Iterable[sp.csr_matrix], n_cells: int, genes: Sequence[str], on_rows: Callable[[int], None] | None = None
) -> Scan:
    """Scan all cells of a file, given as blocks of canonical rows in order; `on_rows(n)` is told after each block."""
    scanner = Scanner(n_cells)
    for block in blocks:
        scanner.add(block)
        if on_rows is not None:
            on_rows(block.shape[0])
    return scanner.scan(genes)


class Scanner:
    """Makes the scan of a file from its rows, block by block, for who reads them anyway.

    Args:
        n_cells: of the whole file.
        hashed: whether `Scan.sha256` is wanted; without, it is "".
    """

    max_value: float  # of all values so far, those that are not stored too
    n_fractional: int  # values so far that are not whole

    def __init__(self, n_cells: int, hashed: bool = True) -> None:
        self.max_value, self.n_fractional = -np.inf, 0
        self._hashes = {name: hashlib.sha256() for name in ("indptr", "indices", "data")} if hashed else {}
        self._per_cell, self._start = np.zeros(n_cells + 1, np.int64), 0
        self._negative, self._raw, self._log1p, self._of_whole, self._total = 0, 0, 0, 0, 0.0
        self._step, self._sums, self._whole = -(-n_cells // SAMPLED_CELLS), [np.zeros((0, 7))], np.zeros(2, np.int64)

    def add(self, block: sp.csr_matrix) -> None:
        """The next cells, as canonical rows (n, G)."""
        n, start = block.shape[0], self._start
        self._per_cell[start + 1 : start + n + 1] = np.diff(block.indptr)
        if self._hashes:
            self._hashes["indices"].update(np.ascontiguousarray(block.indices, "<i4").data)
            self._hashes["data"].update(np.ascontiguousarray(block.data, "<f4").data)
        highest, total, negative, fractional, raw, log1p, of_whole = scan_values(block.indptr, block.data)
        if block.nnz < n * block.shape[1]:
            highest = max(highest, 0.0)
        if len(sampled := np.arange(-start % self._step, n, self._step)):
            some = block[sampled]
            self._sums.append(cell_sums(some) if fractional else np.full((len(sampled), 7), np.nan))
            self._whole += np.sum(np.abs(some.data - np.rint(some.data)) < ROUNDING), some.nnz
        self.max_value, self._total = max(self.max_value, highest), self._total + total
        self._negative, self.n_fractional = self._negative + negative, self.n_fractional + fractional
        self._raw, self._log1p, self._of_whole = self._raw + raw, self._log1p + log1p, self._of_whole + of_whole
        self._start += n

    def scan(self, genes: Sequence[str]) -> Scan:
        """What all cells show, of these genes (G)."""
        n_cells, indptr = len(self._per_cell) - 1, np.cumsum(self._per_cell)
        digest = ""
        if self._hashes:
            self._hashes["indptr"].update(indptr.astype("<i8").tobytes())
            parts = [json.dumps([n_cells, len(genes), *genes]), *(h.hexdigest() for h in self._hashes.values())]
            digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return Scan(
            indptr=indptr,
            max_value=self.max_value,
            all_integer=self.n_fractional == 0,
            n_negative=self._negative,
            n_raw_cells=self._raw,
            n_log1p_cells=self._log1p,
            sha256=digest,
            n_whole_cells=self._of_whole,
            n_fractional=self.n_fractional,
            mean=self._total / max(n_cells * len(genes), 1),
            sums=np.concatenate(self._sums),
            near_whole=float(self._whole[0] / max(self._whole[1], 1)),
        )


def cell_sums(rows: sp.csr_matrix) -> np.ndarray:
    """(n, 7) float64: sums of cells whose values are taken back by each of INVERSE, then 1 where that gives counts.

    The last three columns are of the logarithms: whether all values below 1,000 are whole numbers, and there are some.
    """
    x = np.minimum(rows.data.astype(np.float64), LARGEST_LOG1P_OF_COUNTS)
    cell = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    table = np.zeros((rows.shape[0], 7))
    for i, (name, inverse) in enumerate(INVERSE.items()):
        values = inverse(rows.data.astype(np.float64)) if name == "no log" else inverse(x)
        table[:, i] = np.bincount(cell, values, rows.shape[0])
        if name != "no log":
            small = (values > 0.5) & (values < 1000)
            uneven = (values <= 0.5) | (small & (np.abs(values - np.rint(values)) > ROUNDING))
            n_small, n_uneven = (np.bincount(cell, flags, rows.shape[0]) for flags in (small, uneven))
            table[:, 4 + i] = (n_small > 0) & (n_uneven == 0)
    return table


def normalisation_of(sums: np.ndarray) -> Normalisation:
    """What the `cell_sums` (n, 7) of some cells of a file say of all."""
    used = sums[np.nan_to_num(sums[:, 0]) > 0]
    if len(used) < FEWEST_CELLS:
        return Normalisation()
    low, middle, high = np.quantile(used[:, :4], (0.05, 0.5, 0.95), axis=0)
    spread = np.divide(high - low, middle, out=np.full(4, np.inf), where=middle > 0)
    names = list(INVERSE)
    best = int(np.argmin(spread))
    if best and not (spread[best] < EXACT and CLEARLY * (spread[best] + 1e-5) < spread[0]):
        best = 0
    whole = used[:, 4:].mean(0) > 0.95
    is_whole = bool(whole.any()) and spread[best] > ONE_TOTAL / 2
    if is_whole:
        best = int(np.argmax(whole))
    known = spread[best] < ONE_TOTAL and not is_whole
    quantiles = float(low[best]), float(middle[best]), float(high[best])
    return Normalisation(names[best], quantiles[1] if known else None, is_whole, quantiles)


def differing_scales(
    logged: Mapping[str, Normalisation], target_sum: float | None, counts: Sequence[str]
) -> str | None:
    """Say how files whose cells are used together were normalised; None where that is the same, as far as is known.

    Args:
        logged: the files that hold no counts, by name.
        target_sum: what counts are normalised to; None: nothing is compared with them.
        counts: names of the files of counts.
    """
    files = dict(logged)
    if counts and target_sum is not None:
        files = {counts[0]: normalised_to(target_sum), **files}
    known = [name for name, n in files.items() if n.total is not None]
    first = next(iter(known or files), "")
    wrong = [name for name, n in files.items() if n.differs_from(files[first])]
    if not wrong:
        return None
    told = [
        f"{name} is counts, normalised to {_total(float(target_sum or 0))}"
        if name in counts
        else f"{name} is {files[name]}"
        for name in (first, *wrong)
    ]
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more files differ" if len(told) > 3 else "")


def decide_scale(scan: Scan, requested: str, path: Path, layers: Sequence[str] = (), base: float | None = None) -> str:
    """Return "counts" or "log1p", the scale of the whole file; `requested`, from --counts, is auto, raw or log1p.

    auto: whole numbers with one above 1 are counts; values that are not whole, in cells that could all be log1p, are
    log1p. All else is an InputError (cells that disagree, zeros and ones only, CPM without log), which names `layers`.
    `base`: of logarithms, as the file says (`CellFile.log_base`).
    """
    there = f" Or choose with --layer: {shown(('X', *layers))}." if layers else ""
    choices = ("auto", "raw", "log1p")
    if requested not in choices:
        raise InputError(f"--counts {requested!r} is not one of {shown(choices)}.{nearest(requested, choices)}")
    if requested == "log1p":
        if (found := scan.normalisation).log != "log1p":
            looks = "counts" if scan.is_nearly_counts else found
            logger.warning("%s: used as log1p as asked, though it looks like %s.", path, looks)
        elif scan.n_raw_cells:
            logger.warning("%s: used as log1p as asked, though %d cells look like counts.", path, scan.n_raw_cells)
        return "log1p"
    if scan.n_negative:
        raise InputError(_negative(scan, requested, path, layers))
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
    if problem := _no_log1p(scan, base):
        raise InputError(f"{path} {problem}{there}")
    return "log1p"


def _negative(scan: Scan, requested: str, path: Path, layers: Sequence[str]) -> str:
    """What is wrong with a file that has values below zero, and what to read instead."""
    raw = " raw/X is there: pass --layer raw." if "raw" in layers else ""
    there = f" Or choose with --layer: {shown(('X', *layers))}." if layers and layers != ("raw",) else ""
    if requested == "raw":
        return f"{path} has {scan.n_negative:,} values below zero: these are not counts.{raw}{there}"
    if scan.is_scaled:
        share = scan.n_negative / int(scan.indptr[-1])
        return (
            f"{path} is scaled: {share:.0%} of its values are below zero and the mean is {scan.mean:.2g}, as of "
            f"z-scores (scanpy.pp.scale): neither counts nor log1p.{raw}{there}"
        )
    zero = "" if scan.all_integer else " Pass --counts log1p to have them read as 0."
    return f"{path} has {scan.n_negative:,} values below zero: these are not counts, and not log1p.{raw}{zero}{there}"


def _no_log1p(scan: Scan, base: float | None) -> str | None:
    """Why values that are not all whole are no log1p either, and what to do; None where they can be."""
    found, as_counts = scan.normalisation, "Pass --counts raw to use them as counts."
    if scan.is_nearly_counts:
        not_whole = f"{scan.n_fractional:,} of {int(scan.indptr[-1]):,} values are not exactly whole numbers"
        return f"holds counts, but {not_whole}. Round them (numpy.rint) and save it, or pass --counts raw."
    if found.log == "no log":
        return f"has values that are not whole and sum to {_total(found.total or 0)} in each cell: no log. {as_counts}"
    base = {"log2": 2, "log10": 10}.get(found.log, None if base is None or np.isclose(base, np.e) else base)
    if base is not None:
        what = found if found.log != "log1p" else f"logarithms of base {base:g}, as its uns['log1p'] says"
        return (
            f"holds {what}, not log1p. Convert it with adata.X = adata.X * numpy.log({base:g}) and save it, or pass "
            "--counts log1p to use it as it is."
        )
    if scan.n_raw_cells and scan.n_log1p_cells and 2 * scan.n_whole_cells > scan.n_raw_cells:
        return (
            f"mixes scales: {scan.n_raw_cells} cells can only be counts, {scan.n_log1p_cells} only log1p. "
            "Split the file, or pass --counts raw or --counts log1p if you know that all are the same."
        )
    if not scan.n_raw_cells:
        return None
    too_large = f"has values that are not whole and too large for log1p (up to {scan.max_value:g})"
    linear = np.nan_to_num(scan.sums[:, list(INVERSE).index("no log")])
    if (linear > 0).sum() < FEWEST_CELLS:
        return f"{too_large}, such as CPM without log. {as_counts}"
    low, middle, high = np.quantile(linear[linear > 0], (0.05, 0.5, 0.95))
    share = scan.n_fractional / int(scan.indptr[-1])
    return (
        f"{too_large}: {share:.0%} are not whole, and cells sum to {_total(low)} to {_total(high)} (median "
        f"{_total(middle)}), as counts that were corrected for ambient RNA. {as_counts}"
    )


def total_counts(rows: sp.csr_matrix) -> np.ndarray:
    """(n,) float64: the sum of each row, which SciPy adds up in float32 if the values are: exact up to 2**24 counts."""
    lengths = np.diff(rows.indptr)
    if rows.dtype.kind in "iu" and rows.nnz:
        largest = max(int(rows.data.max()), -int(rows.data.min()))
        if largest * int(lengths.max()) < 2**31:  # which SciPy takes 4 times as long for
            some, totals = np.flatnonzero(lengths), np.zeros(rows.shape[0])
            totals[some] = np.add.reduceat(rows.data, rows.indptr[some], dtype=np.int32)
            return totals
    return np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()


def factors_to(target_sum: float, totals: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """What counts of cells with these totals (n,) are multiplied with, 0 where there are none; in `out`, or float64."""
    out = np.zeros_like(totals) if out is None else out
    return np.divide(target_sum, totals, out=out, where=totals > 0, casting="same_kind")


def totals_of(target_sum: float, factor: np.ndarray) -> np.ndarray:
    """(n,) float64 total counts of cells of counts, by what `factors_to` made of them; 0 of one that has none."""
    factor = factor.astype(np.float64)
    return np.divide(target_sum, factor, out=np.zeros_like(factor), where=factor > 0)


def log1p_rows(values: sp.csr_matrix, factor: np.ndarray) -> sp.csr_matrix:
    """log1p(count * factor) of CSR rows as float32, computed in the type of `factor` (n,) if that is float64.

    Rows with factor 0 hold log1p values already and stay.
    """
    per_value = np.repeat(factor, np.diff(values.indptr))
    data = values.data.astype(np.float32)
    logs = data * per_value
    np.copyto(data, np.log1p(logs, out=logs), where=per_value > 0)  # rounds what was computed in float64
    return sp.csr_matrix((data, values.indices, values.indptr), shape=values.shape)


def cut_log1p(values: sp.csr_matrix) -> sp.csr_matrix:
    """Values within [0, 14], in their place; log1p values of counts are far below that anyway."""
    values.data = values.data.clip(0.0, LARGEST_PREDICTED_LOG1P)
    return values
