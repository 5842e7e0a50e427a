"""Layouts of .h5ad that no current writer makes: AnnData before 0.7, SeuratDisk, R without scalars."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

LABELS = np.array(["control", "STAT1", "JAK2"])


def as_anndata_06(path: Path, values: np.ndarray, *, raw: bool = False) -> Path:
    """Tables as compound arrays, categories in uns, another name for the form of a sparse matrix, raw.X beside X."""
    n_cells, n_genes = values.shape
    with h5py.File(path, "w") as file:
        _old_sparse(file, "X", values)
        obs = np.zeros(n_cells, dtype=[("index", "S9"), ("target_gene", "i1"), ("n_counts", "f4"), ("note", "S6")])
        obs["index"] = [f"cell{i}" for i in range(n_cells)]
        obs["target_gene"] = np.arange(n_cells) % len(LABELS)
        obs["n_counts"] = values.sum(1)
        obs["note"] = [f"n{i % 4}" for i in range(n_cells)]
        file["obs"] = obs
        file["var"] = _old_var(n_genes)
        file["uns/target_gene_categories"] = LABELS.astype("S")
        if raw:
            _old_sparse(file, "raw.X", values * 2)
            file["raw.var"] = _old_var(n_genes)
    return path


def as_seuratdisk(path: Path) -> None:
    """Categories under the column's name, and nothing at the codes that says so."""
    with h5py.File(path, "r+") as file:
        codes, categories = (file[f"obs/target_gene/{name}"][:] for name in ("codes", "categories"))
        del file["obs/target_gene"]
        file["obs/target_gene"] = codes.astype("i4")
        file["obs/__categories/target_gene"] = categories


def with_attributes_of_one_element(path: Path) -> None:
    """Text attributes as rhdf5 writes them: arrays of one fixed-length text."""
    with h5py.File(path, "r+") as file:
        found: list[h5py.HLObject] = [file]
        file.visititems(lambda _, item: found.append(item))
        for item in found:
            for name in ("encoding-type", "encoding-version", "_index"):
                if name in item.attrs:
                    text = str(item.attrs[name])
                    del item.attrs[name]
                    item.attrs.create(name, np.array([text.encode()]))


def _old_var(n_genes: int) -> np.ndarray:
    var = np.zeros(n_genes, dtype=[("index", "S8"), ("length", "i4")])
    var["index"] = [f"G{i}" for i in range(n_genes)]
    return var


def _old_sparse(file: h5py.File, name: str, values: np.ndarray) -> None:
    stored = sp.csr_matrix(values)
    group = file.create_group(name)
    group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", stored.shape
    for part in ("data", "indices", "indptr"):
        group[part] = getattr(stored, part)
