"""A simulated screen as an AnnData or as files: the cells, features of their perturbations, and splits."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import tomli_w
from scipy import sparse

from sest import progress
from sest.cache.disk import file_aside
from sest.errors import InputError, nearest, shown
from sest.files.write_h5ad import H5adWriter
from sest.outputs import Place, check_output
from sest.simulation.model import (
    HOLD_OUT,
    names_of_genes,
    perturbation_features,
    random_stream,
    simulate_counts,
    simulate_labels,
)
from sest.simulation.simulation import Simulation

if TYPE_CHECKING:
    from anndata import AnnData

FEATURE_SUFFIXES = (".npz", ".safetensors", ".pt")
BLOCK = 4096  # cells that are made at once


@overload
def simulate(
    path: None = None,
    *,
    features: str | os.PathLike[str] | None = None,
    gene_names: Sequence[str] | None = None,
    force: bool = False,
    **options: Any,
) -> AnnData: ...


@overload
def simulate(
    path: str | os.PathLike[str],
    *,
    features: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    gene_names: Sequence[str] | None = None,
    force: bool = False,
    **options: Any,
) -> Path: ...


def simulate(
    path: str | os.PathLike[str] | None = None,
    *,
    features: str | os.PathLike[str] | None = None,
    splits: str | os.PathLike[str] | None = None,
    gene_names: Sequence[str] | None = None,
    force: bool = False,
    **options: Any,
) -> AnnData | Path:
    """Simulate a Perturb-seq screen whose effects generalise: raw counts, with controls, cell types and batches.

    The cells are in shuffled order. X holds UMI counts (CSR int32), obs `target_gene` (controls: "non-targeting"),
    `cell_type` and `batch`.

    Args:
        path: the .h5ad to write; None: the cells are returned, as an AnnData.
        features: also write the features of the perturbations there (.npz, .safetensors or .pt).
        splits: also write a TOML there that holds some perturbations of the last cell type out.
        gene_names: names of the genes (n_genes,); None: made-up ones.
        force: replace files that exist.
        options: the fields of `Simulation`, such as n_perturbations=40, n_genes=2000, seed=0.

    Returns:
        The AnnData, or the path of the file. Both have the same cells for the same options.

    Raises:
        InputError: an unknown option, sizes that cannot be, a file that exists, or a place that cannot be written to.
    """
    if gene_names is not None:
        options = {"n_genes": len(gene_names), **options}
    sim = Simulation.from_values(options, "simulate()")
    if path is not None:
        write_screen(
            sim,
            Path(path),
            Path(features) if features is not None else None,
            Path(splits) if splits is not None else None,
            gene_names=gene_names,
            force=force,
        )
        return Path(path)
    if splits is not None:
        raise InputError("Splits name the file of the cells. Give a path for the cells too, or leave splits out.")
    if features is not None:
        check_output(features, force=force, suffixes=FEATURE_SUFFIXES)
        write_features(sim, Path(features), gene_names=gene_names)
    return simulate_cells(sim, gene_names=gene_names)


def _signature() -> inspect.Signature:
    """That of `simulate` with every field of `Simulation` in place of `**options`, for help and completion."""
    written = inspect.signature(simulate)
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(Simulation)
    ]
    return written.replace(parameters=[*list(written.parameters.values())[:-1], *fields])


simulate.__signature__ = _signature()  # type: ignore[attr-defined]


def simulate_cells(sim: Simulation, *, gene_names: Sequence[str] | None = None) -> AnnData:
    """The whole screen in memory, as `write_h5ad` would write it. Raises InputError for gene names that do not fit."""
    from anndata import AnnData  # slow to import

    genes, blocks = names_of_genes(sim, gene_names), list[sparse.csr_matrix]()
    _each_block(sim, BLOCK, blocks.append)
    obs, var = simulate_labels(sim, gene_names=gene_names), pd.DataFrame(index=genes)
    return AnnData(sparse.vstack(blocks, format="csr"), obs=obs, var=var, uns=_settings(sim))


def write_h5ad(sim: Simulation, path: Path, *, gene_names: Sequence[str] | None = None, block: int = BLOCK) -> None:
    """Write raw UMI counts (CSR int32) as an h5ad with obs `target_gene`, `cell_type`, `batch` (categorical).

    Cells are in shuffled order. Memory is that of `block` cells (twice 8 bytes a nonzero count), plus a few tens of
    bytes for each cell of the file. The file appears under its name only when complete. Raises InputError for gene
    names that do not fit.
    """
    genes = names_of_genes(sim, gene_names)
    if block < 1:
        raise InputError(f"block is {block}; it must be at least 1 cell.")
    with H5adWriter(path, sim.n_genes, "int32") as writer:
        _each_block(sim, block, writer.add)
        writer.finish(simulate_labels(sim, gene_names=gene_names), pd.DataFrame(index=genes), _settings(sim))


def _each_block(sim: Simulation, block: int, take: Callable[[sparse.csr_matrix], None]) -> None:
    """Give the counts of all cells to `take`, at most `block` cells at a time."""
    progress.begin("Simulating", sim.n_cells, "cells")
    for start in range(0, sim.n_cells, block):
        rows = simulate_counts(sim, start, min(start + block, sim.n_cells))
        take(rows)
        progress.advance(rows.shape[0])
        del rows  # before the next block is made


def _settings(sim: Simulation) -> dict[str, str]:
    """What `uns` says of the cells."""
    return {"simulation": json.dumps(dataclasses.asdict(sim), sort_keys=True)}


def write_features(sim: Simulation, path: Path, *, gene_names: Sequence[str] | None = None) -> None:
    """Write `perturbation_features` as .npz, .safetensors or .pt (dict name -> tensor), else InputError."""
    features = perturbation_features(sim, gene_names=gene_names)
    check_output(path, force=True, suffixes=FEATURE_SUFFIXES)
    with file_aside(path) as partial:
        if path.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, allow_pickle=False, **features)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(features, partial)
        else:
            import torch

            torch.save({name: torch.from_numpy(row) for name, row in features.items()}, partial)


def write_splits(
    sim: Simulation,
    path: Path,
    dataset: str,
    h5ad_name: str,
    *,
    test_cell_type: str,
    n_test: int,
    n_val: int,
    gene_names: Sequence[str] | None = None,
) -> None:
    """Write a cell-load style TOML: few-shot, `n_test` and `n_val` perturbations of one cell type are held out.

    `h5ad_name` is relative to the folder of `path`. The same perturbations stay in training in the other cell types.
    Raises InputError for an unknown cell type or more held out than there are.
    """
    if test_cell_type not in sim.cell_types:
        hint = nearest(test_cell_type, sim.cell_types)
        raise InputError(f"No cell type {test_cell_type!r}. Available: {shown(sim.cell_types)}.{hint}")
    if min(n_test, n_val) < 0 or n_test + n_val > sim.n_perturbations:
        raise InputError(f"Cannot hold out {n_test} test and {n_val} val of {sim.n_perturbations} perturbations.")
    names = list(perturbation_features(sim, gene_names=gene_names))
    order = random_stream(HOLD_OUT, 0, sim.seed).permutation(len(names))
    test = sorted(names[i] for i in order[:n_test])
    val = sorted(names[i] for i in order[n_test : n_test + n_val])
    tables = {
        "datasets": {dataset: h5ad_name},
        "training": {dataset: "train"},
        "zeroshot": {},
        "fewshot": {f"{dataset}.{test_cell_type}": {"val": val, "test": test}},
    }
    check_output(path, force=True)
    with file_aside(path) as partial:
        partial.write_text(tomli_w.dumps(tables), encoding="utf-8")


def write_screen(
    sim: Simulation,
    cells: Path,
    features: Path | None = None,
    splits: Path | None = None,
    *,
    gene_names: Sequence[str] | None = None,
    inputs: Sequence[Place | None] = (),
    force: bool = False,
) -> None:
    """Write the cells and, where asked, features and splits that fit them; the long work, the cells, comes last.

    The splits hold out a quarter of the perturbations of the last cell type for testing and a twelfth for validation;
    their dataset is named as the file, so that they fit a cache made from the file and one made from the splits.
    None of them may be another one, or among `inputs` (files the caller read); what exists is replaced with `force`.
    Raises InputError for that, before anything is written, and as the three writers do; no cells are written then.
    """
    check_output(cells, inputs=inputs, force=force)
    if features is not None:
        check_output(features, inputs=[*inputs, cells], force=force, suffixes=FEATURE_SUFFIXES)
    if splits is not None:
        check_output(splits, inputs=[*inputs, cells, features], force=force)
    names_of_genes(sim, gene_names)  # checked before anything is written
    if splits is not None:
        n_test = max(1, sim.n_perturbations // 4)
        n_val = min(max(2, sim.n_perturbations // 12), sim.n_perturbations - n_test)
        relative = os.path.relpath(cells.resolve(), splits.resolve().parent)
        last = sim.cell_types[-1]
        write_splits(
            sim, splits, cells.stem, relative, test_cell_type=last, n_test=n_test, n_val=n_val, gene_names=gene_names
        )
    if features is not None:
        write_features(sim, features, gene_names=gene_names)
    write_h5ad(sim, cells, gene_names=gene_names)
