"""What compressing predicted cells takes and saves, and the embeddings of a cache of controls.

A small head is trained on simulated cells at 18,080 genes and predicts log1p cells (its own, and blended ones) and
counts. First `sest predict` as a whole, with and without compression, by turns. Then values and gene numbers alone, in
chunks of one size: as they are, by the filters of HDF5, and as sest packs them, which the same filters undo. Last a
shard of embeddings, of which all rows are embedded, or one in 10 or 50 and the others NaN, by codecs of Zarr. Seconds
are the processor's, the best of three.

    OMP_NUM_THREADS=1 python benchmarks/compression.py    # five minutes
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import torch
import zarr
from real_cells import hardware
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

import sest
from sest.cache import open_cache, schema
from sest.config import PredictConfig, TrainConfig
from sest.files.write_h5ad import HDF5_CHUNK, H5adWriter, _deflated, _Packer, _Values
from sest.prediction import predict as prediction
from sest.training.train import train

HEAD = TrainConfig(
    max_steps=200,
    batch_size=4,
    set_size=32,
    lr=1e-3,
    hidden=64,
    n_layers=1,
    n_heads=4,
    ffn=128,
    n_encoder_layers=2,
    n_decoder_layers=2,
    dropout=0.0,
)
WRITTEN = {
    "log1p, head": PredictConfig(blend="head"),
    "log1p, blend": PredictConfig(),
    "counts": PredictConfig(format="counts"),
}
FILTERS: dict[str, dict[str, Any] | None] = {
    "as they are": {},
    "lzf, shuffle": {"compression": "lzf", "shuffle": True},
    "gzip-1": {"compression": "gzip", "compression_opts": 1},
    "gzip-1, shuffle": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "gzip-4, shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
    "sest": None,
}
CODECS: dict[str, list[Any]] = {
    "as they are": [Crc32cCodec()],
    "zstd-1": [BloscCodec(cname="zstd", clevel=1, shuffle="noshuffle"), Crc32cCodec()],
    "zstd-1, shuffle": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
    "lz4-1, shuffle": [BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"), Crc32cCodec()],
}


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The least of the processor's seconds."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def write_values(path: Path, values: np.ndarray, filters: dict[str, Any] | None) -> None:
    with h5py.File(path, "w") as file:
        if filters is None:
            with _Packer(_deflated) as packer:
                packed = _Values(file.create_group("X"), "x", values.dtype.name, True, packer)
                for start in range(0, len(values), HDF5_CHUNK):
                    packed.add(values[start : start + HDF5_CHUNK])
                packed.end()
                packer.write(0)
        else:
            file.create_dataset("X/x", data=values, chunks=(HDF5_CHUNK,), **filters)


def read_values(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        values: np.ndarray = file["X/x"][:]
    return values


def values_alone(cells: dict[str, Path], work: Path) -> None:
    print("| cells | values | filters | size | write, us a cell | read, us a cell |\n|---|---|---|---|---|---|")
    for name, path in cells.items():
        with h5py.File(path) as file:
            n = min(2000, len(file["X/indptr"]) - 1)
            end = int(file["X/indptr"][n])
            arrays = {what: file["X"][what][:end] for what in ("data", "indices")}
        for what, values in arrays.items():
            for filters, options in FILTERS.items():
                out = work / "values.h5"
                writing = seconds(partial(write_values, out, values, options))
                reading = seconds(partial(read_values, out))
                assert (read_values(out) == values).all()
                row = f"{out.stat().st_size / values.nbytes:.3f} | {writing / n * 1e6:.0f} | {reading / n * 1e6:.0f}"
                print(f"| {name} | {what} | {filters} | {row} |", flush=True)


def whole_commands(run: Path, work: Path, n_cells: int) -> dict[str, Path]:
    """`sest predict` without and with compression, by turns; returns the files without."""
    files = dict[str, Path]()
    print("| cells | KB a cell, plain | packed | of it | processor, us a cell, plain | packed | more ", end="")
    print("| clock, plain | packed | more |\n|---|---|---|---|---|---|---|---|---|---|")
    for name, config in WRITTEN.items():
        asked = PredictConfig.from_values(
            {
                "blend": config.blend,
                "format": config.format,
                "all_perturbations": True,
                "n_cells": n_cells,
                "cell_type": ("alpha", "beta"),
            },
            "the benchmark",
        )
        best = {(compress, clock): float("inf") for compress in (False, True) for clock in (0, 1)}
        sizes, n = dict[bool, int](), 1
        for _ in range(3):
            for compress in (False, True):
                out = work / f"{name}-{compress}.h5ad".replace(" ", "")
                with mock.patch.object(prediction, "H5adWriter", partial(H5adWriter, compress=compress)):
                    began = time.process_time(), time.perf_counter()
                    made = prediction.predict(run, out, asked, force=True)
                    ended = time.process_time(), time.perf_counter()
                for clock in (0, 1):
                    best[compress, clock] = min(best[compress, clock], ended[clock] - began[clock])
                sizes[compress], n = out.stat().st_size, made.n_predicted + made.n_controls
        files[name] = work / f"{name}-False.h5ad".replace(" ", "")
        size = f"{sizes[False] / n / 1e3:.1f} | {sizes[True] / n / 1e3:.1f} | {sizes[True] / sizes[False]:.0%}"
        row = f"| {name} | {size} |"
        for clock in (0, 1):
            plain, packed = (best[compress, clock] / n * 1e6 for compress in (False, True))
            row += f" {plain:.0f} | {packed:.0f} | {packed / plain - 1:+.0%} |"
        print(row, flush=True)
    return files


def embeddings(cache: Path) -> None:
    """A shard of the cache's embeddings, repeated, with other rows than those drawn left NaN."""
    stored = open_cache(cache).groups["cells"].embeddings()
    rows = np.resize(stored, (schema.ROWS_PER_SHARD, stored.shape[1]))
    print("| embedded | codec | size | write, ms | read, ms |\n|---|---|---|---|---|")
    for share in (1.0, 0.1, 0.02):
        values = rows.copy()
        values[np.random.default_rng(0).random(len(rows)) >= share] = np.nan
        for codec, compressors in CODECS.items():
            held: dict[str, Any] = {}

            def write(compressors: list[Any] = compressors, held: dict[str, Any] = held) -> None:
                zarr.create_array(
                    MemoryStore(held),
                    shape=values.shape,  # noqa: B023
                    dtype=values.dtype,  # noqa: B023
                    chunks=(schema.ROWS_PER_CHUNK, values.shape[1]),  # noqa: B023
                    shards=values.shape,  # noqa: B023
                    compressors=compressors,
                    fill_value=np.nan,
                    config={"write_empty_chunks": True},
                    overwrite=True,
                )[:] = values  # noqa: B023

            def read(held: dict[str, Any] = held) -> Any:
                return zarr.open_array(MemoryStore(held), mode="r")[:]

            writing, reading = seconds(write), seconds(read)
            assert np.array_equal(np.asarray(read()), values, equal_nan=True)
            size = len(held["c/0/0"]) / values.nbytes
            print(f"| {share:.0%} | {codec} | {size:.3f} | {writing * 1e3:.0f} | {reading * 1e3:.0f} |", flush=True)


def main() -> None:
    """Make cells, cache and run; print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--cells", type=int, default=128, help="of each of 20 perturbations in two cell types")
    parser.add_argument("--dim", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        cells = sest.simulate(
            work / "cells.h5ad",
            n_genes=asked.genes,
            n_perturbations=20,
            n_cells_per_perturbation=100,
            n_controls=1000,
            expressed_genes=asked.genes // 5,
            umi_per_cell=asked.genes * 4 // 5,
        )
        sest.embed(cells, work / "cells.zarr", encoder="pca", dim=asked.dim, device="cpu")
        train(work / "cells.zarr", work / "run", HEAD)
        files = whole_commands(work / "run", work, asked.cells)
        values_alone(files, work)
        embeddings(work / "cells.zarr")
    print(json.dumps(hardware()))


if __name__ == "__main__":
    main()
