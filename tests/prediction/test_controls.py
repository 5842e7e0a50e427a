"""Control cells of the run's cache, and new ones that are embedded as those were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import Demo

import sest
import sest.prediction.controls
from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import CONTROL, SMALL, Predict, rows_of
from helpers.se_model import write_se
from sest.config import EmbedConfig, PredictConfig, TrainConfig
from sest.data.dataset import read_dataset
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.prediction.controls import CachedPools, Pool, cached_pool, new_pools, pool_of
from sest.prediction.predict import predict
from sest.runs.checkpoint import open_checkpoint
from sest.runs.known import known_with_cells, known_without_cells
from sest.runs.run_folder import read_run_config
from sest.training.train import train


def controls_of(run: Path, **options: Any) -> tuple[dict[str, Pool], dict[str, Pool]]:
    """Pools of the run's cache, and of `controls` embedded anew."""
    values, provenance = read_run_config(run)
    data = read_dataset(Path(provenance["cache"]), TrainConfig.from_values(values, "run"))
    checkpoint = open_checkpoint(run / "best")
    known = known_with_cells(checkpoint, data, TrainConfig.from_values(values, "run"), values["perturbations"])
    alone = known_without_cells(checkpoint, None)
    assert alone is not None
    pools, same = (new_pools(PredictConfig(**options), checkpoint, one) for one in (known, alone))
    for name, pool in pools.items():
        assert np.array_equal(pool.embeddings, same[name].embeddings)
        assert not (pool.expression != same[name].expression).nnz
    return dict(CachedPools(data)), pools


def assert_same_cells(stored: dict[str, Pool], new: dict[str, Pool]) -> None:
    """float16 has 11 bits: a rounding that falls the other way is 1e-3 of a value."""
    assert list(stored) == list(new) == ["alpha", "beta"]
    for name, old in stored.items():
        assert list(new[name].names) == list(old.names) and list(new[name].batches) == list(old.batches)
        scale = np.abs(old.embeddings).max()
        np.testing.assert_allclose(new[name].embeddings, old.embeddings, rtol=1e-3, atol=1e-4 * scale)
        np.testing.assert_allclose(new[name].expression.toarray(), old.expression.toarray(), atol=2e-6)


def test_new_cells_get_the_embeddings_of_the_cache_with_pca(
    demo: Demo, predicted: Predict, real: ad.AnnData, held_out: dict[str, list[str]], tmp_path: Path
) -> None:
    """The same cells with their genes in another order, in columns of other names."""
    order = np.random.default_rng(0).permutation(real.n_vars)
    shuffled = real[:, order].copy()
    shuffled.obs = shuffled.obs.rename(columns={"target_gene": "guide"})
    shuffled.write_h5ad(tmp_path / "new.h5ad")
    options = {"controls": str(tmp_path / "new.h5ad"), "pert_col": "guide"}
    assert_same_cells(*controls_of(demo.run, **options))
    name = held_out["test"][0]
    cells = predicted(**options, only=name, cell_type="beta", n_cells=30, blend="head")
    whole = predicted(blend="head")
    mine, theirs = (x[rows_of(x, name, "beta")].X.toarray() for x in (cells, whole))
    np.testing.assert_allclose(mine, theirs, rtol=1e-2, atol=1e-2)  # embeddings differ by float16's rounding


