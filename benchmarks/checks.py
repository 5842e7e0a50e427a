"""What the checks of a cache cost: on opening it, while its values are loaded, and while it is made.

    opening    `sest.open_cache` of a cache of many cells with few values each; of it, the sha256 of all small files
    loading    `read_targets`, as `sest train` does; of it, looking at gene numbers and values
    embedding  `sest embed --encoder pca`, the fastest encoder; of it, looking whether the cache is still there
    writing    an .h5ad as `sest predict` writes it; of it, the checksum behind the file
    evaluating `sest evaluate` of that file against itself; of it, that checksum, twice

The cells are made up. Every time is the shortest of a few runs; the share of the checks is taken in that run.

    python benchmarks/checks.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

import sest
from sest.cache import CacheWriter, journal, reader
from sest.cache.layout import GroupPlan
from sest.data.targets import read_targets
from sest.files import write_h5ad


def many_cells(folder: Path, n_cells: int, n_genes: int) -> Path:
    """A cache of cells with ten values each: names, labels and row starts are what opening looks at."""
    rng = np.random.default_rng(0)
    indptr = np.arange(n_cells + 1, dtype=np.int64) * 10
    letters = np.array(list("ACGT"))[rng.integers(0, 4, (n_cells, 16))]
    names = [f"{''.join(letters[i])}-{i % 48}" for i in range(n_cells)]
    labels = {"perturbation": 2000, "cell_type": 4, "batch": 48}
    obs = pd.DataFrame(
        {
            name: pd.Categorical.from_codes(rng.integers(0, n, n_cells), [f"{name}{i}" for i in range(n)])
            for name, n in labels.items()
        },
        index=names,
    )
    about = {
        "dataset": "cells",
        "columns": dict.fromkeys((*labels, "control"), "label"),
        "scale": "counts",
        "n_cells": n_cells,
        "n_genes": n_genes,
        "controls": 0,
    }
    plan = GroupPlan("cells", indptr, n_genes, "int16", 8, "float16", about)
    attributes = {"schema_version": 1, "dim": 8, "groups": ["cells"], "inputs": {"cells": {}}}
    with CacheWriter(folder, attributes) as writer:
        writer.add_group(plan, obs, pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
        for shard, (a, b) in enumerate(plan.target_shards()):
            writer.write_target_shard(
                plan, shard, np.ones(b - a, np.int16), (np.arange(a, b) % 10 * 7).astype(np.int32)
            )
        for shard, (a, b) in enumerate(plan.embedding_shards()):
            writer.write_embedding_shard(plan, shard, rng.normal(size=(b - a, 8)).astype(np.float16))
        writer.finish()
    return folder


@contextmanager
def timed(*functions: tuple[object, str]) -> Iterator[list[float]]:
    """Collects the seconds spent in functions, which are (where it is looked up, its name)."""
    spent: list[float] = []

    def wrapped(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent.append(time.perf_counter() - began)

        return call

    with ExitStack() as stack:
        for holder, name in functions:
            stack.enter_context(mock.patch.object(holder, name, wrapped(getattr(holder, name))))
        yield spent


def measure(
    what: str, run: Callable[[], object], repeats: int, *checks: tuple[object, str]
) -> tuple[str, float, float]:
    """The shortest run: its seconds, and those spent in the checks."""
    times = []
    for _ in range(repeats):
        with timed(*checks) as spent:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began, sum(spent)))
    return what, *min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000, help="of the cache that is opened")
    parser.add_argument("--embedded", type=int, default=20_000, help="cells that are embedded and loaded, about")
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="checks-") as name:
        work = Path(name)
        many = many_cells(work / "many.zarr", options.cells, options.genes)
        cells = work / "cells.h5ad"

        def simulate() -> None:
            sest.simulate(
                cells,
                n_genes=options.genes,
                n_perturbations=20,
                n_cells_per_perturbation=options.embedded // 50,
                n_controls=options.embedded // 20,
                expressed_genes=options.genes // 5,
                umi_per_cell=options.genes * 4 // 5,
            )

        writing = measure("writing", simulate, 1, (write_h5ad, "_seal"))
        numbers = iter(range(options.repeats))

        def embed() -> None:
            sest.embed(cells, work / f"{next(numbers)}.zarr", encoder="pca", dim=64, device="cpu")

        results = [
            measure("embedding", embed, options.repeats, (CacheWriter, "_require")),
            measure("opening", lambda: sest.open_cache(many), options.repeats, (journal, "damaged_files")),
            measure(
                "loading",
                lambda: read_targets(sest.open_cache(work / "0.zarr"), 1e4),
                options.repeats,
                (reader, "wrong_genes"),
                (reader, "wrong_values"),
            ),
            writing,
            measure("evaluating", lambda: sest.evaluate(cells, cells), options.repeats, (write_h5ad, "_seal")),
        ]
        n_values = sum(group.n_values for group in sest.open_cache(work / "0.zarr").groups.values())
    print(f"sest {version('sest')}, {os.cpu_count()} cores; {options.cells:,} cells opened, {n_values:,} values loaded")
    for what, seconds, checks in results:
        print(
            f"{what:<10}{1000 * seconds:>10.1f} ms, of which checks {1000 * checks:>8.2f} ms ({checks / seconds:.2%})"
        )


if __name__ == "__main__":
    main()
