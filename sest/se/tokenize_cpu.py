"""The sentences of `sest.se.tokenize` on a CPU: from CSR rows straight to positions, compiled by numba.

Nothing is made dense. An expressed gene costs one hash and its part of a radix sort; unexpressed genes are hashed only
where a cell has fewer expressed genes than slots, and of them only those above a threshold are sorted.

Shapes: B cells, K kept genes, L = pad_length slots. What is compiled is kept (sest.machine.jit).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from sest.machine.jit import compiled
from sest.se.tokenize import sentences

DIGIT = 11  # bits of a pass of the radix sort: the counts of all six passes fit a first-level cache
N_BUCKETS = 1 << DIGIT
N_PASSES = 6
CELLS_A_PART = 16  # at least: longer than another thread takes to wake up


@compiled(None, inside=True)
def _mix32(x: Any) -> Any:
    """`sest.head.mix.mix32` of one uint32."""
    x = np.uint32(np.uint32(x ^ np.uint32(x >> 16)) * np.uint32(0x7FEB352D))
    x = np.uint32(np.uint32(x ^ np.uint32(x >> 15)) * np.uint32(0x846CA68B))
    return np.uint32(x ^ np.uint32(x >> 16))


@compiled(None, inside=True)
def _sort(keys: Any, items: Any, n: int, other_keys: Any, other_items: Any, counts: Any) -> bool:
    """Sort the first n uint64 keys and their items, ascending; True where the result lies in the other arrays.

    n is at most the length of all four; places are counts of keys, and so below n.
    """
    counts[:] = 0
    for i in range(n):
        key = keys[i]
        for digit in range(N_PASSES):
            counts[digit, (key >> np.uint64(digit * DIGIT)) & np.uint64(N_BUCKETS - 1)] += 1
    swapped = False
    for digit in range(N_PASSES):
        shift = np.uint64(digit * DIGIT)
        if counts[digit, (keys[0] >> shift) & np.uint64(N_BUCKETS - 1)] == n:
            continue  # all keys have the same digit: usual for the values of counts
        place = 0
        for bucket in range(N_BUCKETS):
            size = counts[digit, bucket]
            counts[digit, bucket] = place
            place += size
        for i in range(n):
            bucket = (keys[i] >> shift) & np.uint64(N_BUCKETS - 1)
            place = counts[digit, bucket]
            counts[digit, bucket] = place + 1
            other_keys[place], other_items[place] = keys[i], items[i]
        keys, items, other_keys, other_items = other_keys, other_items, keys, items
        swapped = not swapped
    return swapped


def _plain_sentences(
    indptr: Any,
    genes: Any,
    bits: Any,
    logs: Any,
    place: Any,
    tokens: Any,
    keys: Any,
    cls_count_gene: int,
    positions: Any,
    counts: Any,
) -> None:
    """By `sest.se.tokenize`, some cells at a time; the shares as they are summed and divided below."""
    n_kept = len(tokens)
    for start in range(0, len(keys), CELLS_A_PART):
        cells = slice(start, start + CELLS_A_PART)
        n = len(keys[cells])
        values = slice(indptr[start], indptr[start + n])
        gene, cell = place[genes[values]], np.repeat(np.arange(n), np.diff(indptr[start : start + n + 1]))
        used = (gene >= 0) & (bits[values] > 0)
        gene, cell, log = gene[used], cell[used], logs[values][used]
        dense, log_of = np.zeros((2, n, n_kept), np.float32)
        dense[cell, gene], log_of[cell, gene] = bits[values][used].view(np.float32), log
        row = positions[cells]
        hashed, key = (torch.from_numpy(numbers.view(np.int32)) for numbers in (tokens, keys[cells]))
        row[:] = sentences(torch.from_numpy(dense), hashed, key, row.shape[1] + 1).numpy()
        with np.errstate(over="ignore"):
            total = np.bincount(cell, log, n).astype(np.float32)[:, None]
        shown = np.take_along_axis(log_of, np.insert(row, 0, cls_count_gene, axis=1), axis=1)
        shares = np.divide(shown, total, out=np.full_like(shown, 1.0 / n_kept), where=total > 0)
        counts[cells] = np.float32(100.0) * shares


@compiled(_plain_sentences, nogil=True)
def _sentences(
    indptr: Any,
    genes: Any,
    bits: Any,
    logs: Any,
    place: Any,
    tokens: Any,
    keys: Any,
    cls_count_gene: int,
    positions: Any,
    counts: Any,
) -> None:
    """Fill `positions` (B, L - 1) and `counts` (B, L); the other arguments are described in `tokenize`."""
    n_slots, n_kept = positions.shape[1], len(tokens)
    a_keys, b_keys = np.empty(n_kept, np.uint64), np.empty(n_kept, np.uint64)
    a_items, b_items = np.empty(n_kept, np.int32), np.empty(n_kept, np.int32)
    buckets = np.empty((N_PASSES, N_BUCKETS), np.int32)
    log_of = np.zeros(n_kept, np.float32)  # of the cell in hand; all zero between cells
    expressed = np.zeros(n_kept, np.bool_)  # likewise
    hashes = np.empty(n_kept, np.uint32)
    for cell in range(len(keys)):
        key = keys[cell]
        n, total = 0, 0.0
        for i in range(indptr[cell], indptr[cell + 1]):
            gene = place[genes[i]]
            if gene < 0 or bits[i] <= 0:  # not kept; zero or negative (the sign bit is set)
                continue
            a_keys[n] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(_mix32(np.uint32(key ^ tokens[gene])))
            a_items[n] = gene
            log_of[gene], expressed[gene] = logs[i], True
            total += logs[i]
            n += 1
        row = positions[cell]
        n_first = min(n, n_slots)
        if n:
            items = b_items if _sort(a_keys, a_items, n, b_keys, b_items, buckets) else a_items
            for slot in range(n_first):
                row[slot] = items[n - 1 - slot]
        n_zero, n_open = n_kept - n, n_slots - n_first
        if n_open and n_zero:
            for gene in range(n_kept):
                hashes[gene] = _mix32(np.uint32(key ^ tokens[gene]))
            wanted, taken = min(n_open, n_zero), -1
            spare = 16.0
            while taken < wanted:  # hashes are uniform, so one round is usual; the last one has the threshold 0
                share = (wanted + spare + 4.0 * wanted**0.5) / n_zero
                least = np.uint32(0) if share >= 1.0 or n_kept < n_slots else np.uint32((1.0 - share) * 2.0**32)
                taken = 0
                for gene in range(n_kept):
                    if hashes[gene] >= least and not expressed[gene]:
                        a_keys[taken], a_items[taken] = np.uint64(hashes[gene]), gene
                        taken += 1
                spare *= 16.0
            items = b_items if _sort(a_keys, a_items, taken, b_keys, b_items, buckets) else a_items
            if n_kept >= n_slots:
                for slot in range(n_open):
                    row[n + slot] = items[taken - 1 - slot]
            else:
                stream = _mix32(np.uint32(key ^ np.uint32(0xD2A3)))
                for slot in range(n, n_slots):
                    draw = np.int64(_mix32(np.uint32(stream ^ np.uint32(slot)))) % taken
                    row[slot] = items[taken - 1 - draw]
        elif n_open:  # every kept gene is expressed: the rest repeats any of them
            stream = _mix32(np.uint32(key ^ np.uint32(0xD2A3)))
            for slot in range(n, n_slots):
                row[slot] = row[np.int64(_mix32(np.uint32(stream ^ np.uint32(slot)))) % n]
        shares = counts[cell]
        if total > 0.0:
            whole = np.float32(total)
            shares[0] = np.float32(100.0) * np.float32(log_of[cls_count_gene] / whole)
            for slot in range(n_slots):
                shares[slot + 1] = np.float32(100.0) * np.float32(log_of[row[slot]] / whole)
        else:
            shares[:] = np.float32(100.0) * np.float32(1.0 / n_kept)
        for i in range(indptr[cell], indptr[cell + 1]):
            gene = place[genes[i]]
            if gene >= 0:
                log_of[gene], expressed[gene] = np.float32(0.0), False


def tokenize(
    indptr: np.ndarray,
    genes: np.ndarray,
    values: np.ndarray,
    logs: np.ndarray,
    place: np.ndarray,
    tokens: np.ndarray,
    keys: np.ndarray,
    pad_length: int,
    cls_count_gene: int,
    pool: ThreadPoolExecutor,
    n_parts: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What `sest.se.tokenize.tokenize` gives for the dense form of CSR rows, from any thread.

    Args:
        indptr: (B + 1,) int64; genes: (nnz,) int32 columns of the file, each at most once a row.
        values: (nnz,) float32 that decide the order; zero and less count as zero.
        logs: (nnz,) float32 log1p values that the shares are taken of, above zero where `values` are.
        place: (genes of the file,) int32, the position of a column among the kept genes, or -1.
        tokens: (K,) uint32.
        keys: (B,) uint32.
        pad_length: slots of a sentence, CLS included.
        cls_count_gene: the kept gene whose weight slot 0 carries.
        pool: runs the parts of a batch at once.
        n_parts: at most; a small batch is done by the calling thread.

    Returns:
        positions (B, pad_length - 1) int64 and count features (B, pad_length) float32.
    """
    n_cells = len(keys)
    positions = np.empty((n_cells, pad_length - 1), np.int64)
    counts = np.empty((n_cells, pad_length), np.float32)
    bits = values.view(np.int32)  # of floats >= 0 sort like the floats; those of floats below are negative
    n_parts = min(n_parts, n_cells // CELLS_A_PART)

    def part(start: int, stop: int) -> None:
        where = slice(start, stop)
        rows = indptr[start : stop + 1]
        _sentences(rows, genes, bits, logs, place, tokens, keys[where], cls_count_gene, positions[where], counts[where])

    if n_parts < 2:
        part(0, n_cells)
    else:
        cuts = np.linspace(0, n_cells, n_parts + 1).astype(np.int64)
        list(pool.map(part, cuts[:-1], cuts[1:]))  # a list, so that an error of a part is raised
    return positions, counts