@pytest.fixture(scope="module")
def se_run(demo: Demo, real: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SE model, cells whose symbols are in a var column, a cache and a run of one step."""
    folder = tmp_path_factory.mktemp("se")
    write_se(folder / "se", [str(g) for g in real.var_names[::-1][:250]])
    cells = real.copy()
    cells.var = pd.DataFrame({"symbol": real.var_names}, index=[f"ENSG{i:011d}" for i in range(real.n_vars)])
    cells.write_h5ad(folder / "screen.h5ad")
    config = EmbedConfig(encoder=str(folder / "se"), dim="8", device="cpu", seed=5)
    embed([folder / "screen.h5ad"], folder / "cache.zarr", config)
    train(folder / "cache.zarr", folder / "run", TrainConfig(**SMALL))
    return folder


def test_new_cells_get_the_embeddings_of_the_cache_with_se(se_run: Path) -> None:
    stored, new = controls_of(se_run / "run", controls=str(se_run / "screen.h5ad"), encoder=str(se_run / "se"))
    assert_same_cells(stored, new)
    assert stored["alpha"].embeddings.shape == (80, 8)


def test_new_cells_that_do_not_fit_the_run_are_refused(
    demo: Demo, refusal: Callable[..., str], se_run: Path, real: ad.AnnData, names: list[str], tmp_path: Path
) -> None:
    asked = {"only": names[0], "cell_type": "beta"}
    with_se = {"run": se_run / "run", "controls": str(se_run / "screen.h5ad"), **asked}
    assert "Pass --encoder with its folder" in refusal(**with_se)
    write_se(tmp_path / "other", [str(g) for g in real.var_names], seed=1)
    assert "is not the encoder that" in refusal(**with_se, encoder=str(tmp_path / "other"))
    few = tmp_path / "few.h5ad"
    real[:, 7:].write_h5ad(few)
    assert "lacks 7 of the 300 genes of the run's PCA: GENE0001" in refusal(controls=str(few), **asked)
    logged = real.copy()
    logged.X = sp.csr_matrix(np.log1p(real.X.toarray()).astype(np.float32))
    logged.write_h5ad(few)
    assert "holds log1p; the run was trained on counts" in refusal(controls=str(few), **asked)
    real[real.obs["target_gene"] != CONTROL].write_h5ad(few)
    assert "No control cells" in refusal(controls=str(few), **asked)
    assert "starter.toml is not an .h5ad file" in refusal(controls=str(demo.folder / "starter.toml"), **asked)
    assert "say what to predict" in refusal(controls=str(demo.cells))


def test_new_log1p_cells_of_another_total_are_refused_unless_that_is_asked_for(
    real: ad.AnnData, tmp_path: Path
) -> None:
    cells, paths = real.copy(), {}
    for total in (1e4, 1e6):
        dense = real.X.toarray().astype(np.float64)
        cells.X = sp.csr_matrix(np.log1p(dense / dense.sum(1, keepdims=True) * total).astype(np.float32))
        paths[total] = tmp_path / f"cells{total:g}.h5ad"
        cells.write_h5ad(paths[total])
    embed([paths[1e4]], tmp_path / "c.zarr", EmbedConfig(encoder="pca", dim=8, device="cpu"))
    train(tmp_path / "c.zarr", tmp_path / "run", TrainConfig(**SMALL))
    assert_same_cells(*controls_of(tmp_path / "run", controls=str(paths[1e4])))
    with pytest.raises(InputError, match=r"is log1p of CPM.*the run was trained on .*10,000\. .*--mixed-scales allow"):
        controls_of(tmp_path / "run", controls=str(paths[1e6]))
    stored, new = controls_of(tmp_path / "run", controls=str(paths[1e6]), mixed_scales="allow")
    assert new["alpha"].expression.max() > stored["alpha"].expression.max()


def test_new_cells_are_normalised_by_all_counts_of_their_file_and_not_by_those_of_the_runs_genes(
    demo: Demo, real: ad.AnnData, tmp_path: Path
) -> None:
    """30 genes that the run does not have hold as many counts as the others together, or more."""
    rng = np.random.default_rng(0)
    further = sp.csr_matrix(rng.poisson(30, (real.n_obs, 30)).astype(np.float32))
    genes = [*real.var_names, *(f"FURTHER{i}" for i in range(30))]
    cells = ad.AnnData(sp.hstack([real.X, further], format="csr"), obs=real.obs, var=pd.DataFrame(index=genes))
    cells.write_h5ad(tmp_path / "more.h5ad")
    _, new = controls_of(demo.run, controls=str(tmp_path / "more.h5ad"))
    for cell_type, pool in new.items():
        rows = rows_of(real, CONTROL, cell_type)
        counts, others = (x[rows].toarray().astype(np.float64) for x in (real.X, further))
        total = counts.sum(1) + others.sum(1)
        assert (total > 1.5 * counts.sum(1)).all()
        expected = np.log1p(counts * 1e4 / total[:, None])
        np.testing.assert_allclose(pool.expression.toarray(), expected, atol=2e-6)  # float32 of values below 10


def test_a_pool_of_the_cache_holds_what_the_cache_says_of_its_rows(tmp_path: Path) -> None:
    groups = [small_screen("a"), small_screen("b", scale="log1p", seed=1)]
    data = read_dataset(write_cache(tmp_path / "c.zarr", groups), small_config())
    first = len(groups[0].obs)
    rows = np.sort(np.flatnonzero(data.labels.is_control)[[3, 20, 9, 27]])
    assert (rows < first).tolist() == [True, True, False, False]
    pool = cached_pool(data, rows, "any")
    assert pool.cell_type == "any" and len(pool) == 4 and pool.files.tolist() == [0, 0, 1, 1]
    obs = pd.concat([group.obs for group in groups]).iloc[rows]
    assert pool.names.tolist() == obs.index.tolist() and pool.batches.tolist() == obs["batch"].tolist()
    embeddings = np.concatenate([group.embeddings for group in groups])[rows]
    np.testing.assert_array_equal(pool.embeddings, embeddings.astype(np.float16))
    counts = groups[0].matrix.toarray().astype(np.float64)
    logged = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    expected = np.concatenate([logged, groups[1].matrix.toarray()])[rows]
    np.testing.assert_allclose(pool.expression.toarray(), expected, atol=1e-6)  # float32 of values below 10


def test_pools_of_the_cache_join_the_files_of_a_cell_type(tmp_path: Path) -> None:
    groups = [small_screen("a", cell_types=("x", "y")), small_screen("b", cell_types=("y", "z"), n_controls=3, seed=1)]
    pools = CachedPools(read_dataset(write_cache(tmp_path / "c.zarr", groups), small_config()))
    assert {name: np.bincount(pool.files, minlength=2).tolist() for name, pool in pools.items()} == {
        "x": [7, 0],
        "y": [7, 3],
        "z": [0, 3],
    }
    assert pool_of(pools, "y") is pools["y"] and pool_of({"y": pools["y"]}, None) is pools["y"]
    with pytest.raises(InputError, match=r"several cell types: x, y, z\. Pass --cell-type"):
        pool_of(pools, None)
    with pytest.raises(InputError, match=r"No control cells of cell type 'yy'\. There are: x, y, z\. Did you mean 'y'"):
        pool_of(pools, "yy")


def test_controls_of_several_contexts_are_not_pooled(
    predicted: Predict, real: ad.AnnData, names: list[str], tmp_path: Path
) -> None:
    """`context` names the cell type; a cell predicted from alpha's controls does not depend on beta's being there."""
    cells = real[real.obs["target_gene"] == CONTROL].copy()
    cells.obs = cells.obs.rename(columns={"cell_type": "context"})[["target_gene", "context"]]
    cells.write_h5ad(tmp_path / "controls.h5ad")
    both = predicted(controls=str(tmp_path / "controls.h5ad"), only=names[0], n_cells=9)
    assert both.obs.groupby(["cell_type", "target_gene"], observed=True).size().to_dict() == {
        ("alpha", names[0]): 9,
        ("alpha", CONTROL): 80,
        ("beta", names[0]): 9,
        ("beta", CONTROL): 80,
    }
    cells[cells.obs["context"] == "alpha"].write_h5ad(tmp_path / "controls.h5ad")
    alone = predicted(controls=str(tmp_path / "controls.h5ad"), only=names[0], n_cells=9)
    np.testing.assert_array_equal(both[alone.obs_names].X.toarray(), alone.X.toarray())


def test_what_can_be_refused_is_refused_before_controls_are_embedded(
    refusal: Callable[..., str], real: ad.AnnData, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embedded(*_: object) -> None:
        pytest.fail("embedded")

    monkeypatch.setattr(sest.prediction.controls, "_embed", embedded)
    monkeypatch.setattr(sest.prediction.controls, "open_cells", embedded)
    path = tmp_path / "new.h5ad"
    real.write_h5ad(path)
    asked = {"controls": str(path)}
    assert "say what to predict" in refusal(**asked)
    assert "No control cells of cell type 'betta'" in refusal(**asked, only=names[0], cell_type="betta")
    assert "no features for 1 of 1" in refusal(**asked, only="nobody")
    assert f"'{CONTROL}' is the control" in refusal(**asked, only=CONTROL)
    cells = real.copy()
    del cells.obs["target_gene"]
    cells.write_h5ad(path)
    line = refusal(**asked, only=names[0])
    assert "has no perturbation column" in line and "add a column 'target_gene'" in line


def test_genes_of_new_cells_are_found_by_name_where_the_index_is_row_numbers(
    demo: Demo, real: ad.AnnData, tmp_path: Path
) -> None:
    cells = real[:, ::-1].copy()
    cells.var = pd.DataFrame({"symbol": cells.var_names.to_numpy()}, index=list(map(str, range(cells.n_vars))))
    cells.write_h5ad(tmp_path / "new.h5ad")
    assert_same_cells(*controls_of(demo.run, controls=str(tmp_path / "new.h5ad")))


def test_all_cells_of_an_atlas_are_controls_where_that_is_said(
    demo: Demo, predicted: Predict, refusal: Callable[..., str], real: ad.AnnData, tmp_path: Path
) -> None:
    controls = real[real.obs["target_gene"] == CONTROL].copy()
    controls.write_h5ad(tmp_path / "labelled.h5ad")
    controls.obs = controls.obs.drop(columns="target_gene")
    controls.write_h5ad(tmp_path / "atlas.h5ad")
    name = next(gene for gene in real.obs["target_gene"].unique() if gene != CONTROL)
    asked = {"only": name, "cell_type": "beta", "n_cells": 9}
    line = refusal(**asked, controls=str(tmp_path / "atlas.h5ad"))
    assert "has no perturbation column" in line and "Pass --all-controls if all are" in line
    line = refusal(**asked, controls=str(tmp_path / "labelled.h5ad"), all_controls=True)
    assert "has perturbations in column 'target_gene'" in line
    assert "Pass --controls too" in refusal(**asked, all_controls=True)
    atlas = predicted(**asked, controls=str(tmp_path / "atlas.h5ad"), all_controls=True)
    labelled = predicted(**asked, controls=str(tmp_path / "labelled.h5ad"))
    np.testing.assert_array_equal(atlas.X.toarray(), labelled.X.toarray())
    assert (atlas.obs["target_gene"] == labelled.obs["target_gene"]).all()


def test_the_case_of_cells_without_labels(shared_cases: Path, tmp_path: Path) -> None:
    cells = shared_cases / "labels_scales_genes"
    cache, run = tmp_path / "c.zarr", tmp_path / "run"
    sest.embed(cells / "08-log1p-scales" / "base.h5ad", cache, encoder="pca", dim=8)
    train(cache, run, small_config(max_steps=1))
    (path,) = (cells / "13-new-cells").glob("n_nolabels.h5ad")
    config = PredictConfig(controls=str(path), all_controls=True, only="GENE0", n_cells=4)
    assert predict(run, tmp_path / "o.h5ad", config).n_predicted >= 4


# --- embeddings the files have, genes, and genes that new cells lack


@pytest.fixture(scope="module", params=["obsm:X_mine", "genes"])
def other_run(request: pytest.FixtureRequest, real: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells with an embedding of 6 columns, a cache of that or of 50 genes, and a run of one step."""
    folder = tmp_path_factory.mktemp("other")
    cells = real.copy()
    cells.obsm["X_mine"] = np.random.default_rng(0).normal(size=(real.n_obs, 6)).astype(np.float32)
    cells.write_h5ad(folder / "screen.h5ad")
    dim = 50 if request.param == "genes" else None
    embed([folder / "screen.h5ad"], folder / "cache.zarr", EmbedConfig(encoder=request.param, dim=dim))
    train(folder / "cache.zarr", folder / "run", TrainConfig(**SMALL))
    return folder


def test_new_cells_get_the_embeddings_of_the_cache_with_obsm_and_genes(other_run: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(other_run / "screen.h5ad")
    order = np.random.default_rng(0).permutation(cells.n_vars)
    cells[:, order].write_h5ad(tmp_path / "new.h5ad")
    assert_same_cells(*controls_of(other_run / "run", controls=str(tmp_path / "new.h5ad")))


@pytest.mark.parametrize("other_run", ["obsm:X_mine"], indirect=True)
def test_new_cells_need_the_same_key_and_width(other_run: Path, tmp_path: Path) -> None:
    cells = ad.read_h5ad(other_run / "screen.h5ad")
    cells.obsm["X_mine"] = cells.obsm["X_mine"][:, :5]
    cells.write_h5ad(tmp_path / "narrow.h5ad")
    with pytest.raises(InputError, match="is 5 wide; the run's cells have 6"):
        controls_of(other_run / "run", controls=str(tmp_path / "narrow.h5ad"))
    del cells.obsm["X_mine"]
    cells.write_h5ad(tmp_path / "without.h5ad")
    with pytest.raises(InputError, match=r"no obsm 'X_mine'\. There are: \(none\)"):
        controls_of(other_run / "run", controls=str(tmp_path / "without.h5ad"))


@pytest.mark.parametrize("other_run", ["obsm:X_mine"], indirect=True)
def test_new_cells_in_memory_take_their_embeddings_along(other_run: Path) -> None:
    cells = ad.read_h5ad(other_run / "screen.h5ad")
    name = next(name for name in cells.obs["target_gene"].unique() if name != CONTROL)
    asked: dict[str, Any] = {"cell_type": "beta", "n_cells": 5}
    run = sest.open_run(other_run / "run")
    mine, theirs = (run.predict([name], controls=c, **asked) for c in (cells, other_run / "screen.h5ad"))
    np.testing.assert_array_equal(mine.X.toarray(), theirs.X.toarray())


@pytest.mark.parametrize("rule", ["zero", "mean"])
def test_genes_that_new_cells_lack_are_taken_for_what_was_asked(
    other_run: Path, tmp_path: Path, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    cells, few = ad.read_h5ad(other_run / "screen.h5ad"), tmp_path / "few.h5ad"
    cells[:, 7:].write_h5ad(few)
    with pytest.raises(InputError, match=r"lacks 7 of the 300 genes of the run: .*--missing-genes zero or mean"):
        controls_of(other_run / "run", controls=str(few))
    stored, new = controls_of(other_run / "run", controls=str(few), missing_genes=rule)
    assert "few.h5ad lacks 7 of the 300 genes of the run" in caplog.text
    whole = sp.vstack([pool.expression for pool in stored.values()]).toarray()
    expected = np.zeros(7) if rule == "zero" else whole[:, :7].mean(0)
    for pool in new.values():
        np.testing.assert_allclose(pool.expression.toarray()[:, :7], np.tile(expected, (len(pool), 1)), rtol=1e-5)
        assert pool.expression.shape[1] == 300


def test_the_rule_for_missing_genes_is_kept_in_the_prediction(other_run: Path, tmp_path: Path) -> None:
    cells, few = ad.read_h5ad(other_run / "screen.h5ad"), tmp_path / "few.h5ad"
    cells[:, 7:].write_h5ad(few)
    name = next(name for name in cells.obs["target_gene"].unique() if name != CONTROL)
    asked: dict[str, Any] = {"only": name, "cell_type": "beta", "n_cells": 5, "missing_genes": "mean"}
    predict(other_run / "run", tmp_path / "p.h5ad", PredictConfig(controls=str(few), **asked))
    assert ad.read_h5ad(tmp_path / "p.h5ad").uns["sest"]["provenance"]["missing_genes"] == "mean"
    with pytest.raises(InputError, match="Pass --controls too"):
        predict(other_run / "run", tmp_path / "q.h5ad", PredictConfig(**asked))
