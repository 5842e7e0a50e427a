"""Predictions of the small run of `conftest.demo`: what is written, from which controls, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
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
from safetensors.numpy import load_file, save_file
from small import Notes, write_se
from tiny import tiny_config, tiny_group, write_store

from sest.cache import open_cache
from sest.cell_eval_scores import MAX_LOG1P
from sest.checkpoint import load_model, open_checkpoint, save_checkpoint
from sest.config import EmbedConfig, PredictConfig, TrainConfig
from sest.controls import Pool, new_pools, store_pools
from sest.dataset import read_dataset
from sest.embed import embed
from sest.errors import InputError
from sest.evaluate import evaluate
from sest.predict import control_rows, draw_sets, predict
from sest.progress import Silent
from sest.requests import Request
from sest.run_folder import read_run_config
from sest.train import train

CONTROL, SET_SIZE = "non-targeting", 16
Predict = Callable[..., ad.AnnData]
SMALL = {"max_steps": 1, "batch_size": 2, "set_size": 8, "hidden": 8, "n_layers": 1, "n_heads": 1, "num_workers": 0}


@pytest.fixture
def predicted(demo: Demo, tmp_path: Path) -> Predict:
    """Predicts with the demo's run, or another, to out.h5ad and reads it."""

    def call(run: Path = demo.run, **options: Any) -> ad.AnnData:
        predict(run, tmp_path / "out.h5ad", PredictConfig(**options), Silent())
        return ad.read_h5ad(tmp_path / "out.h5ad")

    return call


@pytest.fixture
def refusal(demo: Demo, tmp_path: Path) -> Callable[..., str]:
    """The one line with which a prediction to out.h5ad is refused; nothing is written."""

    def call(run: Path = demo.run, out: Path = tmp_path / "out.h5ad", **options: Any) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError) as refused:
            predict(run, out, PredictConfig(**options), Silent())
        assert sorted(tmp_path.iterdir()) == before
        assert "\n" not in str(refused.value)
        return str(refused.value)

    return call


@pytest.fixture(scope="module")
def real(demo: Demo) -> ad.AnnData:
    """The simulated cells: counts."""
    return ad.read_h5ad(demo.cells)


@pytest.fixture(scope="module")
def values(real: ad.AnnData) -> np.ndarray:
    """log1p of counts per 10,000, row by row in float64: nothing shared with the modules."""
    return np.stack([np.log1p(row * 1e4 / row.sum()) for row in real.X.toarray().astype(np.float64)])


@pytest.fixture(scope="module")
def whole(demo: Demo) -> ad.AnnData:
    """The demo's own prediction: of the test split."""
    return ad.read_h5ad(demo.folder / "predicted.h5ad")


@pytest.fixture(scope="module")
def held_out(demo: Demo) -> dict[str, list[str]]:
    """val and test perturbations, all of cell type beta."""
    splits: dict[str, list[str]] = tomllib.loads((demo.folder / "starter.toml").read_text())["fewshot"]["cells.beta"]
    return splits


@pytest.fixture(scope="module")
def names(demo: Demo) -> list[str]:
    """All perturbations."""
    return sorted(load_file(demo.features))


def rows_of(cells: ad.AnnData, perturbation: str, cell_type: str) -> np.ndarray:
    return np.flatnonzero((cells.obs["target_gene"] == perturbation) & (cells.obs["cell_type"] == cell_type))


# --- what is written


def test_the_test_split_is_predicted_cell_for_cell_with_all_its_controls(
    whole: ad.AnnData, real: ad.AnnData, held_out: dict[str, list[str]]
) -> None:
    expected = real.obs[(real.obs.cell_type == "beta") & real.obs.target_gene.isin([*held_out["test"], CONTROL])]
    sizes = [obs.astype(str).groupby(["cell_type", "target_gene"]).size() for obs in (whole.obs, expected)]
    pd.testing.assert_series_equal(*sizes)
    assert len(sizes[0]) == len(held_out["test"]) + 1 > 1
    assert list(whole.obs.columns) == ["target_gene", "cell_type", "batch"]


