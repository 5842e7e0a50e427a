"""Heads for upstream: `sest export` and back, in upstream's own classes where these are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Demo

from sest.cache import open_cache
from sest.compat.export_upstream import export_run
from sest.compat.import_upstream import FROZEN, import_checkpoint
from sest.config import PredictConfig
from sest.errors import InputError
from sest.prediction.predict import predict
from sest.runs.checkpoint import load_model, open_checkpoint
from sest.runs.known import known_without_cells
from sest.untrusted.unpickle import read_plain_pickle

HELPER = Path(__file__).resolve().parents[1] / "helpers" / "upstream_state.py"
STATE = shutil.which("state")  # of an environment with arc-state, whose Python lies beside it
needs_upstream = pytest.mark.skipif(STATE is None, reason="arc-state is not installed (sest[peers])")


def upstream(*words: object) -> None:
    """Run the helper with the Python of arc-state."""
    assert STATE is not None
    python = Path(STATE).with_name("python")
    done = subprocess.run([python, HELPER, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "upstream"
    done = export_run(demo.run, folder)
    assert done.embed_key == "X_sest" and done.has_blend and done.n_perturbations == 12
    return folder


def test_what_is_exported_comes_back_as_it_was(demo: Demo, exported: Path, tmp_path: Path) -> None:
    import_checkpoint(exported, tmp_path / "back")
    ours, back = open_checkpoint(demo.run / "best"), open_checkpoint(tmp_path / "back")
    for name, tensor in ours.model_tensors().items():
        assert torch.equal(back.model_tensors()[name], tensor), name
    assert back.state["genes"] == ours.state["genes"] and back.sizes == ours.sizes
    one, other = known_without_cells(ours, None), known_without_cells(back, None)
    assert one is not None and other is not None
    assert one.features.names == other.features.names
    np.testing.assert_array_equal(one.features.matrix, other.features.matrix)
    assert other.columns == {k: one.columns[k] for k in ("perturbation", "cell_type", "batch", "control")}
    content = torch.load(exported / "checkpoints" / "final.ckpt", weights_only=True)  # plain values alone
    assert content["state_dict"][FROZEN].abs().sum() == 0
    dims = read_plain_pickle(exported / "var_dims.pkl")
    assert (dims["output_dim"], dims["pert_names"][1:]) == (300, list(one.perturbations[1:]))


def test_an_exported_head_predicts_the_same_from_embeddings_in_obsm(demo: Demo, exported: Path, tmp_path: Path) -> None:
    """The cache's own embeddings and values in a file, as upstream's commands take them."""
    import_checkpoint(exported, tmp_path / "back")
    cells = open_cache(demo.cache).to_anndata()
    cells.obs = cells.obs.rename(columns={"perturbation": "target_gene"})
    cells.write_h5ad(tmp_path / "cells.h5ad")
    known = known_without_cells(open_checkpoint(demo.run / "best"), None)
    assert known is not None
    asked: dict[str, Any] = {"only": known.perturbations[1], "n_cells": 40}
    predict(tmp_path / "back", tmp_path / "a.h5ad", PredictConfig(controls=str(tmp_path / "cells.h5ad"), **asked))
    predict(demo.run, tmp_path / "b.h5ad", PredictConfig(controls=str(demo.cells), blend="head", **asked))
    one, other = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    assert list(one.obs["target_gene"]) == list(other.obs["target_gene"])
    np.testing.assert_allclose(one.X.toarray(), other.X.toarray(), atol=2e-3)  # embeddings of float16, encoded again


def test_only_heads_are_exported_and_nothing_is_replaced_unasked(demo: Demo, exported: Path, tmp_path: Path) -> None:
    before = (exported / "checkpoints" / "final.ckpt").read_bytes()
    with pytest.raises(InputError, match="exists"):
        export_run(demo.run, exported)
    assert (exported / "checkpoints" / "final.ckpt").read_bytes() == before
    copy = shutil.copytree(exported, tmp_path / "copy")
    export_run(demo.run, copy, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError):
        export_run(demo.run, tmp_path / "mine", force=True)
    done = subprocess.run(
        [sys.executable, "-m", "sest", "export", demo.run, "-o", tmp_path / "x", "--to", "scvi"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "it takes: state" in done.stderr and not (tmp_path / "x").exists()


@needs_upstream
def test_upstreams_class_loads_it_and_predicts_the_same(demo: Demo, exported: Path, tmp_path: Path) -> None:
    model, rng = load_model(demo.run), np.random.default_rng(0)
    basal = rng.normal(size=(1, 16, model.sizes.dim)).astype(np.float32)
    vector = rng.normal(size=(1, model.sizes.n_features)).astype(np.float32)
    np.savez(tmp_path / "in.npz", basal=basal, pert=np.repeat(vector, 16, 0)[None], allow_pickle=False)
    upstream("predict", exported, tmp_path / "in.npz", tmp_path / "out.npy")
    with torch.inference_mode():
        expected = model(torch.from_numpy(basal), torch.from_numpy(vector))[0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=2e-6)  # float32, another order of sums


@needs_upstream
def test_a_head_with_a_batch_encoder_is_that_of_one_batch(tmp_path: Path) -> None:
    upstream("make", tmp_path / "run", "plate1", "plate2", "plate3")
    with pytest.raises(InputError, match=r"Pass --batch with one of: plate1, plate2, plate3\."):
        import_checkpoint(tmp_path / "run", tmp_path / "head")
    rng = np.random.default_rng(2)
    basal, pert = rng.random((1, 8, 30), np.float32), np.repeat(np.eye(5, dtype=np.float32)[[3]], 8, 0)[None]
    for number, name in enumerate(("plate1", "plate2", "plate3")):
        import_checkpoint(tmp_path / "run", tmp_path / name, batch=name)
        np.savez(tmp_path / "in.npz", allow_pickle=False, basal=basal, pert=pert, batch=np.full((8,), number))
        upstream("predict_own", tmp_path / "run", tmp_path / "in.npz", tmp_path / "out.npy")
        with torch.inference_mode():
            ours = load_model(tmp_path / name)(torch.from_numpy(basal), torch.from_numpy(pert[:, 0]))[0].numpy()
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), ours, atol=2e-6)  # float32, another order of sums


@needs_upstream
def test_a_run_folder_of_upstreams_predicts_through_sest_as_upstream_does(tmp_path: Path) -> None:
    """A head on highly variable genes, in the form of the published ones; its cells bring obsm["X_hvg"]."""
    upstream("make", tmp_path / "run")
    import_checkpoint(tmp_path / "run", tmp_path / "head")
    rng = np.random.default_rng(1)
    values = rng.poisson(2.0, (8, 30)).astype(np.float32)
    obs = pd.DataFrame({"gene": ["ctrl"] * 8, "kind": ["x"] * 8}, index=[f"c{i}" for i in range(8)])
    cells = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))
    cells.obsm["X_hvg"] = np.log1p(values)
    cells.write_h5ad(tmp_path / "controls.h5ad")
    predict(
        tmp_path / "head",
        tmp_path / "p.h5ad",
        PredictConfig(controls=str(tmp_path / "controls.h5ad"), only="Q", n_cells=8),
    )
    ours = ad.read_h5ad(tmp_path / "p.h5ad")
    pert = np.repeat(np.eye(5, dtype=np.float32)[[2]], 8, 0)[None]
    np.savez(tmp_path / "in.npz", basal=np.log1p(values)[None], pert=pert, allow_pickle=False)
    upstream("predict_own", tmp_path / "run", tmp_path / "in.npz", tmp_path / "out.npy")
    theirs = np.load(tmp_path / "out.npy")
    found = ours[ours.obs["gene"] == "Q"].X.toarray()
    order = [np.abs(theirs - row).sum(1).argmin() for row in found]  # sets are drawn in another order
    assert sorted(order) == list(range(8))
    np.testing.assert_allclose(found, theirs[order], atol=2e-6)
