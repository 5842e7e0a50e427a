"""Do files of every AnnData writer read as that AnnData reads them?

One environment for each version of anndata, made with a Python that it installs on; it writes the same small cells as
CSR, CSC and dense, plain and compressed, with a layer and raw, as .h5ad and, from 0.8, as Zarr, and says what it reads
back. sest must read the same values, names and labels. Needs a package index, and `pyenv` for the old Pythons.

    python benchmarks/anndata_writers.py WORK_FOLDER [VERSION ...]

Prints a row for every version and ends with code 1 where one differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from sest.files.cell_file import CellFile

# anndata -> Python to install it on, and what it needs to be held to
VERSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "0.7.8": ("3.8", ("numpy<1.24", "pandas<1.5", "scipy<1.9", "h5py<3.8", "zarr<2.14")),
    "0.8.0": ("3.9", ("numpy<1.24", "pandas<1.6", "scipy<1.11", "zarr<2.16")),
    "0.9.2": ("3.10", ("numpy<1.27", "pandas<2.1", "scipy<1.12", "zarr<2.18")),
    "0.10.9": ("3.10", ("numpy<2", "pandas<2.3", "zarr<3")),
    "0.11.4": ("3.11", ("pandas<3", "zarr<3")),
    "0.12.19": ("3.12", ("zarr>=3",)),
    "0.13": ("3.13", ("zarr>=3",)),
}

# Runs on Python 3.8 and anndata 0.7: writes the files and what this anndata reads of them.
WRITER = r"""
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import anndata as ad, numpy as np, pandas as pd, scipy.sparse as sp
out = Path(sys.argv[1])
version = tuple(int(part) for part in ad.__version__.split("+")[0].split(".")[:2] if part.isdigit())
rng = np.random.RandomState(0)
values = rng.poisson(0.8, (60, 40)).astype("float32")
rows = np.arange(60)
obs = pd.DataFrame({
    "target_gene": pd.Categorical(np.array(["non-targeting", "STAT1", "JAK2"])[rows % 3]),
    "missing": pd.Categorical([None if i % 4 == 0 else "x" for i in rows]),
    "text": ["t%d" % (i % 5) for i in rows],
    "unique": ["u\u00e9%d" % i for i in rows],
    "whole": rows, "fraction": rows / 3, "flag": rows % 2 == 0,
}, index=["cell%d" % i for i in rows])
if version >= (0, 8):
    obs["nullable"] = pd.array([None if i % 3 == 0 else int(i) for i in rows], dtype="Int64")
    obs["perhaps"] = pd.array([None if i % 3 == 0 else bool(i % 2) for i in rows], dtype="boolean")
var = pd.DataFrame({"gene_name": ["N%d" % i for i in range(40)]}, index=["G%d" % i for i in range(40)])
def dense(x):
    return np.asarray(x.todense() if sp.issparse(x) else x)
def plain(value):
    return None if pd.isna(value) else value.item() if hasattr(value, "item") else value
def listed(frame):
    return {str(name): [plain(value) for value in frame[name].astype(object)] for name in frame}
for form, make in (("csr", sp.csr_matrix), ("csc", sp.csc_matrix), ("dense", np.asarray)):
    dtype = {"dtype": "float32"} if version < (0, 9) else {}
    adata = ad.AnnData(make(values), obs=obs.copy(), var=var.copy(), **dtype)
    adata.layers["double"] = make(values * 2)
    adata.obsm["X_pca"] = rng.normal(size=(60, 3)).astype("float32")
    adata.raw = adata
    adata = adata[:, :30].copy()
    kinds = [("plain.h5ad", lambda p: adata.write_h5ad(p))]
    kinds.append(("gzip.h5ad", lambda p: adata.write_h5ad(p, compression="gzip")))
    if version >= (0, 8):
        kinds.append(("plain.zarr", lambda p: adata.write_zarr(p)))
    for kind, write in kinds:
        path = out / (form + "-" + kind)
        write(str(path))
        back = ad.read_zarr(str(path)) if kind.endswith("zarr") else ad.read_h5ad(str(path))
        np.savez(str(path) + ".npz", X=dense(back.X), double=dense(back.layers["double"]), raw=dense(back.raw.X),
                 X_pca=np.asarray(back.obsm["X_pca"]))
        Path(str(path) + ".json").write_text(json.dumps({
            "cells": list(back.obs_names), "genes": list(back.var_names), "raw_genes": list(back.raw.var_names),
            "obs": listed(back.obs), "var": listed(back.var)}))
"""


def environment(folder: Path, version: str) -> Path:
    """The Python of an environment with that anndata; made once."""
    python, needs = VERSIONS[version]
    found = folder / "bin" / "python"
    if not found.exists():
        base = next(iter(sorted(Path.home().glob(f".pyenv/versions/{python}.*/bin/python"))), f"python{python}")
        subprocess.run([str(base), "-m", "venv", str(folder)], check=True, capture_output=True)
    wanted = f"anndata=={version}.*" if version.count(".") == 1 else f"anndata=={version}"
    install = [str(found), "-m", "pip", "install", "-q", "--only-binary=:all:", wanted, "zarr", *needs]
    subprocess.run(install, check=True, capture_output=True)
    return found


def differences(path: Path) -> list[str]:
    """What sest reads otherwise than the anndata that wrote the file."""
    told, values = json.loads(Path(f"{path}.json").read_text()), np.load(f"{path}.npz")
    wrong = []
    for layer, name in ((None, "X"), ("double", "double"), ("raw", "raw")):
        with CellFile(path, layer) as file:
            if not np.array_equal(file.rows(0, file.n_cells).toarray(), values[name]):
                wrong.append(name)
            if list(file.var.index) != told["raw_genes" if layer == "raw" else "genes"]:
                wrong.append(f"genes of {name}")
            if list(file.obs.index) != told["cells"]:
                wrong.append("cells")
            if layer is None:
                wrong += [f"obs {n}" for n in differing(file.obs.frame(), told["obs"])]
                wrong += [f"var {n}" for n in differing(file.var, told["var"])]
    return wrong


def differing(mine: pd.DataFrame, theirs: dict[str, list[object]]) -> list[str]:
    """Columns that are not the same."""
    listed = {name: [None if pd.isna(value) else value for value in mine[name].astype(object)] for name in mine}
    return [name for name in sorted({*listed, *theirs}) if listed.get(name) != theirs.get(name)]


def main(work: Path, versions: list[str]) -> int:
    """Print a row a version; 1 where sest reads something else."""
    code = 0
    print(f"{'anndata':<10}{'Python':<8}{'files':>6}  result")
    for version in versions:
        out = work / f"files-{version}"
        out.mkdir(parents=True, exist_ok=True)
        try:
            python = environment(work / f"env-{version}", version)
        except (subprocess.CalledProcessError, OSError) as error:
            said = getattr(error, "stderr", None) or str(error).encode()
            print(
                f"{version:<10}{VERSIONS[version][0]:<8}{'-':>6}  not installed: {said.decode().splitlines()[-1][:80]}"
            )
            continue
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [str(python), "-c", WRITER, str(out)], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{version:<10}{VERSIONS[version][0]:<8}{'-':>6}  cannot write: {done.stderr.splitlines()[-1][:80]}")
            code = 1
            continue
        files = sorted(path for path in out.iterdir() if path.name.endswith(("5ad", "zarr")))
        wrong = {path.name: found for path in files if (found := differences(path))}
        print(f"{version:<10}{VERSIONS[version][0]:<8}{len(files):>6}  {wrong or 'the same'}")
        code |= bool(wrong)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:] or list(VERSIONS)))