def test_real_controls_are_those_of_the_store_to_the_last_bit(
    demo: Demo, whole: ad.AnnData, real: ad.AnnData, values: np.ndarray
) -> None:
    written, rows = whole[rows_of(whole, CONTROL, "beta")], rows_of(real, CONTROL, "beta")
    assert list(written.obs_names) == list(real.obs_names[rows])
    assert list(written.obs["batch"]) == list(real.obs["batch"].iloc[rows])
    np.testing.assert_allclose(written.X.toarray(), values[rows], atol=2e-6)  # float32 of values below 10
    store = open_cache(demo.cache).groups["cells"].targets()[rows]
    factor = (1e4 / np.asarray(store.sum(1)).ravel()).astype(np.float32)
    stored = np.log1p(store.data.astype(np.float32) * np.repeat(factor, np.diff(store.indptr)))
    np.testing.assert_array_equal(written.X.tocsr().data, stored)


def test_values_are_sparse_float32_log1p_of_the_runs_genes(demo: Demo, whole: ad.AnnData) -> None:
    assert isinstance(whole.X, sp.csr_matrix) and whole.X.dtype == np.float32 and whole.X.has_canonical_format
    assert whole.X.data.min() > 0 and whole.X.data.max() <= MAX_LOG1P
    assert list(whole.var_names) == open_checkpoint(demo.run / "best").state["genes"]
    assert whole.obs_names.is_unique


