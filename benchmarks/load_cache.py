"""Loading a cache for training, beside reading its bytes.

    reading    all files of the cache, one after another, into one buffer
    unpacking  the same, and zstd on what came: what any reader of compressed chunks must do, one thread
    loading    `read_targets` and `read_embeddings`, as `sest train` does: counts and gene numbers in memory, ready

The cache is made up (`sest simulate`, PCA). --cold drops the system's disk cache before every reading (needs root).

    python benchmarks/load_cache.py --cold
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numcodecs
import numpy as np
import torch
import zarr

import sest
from sest.data.labels import read_embeddings, read_labels
from sest.data.targets import read_targets


def make_cache(work: Path, options: argparse.Namespace) -> Path:
    cells = sest.simulate(
        work / "cells.h5ad",
        n_genes=options.genes,
        n_perturbations=20,
        n_cells_per_perturbation=options.cells // 25,
        n_controls=options.cells // 10,
        expressed_genes=options.genes // 5,
        umi_per_cell=options.genes * 4 // 5,
    )
    folder = work / "cells.zarr"
    sest.embed(cells, folder, encoder="pca", dim=64, device="cpu")
    return folder


def read_bytes(folder: Path) -> int:
    buffer, total = bytearray(2**24), 0
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with open(file, "rb", buffering=0) as source:
                while n := source.readinto(buffer):
                    total += n
    return total


def unpack(folder: Path) -> None:
    """Read all files, and undo zstd and shuffle on as many values as the cache has, packed as it packs them."""
    read_bytes(folder)
    codec = numcodecs.Zstd(level=1)
    group = next(iter(sest.open_cache(folder).groups.values()))
    for name in ("data", "indices"):
        array = zarr.open_array(str(folder / group.path / "X" / name), mode="r")
        piece = numcodecs.Shuffle(array.dtype.itemsize).encode(np.asarray(array[: 2**18]).tobytes())
        packed = codec.encode(piece)
        for _ in range(-(-array.shape[0] // 2**18)):
            numcodecs.Shuffle(array.dtype.itemsize).decode(codec.decode(packed))


def load(folder: Path) -> None:
    cache = sest.open_cache(folder)
    labels, _ = read_labels(cache)
    read_targets(cache, 10_000)
    read_embeddings(cache, labels)


def shortest(run: Callable[[], object], options: argparse.Namespace) -> float:
    times = []
    for _ in range(options.repeats):
        if options.cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000, help="about, of each of two cell types")
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the system's cache")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load_cache-") as work:
        folder = make_cache(Path(work), options)
        cache = sest.open_cache(folder)
        values = sum(int(group.indptr[-1]) for group in cache.groups.values())
        size = read_bytes(folder)
        ways: dict[str, Callable[[Path], object]] = {"reading": read_bytes, "unpacking": unpack, "loading": load}
        seconds = {name: shortest(partial(way, folder), options) for name, way in ways.items()}
    print(f"sest {version('sest')}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(
        f"{cache.n_cells:,} cells, {values:,} values; {size / 1e6:,.0f} MB stored, {'cold' if options.cold else 'warm'}"
    )
    for name, value in seconds.items():
        print(f"{name:<10}{value:>8.2f} s{size / value / 1e6:>9,.0f} MB/s{value / seconds['reading']:>8.1f} x reading")


if __name__ == "__main__":
    main()
