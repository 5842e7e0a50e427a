"""Peak memory of `sest embed` against the number of cells: it must not grow with them.

Writes .h5ad files of the given numbers of cells (100 expressed of 2,000 genes each, string names, three columns) and
embeds each in a process of its own, with a small SE model of random weights (its projection and its sample included:
native width 64, --dim 32) and with `pca`. Printed: the process's peak resident memory, what of it was there before the
first cell was read (Python, torch, the weights), and the difference. The claim: at most 1.5 GB for a million cells.

    python benchmarks/embed_memory.py --cells 50000,200000,1000000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from encoders import Size, gene_names, write_encoder

N_GENES, N_EXPRESSED, BLOCK = 2000, 100, 50_000
SMALL = Size(1, 64, 64, 64, 2, 32, 64, N_GENES)
CHILD = """
import json, sys
from pathlib import Path
import sest, sest.embedding.embed
from sest.progress import Silent, reporting
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
class Clock(Silent):
    before = 0
    def begin(self, *_): self.before = self.before or status("VmRSS")
encoder, cells, out = sys.argv[1:4]
if encoder != "pca":
    from sest.se.weights import load_encoder
    load_encoder(Path(encoder))
with reporting(Clock()) as clock:
    sest.embed(cells, out, encoder=encoder, dim=32, device="cpu")
print(json.dumps({"before": clock.before, "peak": status("VmHWM")}))
"""


def write_large(path: Path, n: int, seed: int = 0) -> Path:
    """An .h5ad of n cells in AnnData's layout, written in blocks; a third are controls."""
    rng = np.random.default_rng([seed, n])
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n, N_GENES]})
        x.create_dataset("indptr", data=np.arange(n + 1, dtype=np.int64) * N_EXPRESSED)
        chunks = (BLOCK * N_EXPRESSED // 50,)
        data, indices = (
            x.create_dataset(k, (n * N_EXPRESSED,), t, chunks=chunks) for k, t in (("data", "f4"), ("indices", "i4"))
        )
        for start in range(0, n, BLOCK):
            rows = min(BLOCK, n - start)
            genes = np.sort(rng.integers(0, N_GENES // N_EXPRESSED, (rows, N_EXPRESSED)), axis=1)
            genes = np.arange(N_EXPRESSED) * (N_GENES // N_EXPRESSED) + genes  # one of each stretch: no gene twice
            place = slice(start * N_EXPRESSED, (start + rows) * N_EXPRESSED)
            indices[place] = genes.ravel()
            data[place] = 1 + rng.poisson(2.0, rows * N_EXPRESSED)
        names = {
            "target_gene": ["non-targeting", "STAT1", "JAK2"],
            "cell_type": ["k562", "rpe1"],
            "batch": ["b0", "b1"],
        }
        for table, index, columns in (("obs", [f"cell{i}" for i in range(n)], names), ("var", gene_names(N_GENES), {})):
            group = file.create_group(table)
            group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
            group.attrs["column-order"] = np.array(list(columns), dtype=h5py.string_dtype())
            _strings(group, "_index", index)
            for column, labels in columns.items():
                part = group.create_group(column)
                part.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
                _strings(part, "categories", labels)
                codes = part.create_dataset("codes", data=(np.arange(n) % len(labels)).astype(np.int8))
                codes.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            file.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    return path


def _strings(group: h5py.Group, name: str, values: list[str]) -> None:
    stored = group.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
    stored.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="50000,200000", help="numbers of cells, separated by commas")
    parser.add_argument("--encoders", default="se,pca")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="embed_memory-"))
    write_encoder(work / "se", SMALL)
    found = []
    print(f"{'cells':>10} {'encoder':>8} {'before':>10} {'peak':>10} {'more':>10}   MB")
    for n in map(int, options.cells.split(",")):
        cells = write_large(work / f"{n}.h5ad", n)
        for encoder in options.encoders.split(","):
            words = [str(work / "se") if encoder == "se" else "pca", str(cells), str(work / f"{n}-{encoder}.zarr")]
            done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found.append({"cells": n, "encoder": encoder, **result})
            before, peak = result["before"] / 1e6, result["peak"] / 1e6
            print(f"{n:>10,} {encoder:>8} {before:>10,.0f} {peak:>10,.0f} {peak - before:>10,.0f}", flush=True)
        cells.unlink()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