def test_predicted_numbers_are_those_of_the_model_called_on_the_same_sets(
    demo: Demo, whole: ad.AnnData, held_out: dict[str, list[str]]
) -> None:
    """Embeddings, sets and features put together anew; 1e-5 because the sets are batched differently."""
    group = open_cache(demo.cache).groups["cells"]
    is_control = ((group.obs.perturbation == CONTROL) & (group.obs.cell_type == "beta")).to_numpy()
    embeddings = torch.from_numpy(group.embeddings()[is_control].astype(np.float32))
    batches = group.obs["batch"][is_control].to_numpy()
    model, features = load_model(demo.run), load_file(demo.features)
    for name in held_out["test"]:
        digest = hashlib.sha256(f"beta\n{name}".encode()).digest()
        rng = np.random.default_rng([0, 5, int.from_bytes(digest[:8], "little")])
        cells, of_controls = [], []
        for _ in range(2):  # 30 cells in sets of 16
            rng.integers(len(embeddings))  # the cell that chooses the file
            chosen = rng.choice(len(embeddings), SET_SIZE, replace=False)
            with torch.no_grad():
                cells.append(model(embeddings[chosen][None], torch.from_numpy(features[name])[None])[0].numpy())
            of_controls.append(batches[chosen])
        written = whole[rows_of(whole, name, "beta")]
        np.testing.assert_allclose(written.X.toarray(), np.concatenate(cells)[:30], atol=1e-5)
        assert list(written.obs["batch"]) == list(np.concatenate(of_controls)[:30])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_choice(demo: Demo, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        predict(demo.run, tmp_path / f"{name}.h5ad", PredictConfig(seed=seed), Silent())
    a, b, c = ((tmp_path / f"{name}.h5ad").read_bytes() for name in "abc")
    assert a == b and b != c


def test_the_test_split_can_be_that_of_one_cell_type(predicted: Predict, tmp_path: Path) -> None:
    """Both cell types of a small store have a test perturbation."""
    store = write_store(tmp_path / "store.zarr", [tiny_group("d")])
    splits, text = tmp_path / "splits.toml", '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n'
    splits.write_text(text + '[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n[fewshot."d.y"]\ntest = ["P", "S"]\n')
    train(store, tmp_path / "run", tiny_config(splits=str(splits), max_steps=1), Silent())
    both, one = predicted(tmp_path / "run"), predicted(tmp_path / "run", cell_type="y")
    assert dict(both.obs["cell_type"].value_counts()) == {"x": 8 + 7, "y": 8 + 6 + 7}
    assert set(one.obs["cell_type"]) == {"y"}
    np.testing.assert_array_equal(one.X.toarray(), both[both.obs["cell_type"] == "y"].X.toarray())


def test_a_prediction_does_not_depend_on_what_else_is_asked(
    predicted: Predict, whole: ad.AnnData, held_out: dict[str, list[str]]
) -> None:
    first, second = held_out["test"][:2]
    alone = predicted(only=second, cell_type="beta", n_cells=30)
    assert list(alone.obs["target_gene"].cat.categories) == sorted([second, CONTROL])  # used categories only
    for cells in (alone, predicted(only=f"{second},{first}", cell_type="beta", n_cells=30)):
        mine, theirs = (x[rows_of(x, second, "beta")].X.toarray() for x in (cells, whole))
        np.testing.assert_array_equal(mine, theirs)


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
    assert evaluate(tmp_path / "out.h5ad", demo.cells, with_cell_eval=False).provenance["n_genes"] == 30


# --- what can be asked


@pytest.fixture
def template(real: ad.AnnData, names: list[str], tmp_path: Path) -> ad.AnnData:
    """template.h5ad: shuffled rows of both cell types, 12 controls each, in columns that differ from the run's."""
    rng = np.random.default_rng(0)
    rows = [
        rng.choice(rows_of(real, name, cell_type), n, replace=False)
        for cell_type in ("alpha", "beta")
        for name, n in ((names[0], 20), (names[1], 5), (CONTROL, 12))
    ]
    chosen = real.obs.iloc[rng.permutation(np.concatenate(rows))]
    obs = pd.DataFrame(
        {
            "gene": chosen["target_gene"].astype(str).replace(CONTROL, "ctrl").to_numpy(),
            "cell_type": pd.Categorical(chosen["cell_type"].astype(str), categories=["gamma", "beta", "alpha"]),
            "score": rng.random(len(chosen)),
        },
        index=[f"row{i}" for i in range(len(chosen))],
    )
    made = ad.AnnData(sp.csr_matrix((len(obs), 3), dtype=np.float32), obs=obs)
    made.write_h5ad(tmp_path / "template.h5ad")
    return made


def test_a_template_keeps_its_rows_and_gets_real_controls(
    predicted: Predict, template: ad.AnnData, real: ad.AnnData, values: np.ndarray, tmp_path: Path
) -> None:
    cells = predicted(template=str(tmp_path / "template.h5ad"))
    assert sorted(cells.obs_names) == sorted(template.obs_names)
    expected = template.obs.loc[cells.obs_names]
    for column in expected:
        np.testing.assert_array_equal(cells.obs[column].to_numpy(), expected[column].to_numpy())
    assert list(cells.obs["cell_type"].cat.categories) == ["beta", "alpha"]  # the used ones, in the template's order
    keys = cells.obs[["cell_type", "gene"]].astype(str).agg("/".join, axis=1)
    assert (keys != keys.shift()).sum() == keys.nunique() == 6  # rows are grouped
    assert cells.uns["sest"]["columns"] == {"perturbation": "gene", "cell_type": "cell_type", "control": "ctrl"}
    for cell_type in ("alpha", "beta"):
        of_type = (cells.obs["gene"] == "ctrl") & (cells.obs["cell_type"] == cell_type)
        pool = values[rows_of(real, CONTROL, cell_type)]
        distance = np.abs(cells[of_type].X.toarray()[:, None] - pool[None]).max(2)
        assert (distance.min(1) < 1e-5).all() and len(set(distance.argmin(1))) == 12  # different real cells


def test_a_template_without_cell_types_takes_the_named_one(
    demo: Demo, predicted: Predict, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    obs = pd.DataFrame({"gene": [names[0], "control", names[0]]}, index=list("abc"))
    ad.AnnData(sp.csr_matrix((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "t.h5ad")
    path = str(tmp_path / "t.h5ad")
    assert "several cell types: alpha, beta. Pass --cell-type" in refusal(template=path)
    cells = predicted(template=path, cell_type="alpha")
    assert cells.obs["cell_type"].tolist() == ["alpha"] * 3
    assert dict(zip(cells.obs_names, cells.obs["gene"], strict=True)) == dict(zip("abc", obs["gene"], strict=True))
    assert evaluate(tmp_path / "out.h5ad", demo.cells, with_cell_eval=False).provenance["n_pairs"] == 1


def test_a_template_may_have_any_columns_and_repeated_names(
    predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    obs = pd.DataFrame({"guide": ["NT-9", names[0], "NT-9"], "plate": ["p1", None, "p2"]}, index=["x", "x", "y"])
    with pytest.warns(UserWarning, match="not unique"):
        ad.AnnData(sp.csr_matrix((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "t.h5ad")
    cells = predicted(template=str(tmp_path / "t.h5ad"), pert_col="guide", control="NT-9", cell_type="beta")
    assert sorted(cells.obs_names) == ["x", "x-1", "y"]
    assert sorted(cells.obs["guide"]) == sorted(obs["guide"]) and cells.obs["plate"].isna().sum() == 1
    assert cells.uns["sest"]["columns"]["control"] == "NT-9"


def test_a_table_of_counts_says_what_and_how_many(demo: Demo, names: list[str], tmp_path: Path) -> None:
    """Written as a spreadsheet does it: with a mark at the beginning, CR LF, an empty line and a column more."""
    table, lines = tmp_path / "counts.csv", [f"{names[0]},40,9000", "", f"{names[3]},7,9000", ""]
    table.write_bytes("\r\n".join(["\ufefftarget_gene,n_cells,median_umi_per_cell", *lines]).encode())
    result = predict(demo.run, tmp_path / "out.h5ad", PredictConfig(counts=str(table), cell_type="alpha"), Silent())
    sizes = ad.read_h5ad(tmp_path / "out.h5ad").obs["target_gene"].value_counts()
    assert dict(sizes) == {names[0]: 40, names[3]: 7, CONTROL: 80}
    assert (result.n_predicted, result.n_controls, result.n_perturbations, result.n_genes) == (47, 80, 2, 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target_gene,n_cells\nA,5\n\nB,many\n", "line 4: 'B,many' is not"),
        ("target_gene,n_cells\nA,5\nA,5\n", "line 3: 'A,5' is not a new perturbation"),
        ("target_gene,n_cells\nA,0\n", "line 2: 'A,0' is not"),
        ("target_gene,n_cells\nA\n", "line 2: 'A,' is not"),
        ("gene,cells\nA,5\n", "needs the columns target_gene,n_cells; its first line has: gene, cells"),
        ("", "its first line has: (none)"),
        ("target_gene,n_cells\n", "lists no perturbations"),
    ],
)
def test_a_bad_table_of_counts_is_refused_with_the_line(
    refusal: Callable[..., str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "counts.csv").write_text(text)
    assert message in refusal(counts=str(tmp_path / "counts.csv"))


def test_bad_requests_are_refused_in_one_line_and_nothing_is_written(
    refusal: Callable[..., str], names: list[str], template: ad.AnnData, tmp_path: Path
) -> None:
    assert "several cell types: alpha, beta. Pass --cell-type." in refusal(only=names[0])
    assert "Did you mean 'beta'?" in refusal(only=names[0], cell_type="betta")
    assert "No test cells of cell type 'alpha'. There are: beta." in refusal(cell_type="alpha")
    near = refusal(only=names[0] + "x", cell_type="beta")
    assert "no features for 1 of 1 perturbations" in near and f"'{names[0]}'" in near
    assert f"'{CONTROL}' is the control" in refusal(only=CONTROL, cell_type="beta")
    assert "each once" in refusal(only=f"{names[0]},{names[0]}", cell_type="beta")
    assert "each once" in refusal(only=" , ", cell_type="beta")
    assert "Pass one of" in refusal(only=names[0], counts="x.csv")
    assert "It has: last, checkpoint-step-20, best, checkpoint-step-10" in refusal(checkpoint="step-10")
    assert "does not exist" in refusal(run=tmp_path / "no-run")
    path = tmp_path / "template.h5ad"
    assert "is read for this prediction" in refusal(out=path, template=str(path))
    assert "Create it first" in refusal(out=tmp_path / "no-folder" / "out.h5ad")
    assert "is a folder" in refusal(out=tmp_path)


def test_a_list_of_genes_must_be_of_the_run(refusal: Callable[..., str], whole: ad.AnnData, tmp_path: Path) -> None:
    file = tmp_path / "genes.csv"
    file.write_text("\n".join([*whole.var_names[:3], "GENE00010"]))
    assert "not the run's: GENE00010. Did you mean 'GENE0010'" in refusal(genes=str(file))
    file.write_text(f"{whole.var_names[0]}\n" * 2)
    assert "each once" in refusal(genes=str(file))
    file.write_text("gene\n")
    assert "each once" in refusal(genes=str(file))
    assert "Cannot read" in refusal(genes=str(tmp_path / "gone.csv"))


# --- features, stores and checkpoints that do not belong together


def test_a_checkpoint_without_its_run_is_told_where_files_lie(
    demo: Demo, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    moved = shutil.copytree(demo.run / "best", tmp_path / "moved")
    assert "Pass --perturbations" in refusal(moved)
    assert "Pass --cache" in refusal(moved, perturbations=str(demo.features))
    given = {"perturbations": str(demo.features), "cache": str(demo.cache)}
    assert "no test split" in refusal(moved, **given)
    notes, out = Notes(), tmp_path / "out.h5ad"
    predict(moved, out, PredictConfig(**given, only=names[0], cell_type="beta"), notes)
    assert any("no baselines are stored" in note for note in notes.notes)  # they would have seen the test cells
    assert "baselines" not in ad.read_h5ad(out).uns["sest"]
    assert list(evaluate(out, demo.cells, with_cell_eval=False).summary["mae"]) == ["model", "context_mean"]


def test_features_that_are_not_the_runs_are_refused(
    demo: Demo, refusal: Callable[..., str], predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    vectors, other = load_file(demo.features), tmp_path / "other.safetensors"
    save_file({name: row[:-1].copy() for name, row in vectors.items()}, other)
    assert "width 63; the checkpoint takes 64" in refusal(perturbations=str(other))
    save_file({name: row + 1 for name, row in vectors.items()}, other)
    assert "other features than the checkpoint was trained with" in refusal(perturbations=str(other))
    assert "Pass --perturbations" in refusal(perturbations=str(tmp_path / "gone.pt"))
    save_file({**vectors, "NEW": vectors[names[0]]}, other)
    cells = predicted(perturbations=str(other), only="NEW", cell_type="beta")
    assert len(rows_of(cells, "NEW", "beta")) == 128  # never seen in training, but it has features


def test_another_store_than_the_runs_is_refused(demo: Demo, refusal: Callable[..., str], tmp_path: Path) -> None:
    embed([demo.folder / "starter.toml"], tmp_path / "o.zarr", EmbedConfig(encoder="pca", dim="32"), Silent())
    line = refusal(cache=str(tmp_path / "o.zarr"))
    assert "is not the store" in line and "Pass --cache" in line
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


def test_a_one_hot_run_predicts_what_it_saw_and_refuses_the_rest(
    demo: Demo, refusal: Callable[..., str], predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(demo.cache, run, TrainConfig(**SMALL, splits=str(demo.folder / "starter.toml")), Silent())
    line = refusal(run, only=names[0][:-1] + "X", cell_type="beta")
    assert "one-hot features and never saw" in line and "--perturbations FILE" in line
    assert sorted(predicted(run).uns["sest"]["baselines"]) == ["context_mean", "perturbation_mean"]  # no ridge
    assert "features of width 64" in refusal(run, perturbations=str(demo.features))


# --- baselines and controls


def effects(
    real: ad.AnnData, values: np.ndarray, held_out: dict[str, list[str]], names: list[str]
) -> dict[str, np.ndarray]:
    """What each perturbation does in training, on average over the cell types it is trained in."""
    unseen = {*held_out["val"], *held_out["test"]}
    found = {}
    for name in names:
        of_type = [
            values[rows_of(real, name, cell_type)].mean(0) - values[rows_of(real, CONTROL, cell_type)].mean(0)
            for cell_type in ("alpha", "beta")
            if (cell_type, name) not in {("beta", x) for x in unseen}
        ]
        found[name] = np.mean(of_type, axis=0)
    return found


@pytest.mark.parametrize("of_template", [False, True])
def test_a_stored_baseline_has_its_learned_effect_around_the_controls_of_the_file(
    predicted: Predict,
    template: ad.AnnData,
    whole: ad.AnnData,
    real: ad.AnnData,
    values: np.ndarray,
    held_out: dict[str, list[str]],
    names: list[str],
    tmp_path: Path,
    of_template: bool,
) -> None:
    """`sest evaluate` subtracts the controls it finds: all 80, or the 12 a template asks for, leave the same effect."""
    cells = predicted(template=str(tmp_path / "template.h5ad")) if of_template else whole
    told, learned = cells.uns["sest"], effects(real, values, held_out, names)
    pairs = list(zip(*(told["pairs"][key] for key in ("cell_type", "perturbation")), strict=True))
    assert len(pairs) == (4 if of_template else 3)
    for i, (cell_type, name) in enumerate(pairs):
        label = cells.obs[told["columns"]["perturbation"]]
        of_type = (label == told["columns"]["control"]) & (cells.obs["cell_type"] == cell_type)
        control = np.asarray(cells[of_type].X.mean(0, dtype=np.float64)).ravel()
        np.testing.assert_allclose(told["baselines"]["context_mean"][i], control, atol=1e-5)  # float32
        expected = np.maximum(control + learned[name], 0)
        np.testing.assert_allclose(told["baselines"]["perturbation_mean"][i], expected, atol=1e-5)


def test_evaluate_scores_the_stored_baselines(
    demo: Demo, real: ad.AnnData, values: np.ndarray, held_out: dict[str, list[str]], names: list[str]
) -> None:
    summary, learned = demo.result.evaluation.summary, effects(real, values, held_out, names)
    assert list(summary["mae"]) == ["model", "context_mean", "perturbation_mean", "ridge"]
    control = values[rows_of(real, CONTROL, "beta")].mean(0)
    errors = [
        np.abs(np.maximum(control + learned[name], 0) - values[rows_of(real, name, "beta")].mean(0)).mean()
        for name in held_out["test"]
    ]
    assert summary["mae"]["perturbation_mean"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert summary["pearson_delta"]["context_mean"] == 0.0


def test_predicting_the_real_cells_scores_perfectly(
    demo: Demo, whole: ad.AnnData, real: ad.AnnData, values: np.ndarray, tmp_path: Path
) -> None:
    rows = real.obs_names.get_indexer(whole.obs_names[rows_of(whole, CONTROL, "beta")]).tolist()
    for name in whole.uns["sest"]["pairs"]["perturbation"]:
        rows += rows_of(real, name, "beta").tolist()
    perfect = ad.AnnData(sp.csr_matrix(values[rows].astype(np.float32)), obs=real.obs.iloc[rows], var=whole.var)
    perfect.uns = whole.uns
    perfect.write_h5ad(tmp_path / "perfect.h5ad")
    summary = evaluate(tmp_path / "perfect.h5ad", demo.cells, with_cell_eval=False).summary
    assert summary["pearson_delta"]["model"] == pytest.approx(1, abs=1e-6)
    assert summary["mae"]["model"] == pytest.approx(0, abs=1e-6)
    assert summary["pds"]["model"] == 1.0


def test_values_are_cut_at_14_and_a_prediction_that_is_not_finite_is_refused(
    demo: Demo, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    made = open_checkpoint(demo.run / "best")
    tensors = made.model_tensors()
    last = max(name for name in tensors if name.startswith("project_out.") and name.endswith(".bias"))
    given = {"perturbations": str(demo.features), "cache": str(demo.cache), "cell_type": "beta", "only": names[0]}
    for name, value in (("large", 100.0), ("broken", float("nan"))):
        changed = {**tensors, last: torch.full_like(tensors[last], value)}
        save_checkpoint(tmp_path / name, made.state, changed, projection=made.projection())
    assert "is not finite. Try --precision fp32" in refusal(tmp_path / "broken", **given)
    predict(tmp_path / "large", tmp_path / "out.h5ad", PredictConfig(**given), Silent())
    cells = ad.read_h5ad(tmp_path / "out.h5ad")
    assert (cells[rows_of(cells, given["only"], "beta")].X.toarray() == MAX_LOG1P).all()


def pool(n: int, files: list[int] | None = None) -> Pool:
    names = np.array([f"c{i}" for i in range(n)])
    of_file = np.array(files or [0] * n)
    return Pool("x", np.zeros((n, 2), np.float16), sp.csr_matrix((n, 3), dtype=np.float32), names, names, of_file)


def test_a_set_never_mixes_files_and_repeats_cells_only_where_a_file_has_too_few() -> None:
    files = [0] * 7 + [1] * 9
    sets = draw_sets(Request(pool(16, files), "A", False, 90), 8, seed=0)
    assert sets.shape == (12, 8)
    of_set = np.array(files)[sets]
    assert (of_set == of_set[:, :1]).all() and set(of_set[:, 0]) == {0, 1}
    for row, file in zip(sets.tolist(), of_set[:, 0].tolist(), strict=True):
        assert len(set(row)) == 8 if file == 1 else len(set(row)) <= 7


@pytest.mark.parametrize(("n_cells", "distinct"), [(10, 10), (4, 4), (25, 10)])
def test_control_rows_are_all_of_the_pool_or_a_draw(n_cells: int, distinct: int) -> None:
    rows = control_rows(Request(pool(10), "ctrl", True, n_cells), seed=0)
    assert len(rows) == n_cells and (np.diff(rows) >= 0).all()
    assert len(set(rows.tolist())) <= distinct and (n_cells > 10 or len(set(rows.tolist())) == distinct)


def test_one_pair_in_two_files_is_one_pair_of_the_prediction(predicted: Predict, tmp_path: Path) -> None:
    """Two log1p files of the same cell types hold out the same perturbation; names of their cells may repeat."""
    groups = [tiny_group(f"d/{name}", scale="log1p", seed=i) for i, name in enumerate("ab")]
    for group in groups:
        group.obs.index = [f"cell{i}" for i in range(len(group.obs))]
    store = write_store(tmp_path / "store.zarr", groups)
    splits = tmp_path / "splits.toml"
    splits.write_text('[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n')
    train(store, tmp_path / "run", tiny_config(splits=str(splits)), Silent())
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
    np.testing.assert_allclose(told["baselines"]["context_mean"][0], stored.mean(0), atol=1e-6)


# --- new control cells


def controls_of(run: Path, progress: Silent | None = None, **options: Any) -> tuple[dict[str, Pool], dict[str, Pool]]:
    """Pools of the run's store, and of `cells` embedded anew."""
    values, provenance = read_run_config(run)
    data = read_dataset(Path(provenance["cache"]), TrainConfig.from_values(values, "run"), Silent())
    checkpoint = open_checkpoint(run / "best")
    return store_pools(data), new_pools(PredictConfig(**options), checkpoint, data, progress or Silent())


def assert_same_cells(stored: dict[str, Pool], new: dict[str, Pool]) -> None:
    """float16 has 11 bits: a rounding that falls the other way is 1e-3 of a value."""
    assert list(stored) == list(new) == ["alpha", "beta"]
    for name, old in stored.items():
        assert list(new[name].names) == list(old.names) and list(new[name].batches) == list(old.batches)
        scale = np.abs(old.embeddings).max()
        np.testing.assert_allclose(new[name].embeddings, old.embeddings, rtol=1e-3, atol=1e-4 * scale)
        np.testing.assert_allclose(new[name].expression.toarray(), old.expression.toarray(), atol=2e-6)


def test_new_cells_get_the_embeddings_of_the_store_with_pca(
    demo: Demo, predicted: Predict, whole: ad.AnnData, real: ad.AnnData, held_out: dict[str, list[str]], tmp_path: Path
) -> None:
    """The same cells with their genes in another order, in columns of other names."""
    order = np.random.default_rng(0).permutation(real.n_vars)
    shuffled = real[:, order].copy()
    shuffled.obs = shuffled.obs.rename(columns={"target_gene": "guide"})
    shuffled.write_h5ad(tmp_path / "new.h5ad")
    options = {"cells": str(tmp_path / "new.h5ad"), "pert_col": "guide"}
    assert_same_cells(*controls_of(demo.run, **options))
    name = held_out["test"][0]
    cells = predicted(**options, only=name, cell_type="beta", n_cells=30)
    mine, theirs = (x[rows_of(x, name, "beta")].X.toarray() for x in (cells, whole))
    np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-2)  # embeddings differ by float16's rounding


@pytest.fixture(scope="module")
def se_run(demo: Demo, real: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SE model, cells whose symbols are in a var column, a store and a run of one step."""
    folder = tmp_path_factory.mktemp("se")
    write_se(folder / "se", [str(g) for g in real.var_names[::-1][:250]])
    cells = real.copy()
    cells.var = pd.DataFrame({"symbol": real.var_names}, index=[f"ENSG{i:011d}" for i in range(real.n_vars)])
    cells.write_h5ad(folder / "screen.h5ad")
    config = EmbedConfig(encoder=str(folder / "se"), dim="8", device="cpu", seed=5)
    embed([folder / "screen.h5ad"], folder / "cache.zarr", config, Silent())
    train(folder / "cache.zarr", folder / "run", TrainConfig(**SMALL), Silent())
    return folder


def test_new_cells_get_the_embeddings_of_the_store_with_se(se_run: Path) -> None:
    stored, new = controls_of(se_run / "run", cells=str(se_run / "screen.h5ad"), encoder=str(se_run / "se"))
    assert_same_cells(stored, new)
    assert stored["alpha"].embeddings.shape == (80, 8)


def test_new_cells_that_do_not_fit_the_run_are_refused(
    demo: Demo, refusal: Callable[..., str], se_run: Path, real: ad.AnnData, names: list[str], tmp_path: Path
) -> None:
    asked = {"only": names[0], "cell_type": "beta"}
    with_se = {"run": se_run / "run", "cells": str(se_run / "screen.h5ad"), **asked}
    assert "Pass --encoder with its folder" in refusal(**with_se)
    write_se(tmp_path / "other", [str(g) for g in real.var_names], seed=1)
    assert "is not the encoder the run was made with" in refusal(**with_se, encoder=str(tmp_path / "other"))
    few = tmp_path / "few.h5ad"
    real[:, 7:].write_h5ad(few)
    assert "lacks 7 of the 300 genes of the run's PCA: GENE0001" in refusal(cells=str(few), **asked)
    logged = real.copy()
    logged.X = sp.csr_matrix(np.log1p(real.X.toarray()).astype(np.float32))
    logged.write_h5ad(few)
    assert "holds log1p; the run was trained on counts" in refusal(cells=str(few), **asked)
    real[real.obs["target_gene"] != CONTROL].write_h5ad(few)
    assert "No control cells" in refusal(cells=str(few), **asked)
    assert "takes one .h5ad or .h5 file" in refusal(cells=str(demo.folder / "starter.toml"), **asked)
    assert "say what to predict" in refusal(cells=str(demo.cells))


# --- stopped in the middle

KILLED = """
import os, signal, sys
from pathlib import Path
from sest.config import PredictConfig
from sest.predict import predict
from sest.progress import Silent

class Killing(Silent):
    def begin(self, task, total, unit, done=0, detail=None):
        self.task = task

    def advance(self, n=1):
        if self.task == "Predicting":
            os.kill(os.getpid(), signal.SIGKILL)

predict(Path(sys.argv[1]), Path(sys.argv[2]), PredictConfig(), Killing())
"""


def test_a_kill_in_the_middle_leaves_no_file_of_that_name_and_does_not_hinder_the_next(
    demo: Demo, predicted: Predict, whole: ad.AnnData, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(demo.run), str(tmp_path / "out.h5ad")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -9
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
    with pytest.raises(KeyboardInterrupt):
        predict(demo.run, tmp_path / "out.h5ad", PredictConfig(), Stopping())
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5ad"]
    assert (tmp_path / "out.h5ad").read_text() == "old"
