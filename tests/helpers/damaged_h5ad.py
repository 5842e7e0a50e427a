"""Small .h5ad files for the tests of sest.files, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sest.cells.scale import scan_file
from sest.errors import InputError
from sest.files.cell_file import CellFile

FORMS: dict[str, Callable[[np.ndarray], object]] = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def counts(n_cells: int = 53, n_genes: int = 31, seed: int = 0) -> np.ndarray:
    """Poisson counts (n_cells, n_genes) with an empty first, middle and last cell and an empty gene."""
    values = np.random.default_rng(seed).poisson(0.8, (n_cells, n_genes)).astype(np.float32)
    values[[0, n_cells // 2, -1]] = 0
    values[:, n_genes // 3] = 0
    return values


def write(path: Path, values: object, layers: dict[str, object] | None = None, **options: Any) -> Path:
    n_cells, n_genes = values.shape  # type: ignore[attr-defined]
    kinds = pd.Categorical([("control", "STAT1")[i % 2] for i in range(n_cells)])
    obs = pd.DataFrame({"target_gene": kinds, "n": np.arange(n_cells)}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"G{i}" for i in range(n_genes)])
    ad.AnnData(values, obs=obs, var=var, layers=layers).write_h5ad(path, **options)
    return path


def as_anndata_07(path: Path) -> None:
    """Rewrite the categorical column of obs as AnnData 0.7 did: codes with a reference to obs/__categories."""
    with h5py.File(path, "r+") as file:
        codes, categories = (file[f"obs/target_gene/{name}"][:] for name in ("codes", "categories"))
        del file["obs/target_gene"]
        file["obs/target_gene"] = codes
        file["obs/__categories/target_gene"] = categories
        file["obs/target_gene"].attrs["categories"] = file["obs/__categories/target_gene"].ref
        file["obs/__categories/target_gene"].attrs["ordered"] = False
        file["obs"].attrs["encoding-version"] = "0.1.0"


def replace(group: h5py.Group, name: str, values: object) -> None:
    del group[name]
    group[name] = values


def strings(node: h5py.Dataset | h5py.Group) -> h5py.Dataset:
    """The values of an array; anndata 0.13 keeps strings beside a mask of those that are missing."""
    return node["values"] if isinstance(node, h5py.Group) else node


def set_value(name: str, at: int, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            strings(file[name])[at] = value

    return change


def edit(change: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            change(file)

    return apply


def check_refused(path: Path, damage: Callable[[Path], object], words: str) -> None:
    """Damage a sound CSR file of 53 cells and 31 genes; opening or reading it must fail in one line with `words`."""
    write(path, sp.csr_matrix(counts()))
    damage(path)
    with pytest.raises(InputError, match=words) as caught, CellFile(path) as file:  # noqa: PT012
        scan_file(file)
        assert len(file.obs.frame()) == file.n_cells
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
