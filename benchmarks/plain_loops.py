"""What loops over values cost where numba is not there: each compiled and as NumPy does it, by turns, in one process.

Made-up cells of 18,080 genes, some 3,400 expressed. Milliseconds of the processor, the least of --repeats.

    OMP_NUM_THREADS=1 python benchmarks/plain_loops.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import scipy.sparse as sp
import torch

from sest.cells.scale import Scanner, log1p_rows
from sest.data.gather import add_log1p, dense_log1p, group_sums, take_rows
from sest.data.labels import Labels, rows_of_pairs
from sest.evaluation.distances import l1_distances
from sest.machine import jit
from sest.machine.seeds import choose_from, streams
from sest.se.tokenize import cell_keys
from sest.se.tokenize_cpu import tokenize

N_GENES, TOKENIZED, PAD_LENGTH = 18_080, 256, 2048


@contextmanager
def without_numba() -> Iterator[None]:
    """Inside, nothing is compiled."""
    loops = [
        (module, name, loop)
        for key, module in list(sys.modules.items())
        if key.startswith("sest.")
        for name, loop in list(vars(module).items())
        if getattr(loop, "plain", None)
    ]
    for module, name, loop in loops:
        setattr(module, name, loop.plain)
    jit.REASON = "not wanted"
    try:
        yield
    finally:
        jit.REASON = ""
        for module, name, loop in loops:
            setattr(module, name, loop)


def tasks(n_cells: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    cells = sp.csr_matrix(rng.poisson(np.exp(rng.normal(-2.5, 1.8, N_GENES)), (n_cells, N_GENES)).astype(np.float32))
    factor = (1e4 / np.asarray(cells.sum(1)).ravel()).astype(np.float32)
    indptr, indices = cells.indptr.astype(np.int64), cells.indices.astype(np.uint16)
    counts, logged = cells.data.astype(np.int16), log1p_rows(cells, factor)
    rows, group = rng.permutation(n_cells), rng.integers(0, 40, n_cells)
    out, sums = np.empty((n_cells, N_GENES), np.float32), np.zeros((40, N_GENES))
    pools, first = rng.integers(0, 20, (16, 128)), np.cumsum(np.r_[0, rng.integers(10, 300, 20)])
    drawn = np.zeros((16, 128), np.int64)
    million = 1_000_000
    codes = {n: rng.integers(0, n, million).astype(np.int16) for n in (10, 1000)}
    labels = Labels(("g",), np.array([0, million]), ("",) * 1000, codes[1000], (("g", ""),) * 10, codes[10], codes[10])
    means = rng.random((200, N_GENES))
    tokens, keys = rng.permutation(19_790)[:N_GENES].astype(np.uint32), cell_keys(0, torch.arange(TOKENIZED))
    block, pool = cells[:TOKENIZED], ThreadPoolExecutor(1)
    sentence = (
        block.indptr.astype(np.int64), block.indices, block.data, np.log1p(block.data),
        np.arange(N_GENES, dtype=np.int32), tokens, keys.numpy().view(np.uint32), PAD_LENGTH, 3, pool, 1,
    )  # fmt: skip
    return {
        f"{TOKENIZED} cells to sentences of {PAD_LENGTH:,} genes (`sest embed` on a CPU)": lambda: tokenize(*sentence),
        "a scan of counts": lambda: Scanner(n_cells, hashed=False).add(cells),
        "a scan of log1p values": lambda: Scanner(n_cells, hashed=False).add(logged),
        "counts made dense (training)": lambda: dense_log1p(rows, indptr, indices, counts, factor, out),
        "float counts made dense": lambda: dense_log1p(rows, indptr, indices, cells.data, factor, out),
        "rows taken out": lambda: take_rows(rows, indptr, indices, counts, N_GENES),
        "sums of 40 groups (training, predicting)": lambda: group_sums(
            group, 40, N_GENES, indptr, indices, counts, factor
        ),
        "sums of 40 groups (evaluating)": lambda: add_log1p(rows, group, cells, np.arange(N_GENES), 1e4, sums),
        "controls of 16 sets of 128, from 20 pools": lambda: choose_from(
            list(streams(0, np.arange(16))), pools, first, drawn
        ),
        "a million cells by pair": lambda: rows_of_pairs(labels, codes[10] > 0),
        "L1 distances of 200 and 200 pseudobulks": lambda: l1_distances(means, means),
    }


def milliseconds(task: Callable[[], object]) -> float:
    began = time.process_time()
    task()
    return 1000 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if jit.REASON:
        parser.error(f"there is no numba to compare with ({jit.REASON})")
    torch.set_num_threads(1)
    print(f"| {options.cells:,} cells | compiled, ms | NumPy, ms | times |\n|---|---|---|---|")
    for name, task in tasks(options.cells).items():
        task()  # compiles
        compiled, plain = [], []
        for _ in range(options.repeats):
            compiled.append(milliseconds(task))
            with without_numba():
                plain.append(milliseconds(task))
        print(f"| {name} | {min(compiled):.1f} | {min(plain):.1f} | {min(plain) / min(compiled):.1f} |", flush=True)


if __name__ == "__main__":
    main()
