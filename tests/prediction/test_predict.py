"""Predictions of the small run of `conftest.demo`: what is written, from which controls, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import Demo
from safetensors.numpy import load_file

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import CONTROL, SET_SIZE, Predict, rows_of
from helpers.notes import Notes
from helpers.processes import server
from sest.baselines.effects import BASELINES
from sest.cache import open_cache
from sest.cells.scale import LARGEST_PREDICTED_LOG1P
from sest.config import EmbedConfig, EvaluateConfig, PredictConfig, TrainConfig
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.evaluation.evaluate import evaluate
from sest.prediction.predict import predict, predict_cells
from sest.progress import Silent, reporting
from sest.report.write import write_report
from sest.runs import checkpoint
from sest.runs.checkpoint import load_model, open_checkpoint, save_checkpoint
from sest.runs.run_folder import read_run_config
from sest.training.train import train


def test_the_test_split_is_predicted_cell_for_cell_with_all_its_controls(
    whole: ad.AnnData, real: ad.AnnData, held_out: dict[str, list[str]]
) -> None:
    expected = real.obs[(real.obs.cell_type == "beta") & real.obs.target_gene.isin([*held_out["test"], CONTROL])]
    sizes = [obs.astype(str).groupby(["cell_type", "target_gene"]).size() for obs in (whole.obs, expected)]
    pd.testing.assert_series_equal(*sizes)
    assert len(sizes[0]) == len(held_out["test"]) + 1 > 1
    assert list(whole.obs.columns) == ["target_gene", "cell_type", "batch", "sest_draw", "sest_control"]


def test_real_controls_are_those_of_the_cache_to_the_last_bit(
    demo: Demo, whole: ad.AnnData, real: ad.AnnData, values: np.ndarray
) -> None:
    written, rows = whole[rows_of(whole, CONTROL, "beta")], rows_of(real, CONTROL, "beta")
    assert list(written.obs_names) == list(real.obs_names[rows])
    assert list(written.obs["batch"]) == list(real.obs["batch"].iloc[rows])
    np.testing.assert_allclose(written.X.toarray(), values[rows], atol=2e-6)  # float32 of values below 10
    counts = open_cache(demo.cache).groups["cells"].targets()[rows]
    factor = (1e4 / np.asarray(counts.sum(1)).ravel()).astype(np.float32)
    stored = np.log1p(counts.data.astype(np.float32) * np.repeat(factor, np.diff(counts.indptr)))
    np.testing.assert_array_equal(written.X.tocsr().data, stored)


def test_values_are_sparse_float32_log1p_of_the_runs_genes(demo: Demo, whole: ad.AnnData) -> None:
    assert isinstance(whole.X, sp.csr_matrix) and whole.X.dtype == np.float32 and whole.X.has_canonical_format
    assert whole.X.data.min() > 0 and whole.X.data.max() <= LARGEST_PREDICTED_LOG1P
    assert list(whole.var_names) == open_checkpoint(demo.run / "best").state["genes"]
    assert whole.obs_names.is_unique


def test_predicted_numbers_are_those_of_the_model_called_on_the_same_sets(
    demo: Demo, predicted: Predict, held_out: dict[str, list[str]]
) -> None:
    """Embeddings, sets and features put together anew; 1e-5 because the sets are batched differently."""
    whole = predicted(blend="head")
    group = open_cache(demo.cache).groups["cells"]
    is_control = ((group.obs.perturbation == CONTROL) & (group.obs.cell_type == "beta")).to_numpy()
    embeddings = torch.from_numpy(group.embeddings()[is_control].astype(np.float32))
    batches = group.obs["batch"][is_control].to_numpy()
    model, features = load_model(demo.run), load_file(demo.features)
    for name in held_out["test"]:
        digest = hashlib.sha256(f"beta\n{name}".encode()).digest()
        rng = np.random.default_rng([0, 5, int.from_bytes(digest[:8], "little")])
        cells, of_controls = [], []
        for _ in range(2):  # 30 cells in two draws of one set of 16
            rng.integers(len(embeddings))  # the cell that chooses the file
            chosen = rng.choice(len(embeddings), SET_SIZE, replace=False)
            with torch.no_grad():
                of_set = model(embeddings[chosen][None], torch.from_numpy(features[name])[None])[0].numpy()
            cells.append(of_set[:15])
            of_controls.append(batches[chosen[:15]])
        written = whole[rows_of(whole, name, "beta")]
        np.testing.assert_allclose(written.X.toarray(), np.concatenate(cells), atol=1e-5)
        assert list(written.obs["batch"]) == list(np.concatenate(of_controls))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_choice(demo: Demo, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        predict(demo.run, tmp_path / f"{name}.h5ad", PredictConfig(seed=seed))
    a, b, c = ((tmp_path / f"{name}.h5ad").read_bytes() for name in "abc")
    assert a == b and b != c


def test_a_prediction_does_not_depend_on_what_else_is_asked(
    predicted: Predict, whole: ad.AnnData, held_out: dict[str, list[str]]
) -> None:
    first, second = held_out["test"][:2]
    alone = predicted(only=second, cell_type="beta", n_cells=30)
    assert list(alone.obs["target_gene"].cat.categories) == sorted([second, CONTROL])  # used categories only
    for cells in (alone, predicted(only=f"{second},{first}", cell_type="beta", n_cells=30)):
        mine, theirs = (x[rows_of(x, second, "beta")].X.toarray() for x in (cells, whole))
        np.testing.assert_array_equal(mine, theirs)


def test_cells_in_memory_are_those_of_the_file_which_may_be_kept(
    demo: Demo, predicted: Predict, whole: ad.AnnData, names: list[str], tmp_path: Path
) -> None:
    def same(a: ad.AnnData, b: ad.AnnData) -> bool:
        pd.testing.assert_frame_equal(a.obs, b.obs)
        return (a.X != b.X).nnz == 0 and list(a.var_names) == list(b.var_names)

    cells = predict_cells(demo.run)
    assert same(cells, whole) and sorted(cells.uns["sest"]) == sorted(whole.uns["sest"])
    assert list(tmp_path.iterdir()) == []
    asked = {names[0]: 3, names[1]: 5}
    kept = predict_cells(str(demo.run), asked, PredictConfig(cell_type="beta"), out=str(tmp_path / "kept.h5ad"))
    assert dict(kept.obs["target_gene"].value_counts()) == {**asked, CONTROL: 80}
    assert same(kept, ad.read_h5ad(tmp_path / "kept.h5ad"))
    of_list = predict_cells(demo.run, names[:2], PredictConfig(cell_type="beta", n_cells=5, seed=4))
    assert same(of_list, predicted(only=",".join(names[:2]), cell_type="beta", n_cells=5, seed=4))
    assert evaluate(cells, demo.cells, EvaluateConfig(cell_eval=False)).summary == demo.evaluation.summary


def test_any_checkpoint_of_a_run_can_predict_and_the_file_says_which(
    demo: Demo, predicted: Predict, whole: ad.AnnData
) -> None:
    early = predicted(checkpoint="checkpoint-step-10")
    made = early.uns["sest"]["provenance"]
    assert (made["checkpoint"], made["step"]) == ("checkpoint-step-10", 10)
    assert predicted(demo.run / "checkpoint-step-10").uns["sest"]["provenance"]["step"] == 10
    best = json.loads((demo.run / "best" / "state.json").read_text())
    assert whole.uns["sest"]["provenance"]["model_sha256"] == best["files"]["model.safetensors"]
    assert (early.X != whole.X).nnz > 0


def test_genes_can_be_chosen_and_reordered(demo: Demo, predicted: Predict, whole: ad.AnnData, tmp_path: Path) -> None:
    genes, file = [str(gene) for gene in reversed(whole.var_names[10:40])], tmp_path / "genes.csv"
    file.write_text("gene_name\n" + "\n".join(genes))
    some = predicted(genes=str(file))
    assert list(some.var_names) == genes
    np.testing.assert_array_equal(some.X.toarray(), whole[:, genes].X.toarray())
    ridge = whole.uns["sest"]["baselines"]["ridge"][:, whole.var_names.get_indexer(genes)]
    np.testing.assert_array_equal(some.uns["sest"]["baselines"]["ridge"], ridge)
    assert evaluate(tmp_path / "out.h5ad", demo.cells, EvaluateConfig(cell_eval=False)).provenance["n_genes"] == 30


def test_a_list_of_genes_must_be_of_the_run(refusal: Callable[..., str], whole: ad.AnnData, tmp_path: Path) -> None:
    file = tmp_path / "genes.csv"
    file.write_text("\n".join([*whole.var_names[:3], "GENE00010"]))
    assert "not the run's: GENE00010. Did you mean 'GENE0010'" in refusal(genes=str(file))
    file.write_text(f"{whole.var_names[0]}\n" * 2)
    assert "each once" in refusal(genes=str(file))
    file.write_text("gene\n")
    assert "each once" in refusal(genes=str(file))
    assert "Cannot read" in refusal(genes=str(tmp_path / "gone.csv"))


def test_a_checkpoint_without_its_run_is_told_where_files_lie(
    demo: Demo, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    moved = shutil.copytree(demo.run / "last", tmp_path / "moved")
    assert "Pass --perturbations" in refusal(moved)
    assert "Pass --cache" in refusal(moved, perturbations=str(demo.features))
    given: dict[str, Any] = {"perturbations": str(demo.features), "cache": str(demo.cache)}
    assert "no test split" in refusal(moved, **given)
    notes, out = Notes(), tmp_path / "out.h5ad"
    with reporting(notes):
        predict(moved, out, PredictConfig(**given, only=names[0], cell_type="beta"))
    assert any("no baselines are stored" in note for note in notes.notes)  # they would have seen the test cells
    assert "baselines" not in ad.read_h5ad(out).uns["sest"]
    scored = evaluate(out, demo.cells, EvaluateConfig(cell_eval=False))
    assert list(scored.summary["mae"]) == ["model", "controls", "real_half"]
    best = shutil.copytree(demo.run / "best", tmp_path / "best")  # has a blend, and with it what baselines learn from
    predict(best, tmp_path / "of_best.h5ad", PredictConfig(**given, only=names[0], cell_type="beta"))
    assert set(ad.read_h5ad(tmp_path / "of_best.h5ad").uns["sest"]["baselines"]) == set(BASELINES[1:])


def test_a_checkpoint_alone_predicts_from_new_controls_what_it_predicts_beside_its_cache(
    demo: Demo, predicted: Predict, names: list[str], held_out: dict[str, list[str]], tmp_path: Path
) -> None:
    alone = shutil.copytree(demo.run / "best", tmp_path / "head")
    for options in ({"only": (names[0], held_out["test"][0])}, {"all_perturbations": True, "cell_type": "beta"}):
        asked = {**options, "controls": str(demo.cells), "n_cells": 20}
        one, other = predicted(alone, **asked), predicted(cache=str(demo.cache), **asked)
        assert one.obs.equals(other.obs) and list(one.var_names) == list(other.var_names)
        np.testing.assert_array_equal(one.X.toarray(), other.X.toarray())
        kept, read = one.uns["sest"], other.uns["sest"]
        assert kept["blend"] == read["blend"] and kept["target_sum"] == read["target_sum"]
        for name, values in read["baselines"].items():
            np.testing.assert_array_equal(kept["baselines"][name], values)
    last = shutil.copytree(demo.run / "last", tmp_path / "other" / "last")
    notes = Notes()
    with reporting(notes):
        predict(last, tmp_path / "last.h5ad", PredictConfig(controls=str(demo.cells), only=names[0]))
    assert any("no baselines are stored" in note for note in notes.notes)
    with pytest.raises(InputError, match=r"--blend stack has nothing to go by\. Pass --cache, or --blend head"):
        predict(last, tmp_path / "o.h5ad", PredictConfig(controls=str(demo.cells), only=names[0], blend="stack"))


def test_files_that_joined_the_cache_since_change_nothing_of_a_run(
    demo: Demo, predicted: Predict, whole: ad.AnnData, tmp_path: Path
) -> None:
    cache, run = (shutil.copytree(source, tmp_path / source.name) for source in (demo.cache, demo.run))
    more, cells = tmp_path / "more.h5ad", ad.read_h5ad(demo.cells)
    cells.obs_names = [f"more {name}" for name in cells.obs_names]  # others, as the same cells are refused
    cells.write_h5ad(more)
    embed([more], cache, EmbedConfig(encoder="pca"), add=True)
    assert list(open_cache(cache).groups) == ["cells", "more"]
    again = predicted(run, cache=str(cache))
    np.testing.assert_array_equal(again.X.toarray(), whole.X.toarray())
    assert again.obs.equals(whole.obs)
    values, before = read_run_config(run)[0], open_checkpoint(run / "last")
    steps = before.state["step"] + 2
    config = TrainConfig.from_values({**values, "max_steps": steps}, "config.toml")
    train(cache, run, config, resume="auto")
    train(demo.cache, tmp_path / "same", config, resume=str(demo.run / "last"))
    for folder in (run, tmp_path / "same"):
        assert open_checkpoint(folder / "last").state["cache_sha256"] == before.state["cache_sha256"]
    one, other = (load_file(folder / "last" / "model.safetensors") for folder in (run, tmp_path / "same"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    facts = write_report(run, cache=str(cache))
    assert "is not the cache" not in facts.path.read_text()


def test_another_cache_than_the_runs_is_refused(demo: Demo, refusal: Callable[..., str], tmp_path: Path) -> None:
    embed([demo.folder / "starter.toml"], tmp_path / "o.zarr", EmbedConfig(encoder="pca", dim="32"))
    line = refusal(cache=str(tmp_path / "o.zarr"))
    assert "is not the cache" in line and "Pass --cache" in line
    assert "does not exist. Pass --cache" in refusal(cache=str(tmp_path / "gone.zarr"))


def test_of_a_damaged_checkpoint_another_is_offered(
    demo: Demo, refusal: Callable[..., str], predicted: Predict, tmp_path: Path
) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    weights = run / "best" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    line = refusal(run)
    assert "sha256 differs" in line and f"Sound: {run / 'last'}" in line
    assert predicted(run / "last").uns["sest"]["provenance"]["checkpoint"] == "last"


def test_predicting_the_real_cells_scores_perfectly(
    demo: Demo, whole: ad.AnnData, real: ad.AnnData, values: np.ndarray, tmp_path: Path
) -> None:
    rows = real.obs_names.get_indexer(whole.obs_names[rows_of(whole, CONTROL, "beta")]).tolist()
    for name in whole.uns["sest"]["pairs"]["perturbation"]:
        rows += rows_of(real, name, "beta").tolist()
    perfect = ad.AnnData(sp.csr_matrix(values[rows].astype(np.float32)), obs=real.obs.iloc[rows], var=whole.var)
    perfect.uns = whole.uns
    perfect.write_h5ad(tmp_path / "perfect.h5ad")
    summary = evaluate(tmp_path / "perfect.h5ad", demo.cells, EvaluateConfig(cell_eval=False)).summary
    assert summary["pearson_delta"]["model"] == pytest.approx(1, abs=1e-6)
    assert summary["mae"]["model"] == pytest.approx(0, abs=1e-6)
    assert summary["pds"]["model"] == 1.0


def test_values_are_cut_at_14_and_a_prediction_that_is_not_finite_is_refused(
    demo: Demo, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    made = open_checkpoint(demo.run / "best")
    tensors = made.model_tensors()
    last = max(name for name in tensors if name.startswith("project_out.") and name.endswith(".bias"))
    given: dict[str, Any] = {
        "perturbations": str(demo.features),
        "cache": str(demo.cache),
        "cell_type": "beta",
        "only": names[0],
    }
    for name, value in (("large", 100.0), ("broken", float("nan"))):
        changed = {**tensors, last: torch.full_like(tensors[last], value)}
        save_checkpoint(tmp_path / name, made.state, changed, projection=made.projection())
    assert f"NaN or infinite numbers in {last}" in refusal(tmp_path / "broken", **given)
    with pytest.MonkeyPatch.context() as monkeypatch:  # as if sound weights had overflowed
        monkeypatch.setattr(checkpoint, "check_finite", lambda *_: None)
        assert "is not finite. Try --precision fp32" in refusal(tmp_path / "broken", **given)
    predict(tmp_path / "large", tmp_path / "out.h5ad", PredictConfig(**given))
    cells = ad.read_h5ad(tmp_path / "out.h5ad")
    assert (cells[rows_of(cells, given["only"], "beta")].X.toarray() == LARGEST_PREDICTED_LOG1P).all()


def test_one_pair_in_two_files_is_one_pair_of_the_prediction(predicted: Predict, tmp_path: Path) -> None:
    """Two log1p files of the same cell types hold out the same perturbation; names of their cells may repeat."""
    groups = [small_screen(f"d/{name}", scale="log1p", seed=i) for i, name in enumerate("ab")]
    for group in groups:
        group.obs.index = [f"cell{i}" for i in range(len(group.obs))]
    cache = write_cache(tmp_path / "cache.zarr", groups)
    splits = tmp_path / "splits.toml"
    splits.write_text('[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n')
    train(cache, tmp_path / "run", small_config(splits=str(splits)))
    cells = predicted(tmp_path / "run")
    assert dict(cells.obs["gene"].value_counts()) == {"P": 16, "ctrl": 14}
    assert cells.obs_names.is_unique
    told = cells.uns["sest"]
    assert told["scale"] == "log1p" and "target_sum" not in told
    assert list(told["pairs"]["cell_type"]) == ["x"] and list(told["pairs"]["perturbation"]) == ["P"]
    written = cells[cells.obs["gene"] == "ctrl"].X.toarray()
    stored = np.concatenate(
        [g.matrix.toarray()[((g.obs.perturbation == "ctrl") & (g.obs.cell_type == "x")).to_numpy()] for g in groups]
    )
    np.testing.assert_array_equal(written, stored)
    assert all(values.shape == (1, stored.shape[1]) for values in told["baselines"].values())


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from sest.config import PredictConfig
from sest.prediction.predict import predict, predict_cells
from sest.progress import Silent, reporting

class Killing(Silent):
    def begin(self, task, total, unit, done=0, detail=None):
        self.task = task

    def advance(self, n=1):
        if self.task == "Predicting":
            os.kill(os.getpid(), signal.SIGKILL)

with reporting(Killing()):
    predict(Path(sys.argv[1]), Path(sys.argv[2]), PredictConfig())
"""


def test_a_kill_in_the_middle_leaves_no_file_of_that_name_and_does_not_hinder_the_next(
    demo: Demo, predicted: Predict, whole: ad.AnnData, tmp_path: Path
) -> None:
    assert server().run(["-c", KILLED, demo.run, tmp_path / "out.h5ad"]).returncode == -9
    assert not (tmp_path / "out.h5ad").exists()
    np.testing.assert_array_equal(predicted().X.toarray(), whole.X.toarray())


def test_an_interruption_removes_what_was_begun_and_keeps_an_older_file(demo: Demo, tmp_path: Path) -> None:
    class Stopping(Silent):
        def begin(self, task: str, total: int, unit: str, done: int = 0, detail: object = None) -> None:
            self.task = task

        def advance(self, n: int = 1) -> None:
            if self.task == "Predicting":
                raise KeyboardInterrupt

    (tmp_path / "out.h5ad").write_text("old")
    with pytest.raises(KeyboardInterrupt), reporting(Stopping()):
        predict(demo.run, tmp_path / "out.h5ad", PredictConfig(), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5ad"]
    assert (tmp_path / "out.h5ad").read_text() == "old"
