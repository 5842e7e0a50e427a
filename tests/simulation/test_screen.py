"""A simulated screen as files and as an AnnData: the same cells, whole or not at all, in bounded memory."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import tomllib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from helpers.notes import Notes
from helpers.screens import TINY
from sest.errors import InputError
from sest.files.write_h5ad import HDF5_CHUNK
from sest.progress import Silent, reporting
from sest.simulation import model
from sest.simulation.model import perturbation_features, simulate_counts
from sest.simulation.screen import simulate, write_features, write_h5ad, write_screen, write_splits
from sest.simulation.simulation import Simulation

OPTIONS = dataclasses.asdict(TINY)


class Rows(Silent):
    """Adds up how many rows were written at a time."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def advance(self, n: int = 1) -> None:
        self.rows.append(n)


class Stop(Silent):
    """Ends the writing, as Ctrl-C does."""

    def advance(self, n: int = 1) -> None:
        raise KeyboardInterrupt


# --- cells


def test_the_same_screen_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        model._biology.cache_clear()
        model._obs.cache_clear()
        write_h5ad(TINY, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_block_size_does_not_change_a_value(tmp_path: Path) -> None:
    whole = simulate_counts(TINY, 0, TINY.n_cells)
    for block in (1, 7, 64):
        with reporting(Rows()) as told:
            write_h5ad(TINY, tmp_path / "x.h5ad", block=block)
        assert isinstance(told, Rows) and sum(told.rows) == TINY.n_cells and max(told.rows) <= block
        assert (whole != anndata.read_h5ad(tmp_path / "x.h5ad").X).nnz == 0


def test_file_is_a_valid_anndata_of_integer_counts(tmp_path: Path) -> None:
    genes = [f"symbol-{g}" for g in range(TINY.n_genes)]
    write_h5ad(TINY, tmp_path / "x.h5ad", gene_names=genes)
    cells = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert cells.shape == (TINY.n_cells, TINY.n_genes) and cells.X.dtype == np.int32
    assert cells.X.has_canonical_format and cells.X.data.min() >= 1
    assert list(cells.var_names) == genes and cells.obs_names.is_unique
    assert cells.obs.equals(model.simulate_labels(TINY, gene_names=genes))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(sim: Simulation) -> int:
        model._biology(sim)
        tracemalloc.start()
        write_h5ad(sim, tmp_path / "x.h5ad", block=64)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few = replace(TINY, n_genes=600, expressed_genes=300, umi_per_cell=1500, n_controls=80)
    many = replace(few, n_controls=400)
    counts = simulate_counts(few, 0, 64)
    chunks = 8 * 4 * HDF5_CHUNK  # on their way to the file, whatever its size
    assert peak(few) < 2.5 * (counts.data.nbytes + counts.indices.nbytes) + 1e6 + chunks
    assert many.n_cells > 3.5 * few.n_cells
    assert peak(many) < 1.4 * peak(few)  # a cell keeps its codes and place (about 60 bytes), not its counts (2.4 KB)


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), reporting(Stop()):
        write_h5ad(TINY, path, block=10)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- features and splits


def test_features_are_the_same_in_every_format(tmp_path: Path) -> None:
    features = perturbation_features(TINY)
    for suffix in (".npz", ".safetensors", ".pt"):
        write_features(TINY, tmp_path / f"f{suffix}")
    as_tensors = torch.load(tmp_path / "f.pt", weights_only=True)
    read = [dict(np.load(tmp_path / "f.npz")), load_file(tmp_path / "f.safetensors")]
    read.append({name: tensor.numpy() for name, tensor in as_tensors.items()})
    for table in read:
        assert set(table) == set(features)
        for name, row in features.items():
            assert row.shape == (TINY.n_features,) and row.dtype == np.float32
            np.testing.assert_array_equal(table[name], row)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npz", "f.pt", "f.safetensors"]


def test_splits_hold_out_disjoint_perturbations_of_one_cell_type(tmp_path: Path) -> None:
    write_splits(TINY, tmp_path / "s.toml", "demo", "demo.h5ad", test_cell_type="beta", n_test=2, n_val=1)
    splits = tomllib.loads((tmp_path / "s.toml").read_text())
    held_out = splits["fewshot"]["demo.beta"]
    assert splits["datasets"] == {"demo": "demo.h5ad"} and splits["training"] == {"demo": "train"}
    assert list(splits["fewshot"]) == ["demo.beta"] and splits["zeroshot"] == {}
    assert len(held_out["test"]) == 2 and len(held_out["val"]) == 1
    assert len({*held_out["test"], *held_out["val"]} & set(perturbation_features(TINY))) == 3


