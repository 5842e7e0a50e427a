"""What `sest evaluate` costs: seconds of the processor and peak memory, of a process that does nothing else.

The cells are made up: some 2,000 of 18,080 genes a cell, a tenth of the cells are controls, two cell types. The
prediction holds log1p values without a record, so that its scale is found too; the real file holds counts of its 60
perturbations and, where it is the larger one, of 190 more, which are read and not scored. The extra cell-eval is off.
`--source FOLDER` times another checkout of sest on the same cells, by turns; `--peers-python /path/to/python` names an
interpreter with cell-eval, which then scores the same files, without tests of differential expression where its version
can leave them out: it reads both, takes the real cells of the predicted pairs, normalises them and scores one cell type
after the other.

    OMP_NUM_THREADS=1 python benchmarks/evaluate_speed.py
    OMP_NUM_THREADS=1 python benchmarks/evaluate_speed.py --cells 6000:6000 --source ../sest-before
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

import sest
from sest.files.write_h5ad import H5adWriter

N_PERTURBATIONS, N_MORE = 60, 190  # scored; of a larger real file only
ROWS, KINDS = 1000, 8  # cells are copies of so many blocks of so many: what they are costs nothing here
OURS = """
import sys
from sest.config import EvaluateConfig
from sest.evaluation.evaluate import evaluate
evaluate(*sys.argv[1:3], EvaluateConfig(cell_eval=False))
"""
PEER = """
import inspect, sys, tempfile, warnings
warnings.filterwarnings("ignore")
import anndata, scanpy
from cell_eval import MetricsEvaluator
known = inspect.signature(MetricsEvaluator).parameters
more = {"skip_de": True} if "skip_de" in known else {}
predicted, real = (anndata.read_h5ad(path) for path in sys.argv[1:3])
real = real[real.obs["target_gene"].isin(predicted.obs["target_gene"].unique()).to_numpy()].copy()
scanpy.pp.normalize_total(real, target_sum=1e4)
scanpy.pp.log1p(real)
for kind in predicted.obs["cell_type"].unique():
    p, r = (cells[(cells.obs["cell_type"] == kind).to_numpy()].copy() for cells in (predicted, real))
    with tempfile.TemporaryDirectory() as folder:
        MetricsEvaluator(
            adata_pred=p, adata_real=r, control_pert="control", pert_col="target_gene", num_threads=1, outdir=folder,
            **more,
        ).compute(profile="anndata", write_csv=False)
"""


def write_cells(path: Path, n_cells: int, n_genes: int, n_values: int, n_perturbations: int, log1p: bool) -> None:
    """An .h5ad of made-up cells, `n_values` stored for each on average."""
    rng = np.random.default_rng([n_cells, log1p])
    rate, scale = rng.gamma(0.3, 1.0, n_genes) / n_genes, 1.0
    while np.minimum(rate * scale, 0.95).sum() < n_values:
        scale *= 1.02
    blocks = []
    for _ in range(min(KINDS, -(-n_cells // ROWS))):
        cells = sp.csr_matrix(rng.random((ROWS, n_genes), dtype=np.float32) < np.minimum(rate * scale, 0.95))
        cells = sp.csr_matrix(
            (rng.geometric(0.4, cells.nnz).astype(np.float32), cells.indices, cells.indptr), cells.shape
        )
        if log1p:
            per_cell = 1e4 / np.asarray(cells.sum(1)).ravel()
            cells.data = np.log1p(cells.data * np.repeat(per_cell, np.diff(cells.indptr))).astype(np.float32)
        blocks.append(cells)
    perturbation = np.maximum(np.arange(n_cells) - n_cells // 10, -1) % n_perturbations + 1
    perturbation[: n_cells // 10] = 0
    names = np.array(["control", *(f"P{i}" for i in range(n_perturbations))])
    obs = {"target_gene": names[rng.permutation(perturbation)], "cell_type": rng.choice(["k562", "rpe1"], n_cells)}
    index = [f"cell{i}" for i in range(n_cells)]
    with H5adWriter(path, n_genes, "float32") as writer:
        for start in range(0, n_cells, ROWS):
            writer.add(blocks[start // ROWS % len(blocks)][: min(ROWS, n_cells - start)])
        writer.finish(
            pd.DataFrame(obs, index=index, dtype="category"), pd.DataFrame(index=[f"G{i}" for i in range(n_genes)]), {}
        )


def cost(python: str, code: str, files: tuple[Path, Path], source: Path | None) -> tuple[float, float] | None:
    """Seconds of the processor and peak MB of a process of its own; None where it fails. `source`: what it imports."""
    environment = os.environ | ({"PYTHONPATH": str(source.resolve())} if source else {})
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    arguments = [python, *(["-P"] if source else []), "-c", code, *map(str, files)]  # -P: not from where this is run
    _, status, used = os.wait4(os.posix_spawn(python, arguments, environment, file_actions=quiet), 0)
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024
    return None if status else (used.ru_utime + used.ru_stime, used.ru_maxrss / unit)


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """One row a size and program: the least of all repeats."""
    programs: dict[str, tuple[str, str, Path | None]] = {"sest": (sys.executable, OURS, Path(sest.__file__).parents[1])}
    if options.source:
        programs["sest of --source"] = sys.executable, OURS, options.source
    if options.peers_python:
        programs["cell-eval"] = options.peers_python, PEER, None
    found: list[dict[str, object]] = []
    for size in options.cells.split(","):
        n_predicted, n_real = map(int, size.split(":"))
        files = folder / "predicted.h5ad", folder / "real.h5ad"
        more = N_MORE if n_real > n_predicted else 0
        write_cells(files[0], n_predicted, options.genes, options.values, N_PERTURBATIONS, True)
        write_cells(files[1], n_real, options.genes, options.values, N_PERTURBATIONS + more, False)
        runs: dict[str, list[tuple[float, float] | None]] = {name: [] for name in programs}
        for _ in range(options.repeats):
            for name, (python, code, source) in programs.items():
                runs[name].append(cost(python, code, files, source))
        for name, costs in runs.items():
            sound = [one for one in costs if one is not None]
            seconds, peak = map(min, zip(*sound, strict=True)) if sound else (float("nan"), float("nan"))
            found.append(
                {"predicted": n_predicted, "real": n_real, "program": name, "seconds": seconds, "peak_mb": peak}
            )
            told = f"{seconds:.1f} s, {peak:,.0f} MB" if sound else "failed"
            print(f"{n_predicted:,} against {n_real:,} cells: {name:16} {told}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="6000:6000,20000:60000,60000:200000", help="predicted:real, ...")
    parser.add_argument("--genes", type=int, default=18_080)
    parser.add_argument("--values", type=int, default=2000, help="stored values a cell")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--source", type=Path, help="another checkout of sest, to be timed beside this one")
    parser.add_argument("--peers-python", help="an interpreter with cell-eval; default: it is left out")
    parser.add_argument("--work", type=Path, help="where the files are made, 4.2 GB; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="evaluate_speed-", dir=options.work) as folder:
        found = measure(options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