def test_a_screen_s_splits_name_its_file_from_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_screen(TINY, tmp_path / "a" / "cells.h5ad", splits=tmp_path / "b" / "s.toml")
    splits = tomllib.loads((tmp_path / "b" / "s.toml").read_text())
    assert splits["datasets"] == {"cells": "../a/cells.h5ad"}
    held_out = splits["fewshot"]["cells.beta"]  # the last cell type: a quarter of 6, and at least two
    assert (len(held_out["test"]), len(held_out["val"])) == (1, 2)


# --- simulate()


def test_cells_in_memory_are_those_of_the_file(tmp_path: Path) -> None:
    with reporting(Notes()) as told:
        cells = simulate(**OPTIONS)
        path = simulate(str(tmp_path / "x.h5ad"), features=tmp_path / "f.npz", splits=tmp_path / "s.toml", **OPTIONS)
    assert isinstance(told, Notes) and told.steps == [("Simulating", 100, 0)] * 2
    file = anndata.read_h5ad(path)
    assert path == tmp_path / "x.h5ad" and isinstance(cells, anndata.AnnData)
    assert (cells.X != file.X).nnz == 0 and cells.X.dtype == file.X.dtype and cells.X.has_canonical_format
    assert cells.obs.equals(file.obs) and cells.var.equals(file.var) and dict(cells.uns) == dict(file.uns)
    assert set(np.load(tmp_path / "f.npz")) == set(perturbation_features(TINY))
    assert tomllib.loads((tmp_path / "s.toml").read_text())["datasets"] == {"x": "x.h5ad"}


def test_features_can_be_written_beside_cells_in_memory_and_genes_be_named(tmp_path: Path) -> None:
    genes = [f"symbol-{g}" for g in range(TINY.n_genes)]
    options = {name: value for name, value in OPTIONS.items() if name != "n_genes"}
    cells = simulate(features=str(tmp_path / "f.npz"), gene_names=genes, **options)
    assert list(cells.var_names) == genes and set(np.load(tmp_path / "f.npz")) <= set(genes)


def test_every_field_is_an_argument_with_its_default() -> None:
    shown = inspect.signature(simulate).parameters
    assert list(shown)[:5] == ["path", "features", "splits", "gene_names", "force"]
    fields = {f.name: f.default for f in dataclasses.fields(Simulation)}
    assert {name: shown[name].default for name in list(shown)[5:]} == fields


def test_cells_are_simulated_without_torch() -> None:
    code = (
        f"import sys; from sest.simulation.screen import simulate; simulate(**{OPTIONS}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_impossible_requests_say_what_exists(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 gene names for 120 genes"):
        write_h5ad(TINY, tmp_path / "x.h5ad", gene_names=["a", "b", "c"])
    with pytest.raises(InputError, match="block is 0"):
        write_h5ad(TINY, tmp_path / "x.h5ad", block=0)
    with pytest.raises(InputError, match="Create it first"):
        write_h5ad(TINY, tmp_path / "missing" / "x.h5ad")
    with pytest.raises(InputError, match=r"\.npz, \.safetensors, \.pt"):
        write_features(TINY, tmp_path / "features.csv")
    with pytest.raises(InputError, match="Did you mean 'alpha'"):
        write_splits(TINY, tmp_path / "s.toml", "d", "d.h5ad", test_cell_type="alfa", n_test=1, n_val=1)
    with pytest.raises(InputError, match="Cannot hold out 5 test and 2 val of 6"):
        write_splits(TINY, tmp_path / "s.toml", "d", "d.h5ad", test_cell_type="beta", n_test=5, n_val=2)
    with pytest.raises(InputError, match=r"Unknown key 'n_gene' in simulate\(\)\. Did you mean 'n_genes'"):
        simulate(n_gene=3)
    with pytest.raises(InputError, match="Give a path for the cells too"):
        simulate(splits=tmp_path / "s.toml", **OPTIONS)
    assert list(tmp_path.iterdir()) == []
