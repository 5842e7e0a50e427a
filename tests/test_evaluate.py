"""Evaluation of small files against a dense second computation and cell-eval where it is installed; bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sest.evaluate
from sest.errors import InputError
from sest.evaluate import check_output, evaluate, write_results
from sest.metrics import discrimination_score, mean_absolute_error, pearson_delta

GENES = [f"g{i}" for i in range(8)]
PAIRS = [("k562", "g0"), ("k562", "g1"), ("k562", "g0+g1"), ("rpe1", "g0"), ("rpe1", "g2")]
Written = tuple[Path, Path]


def log1p(counts: np.ndarray, target_sum: float) -> np.ndarray:
    """Dense, row by row: nothing shared with the module."""
    return np.stack([np.log1p(row / row.sum() * target_sum) for row in counts.astype(np.float64)])


def cells(seed: int, n: int, extra_genes: int = 0) -> ad.AnnData:
    """Poisson counts of n cells for every pair and control; the first gene of each perturbation is 5 times higher."""
    rng = np.random.default_rng(seed)
    keys = [*PAIRS, ("k562", "control"), ("rpe1", "control")]
    obs = pd.DataFrame([key for key in keys for _ in range(n)], columns=["cell_type", "target_gene"], dtype="category")
    obs.index = [f"cell{i}" for i in range(len(obs))]
    genes = [*GENES, *(f"extra{i}" for i in range(extra_genes))]
    rate = np.full((len(obs), len(genes)), 4.0) * rng.uniform(0.5, 2, len(genes))
    for row, perturbation in enumerate(obs["target_gene"]):
        for name in set(perturbation.split("+")) & set(genes):
            rate[row, genes.index(name)] *= 5
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def sest_uns(**more: Any) -> dict[str, Any]:
    columns = {"perturbation": "target_gene", "cell_type": "cell_type", "control": "control"}
    return {"target_sum": 1000.0, "scale": "counts", "columns": columns, **more}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes a prediction as `sest predict` does (log1p, 1,000 counts a cell) and real counts with shuffled genes."""

    def write(
        uns: dict[str, Any] | None = None,
        change_real: Callable[[ad.AnnData], ad.AnnData] = lambda real: real,
        change_predicted: Callable[[ad.AnnData], ad.AnnData] = lambda predicted: predicted,
    ) -> Written:
        predicted = cells(1, 6)
        predicted.X = sp.csr_matrix(log1p(predicted.X.toarray(), 1000.0).astype(np.float32))
        predicted.uns["sest"] = sest_uns() if uns is None else uns
        real = cells(2, 9, extra_genes=3)
        real = real[:, np.random.default_rng(0).permutation(real.n_vars)].copy()
        paths = tmp_path / "predicted.h5ad", tmp_path / "real.h5ad"
        for adata, path in zip((change_predicted(predicted), change_real(real)), paths, strict=True):
            adata.write_h5ad(path)
        return paths

    return write


def means(path: Path, target_sum: float | None) -> dict[tuple[str, str], np.ndarray]:
    """Dense pseudobulks (G,) of every (cell type, perturbation)."""
    adata = ad.read_h5ad(path)
    values = adata.X.toarray() if target_sum is None else log1p(adata.X.toarray(), target_sum)
    at = [adata.var_names.get_loc(gene) for gene in GENES]
    groups = adata.obs.groupby(["cell_type", "target_gene"], observed=True).indices
    return {key: values[rows][:, at].mean(axis=0) for key, rows in groups.items()}


def test_every_score_equals_a_dense_computation_from_the_two_files(written: Callable[..., Written]) -> None:
    predicted, real = written()
    table = evaluate(predicted, real, with_cell_eval=False).table
    p, r = means(predicted, None), means(real, 1000.0)
    for cell_type in ("k562", "rpe1"):
        names = sorted(name for of, name in PAIRS if of == cell_type)
        observed = np.stack([r[cell_type, name] for name in names])
        control, own = r[cell_type, "control"], p[cell_type, "control"]
        for predictor, values, its_control in (
            ("model", np.stack([p[cell_type, name] for name in names]), own),
            ("context_mean", np.repeat(control[None], len(names), axis=0), control),
        ):
            rows = table[(table["cell_type"] == cell_type) & (table["predictor"] == predictor)]
            assert rows["perturbation"].tolist() == names
            expected = {
                "pearson_delta": pearson_delta(values, observed, control, its_control),
                "mae": mean_absolute_error(values, observed),
                "pds": discrimination_score(values, observed, control, names, GENES, its_control),
            }
            for metric, numbers in expected.items():  # cells are float32: 1e-6 of values up to 7
                np.testing.assert_allclose(rows[metric], numbers, atol=1e-5, err_msg=f"{predictor} {metric}")


def test_the_table_counts_cells_and_the_summary_is_the_mean_over_pairs(written: Callable[..., Written]) -> None:
    evaluation = evaluate(*written(), with_cell_eval=False)
    assert set(evaluation.table["n_predicted"]) == {6} and set(evaluation.table["n_real"]) == {9}
    assert len(evaluation.table) == 2 * len(PAIRS)
    model = evaluation.table[evaluation.table["predictor"] == "model"]
    assert evaluation.summary["mae"]["model"] == pytest.approx(model["mae"].mean())
    assert evaluation.summary["pearson_delta"]["context_mean"] == 0.0
    assert list(evaluation.summary) == ["pearson_delta", "mae", "pds"]


def test_reading_in_many_blocks_changes_nothing(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = written()
    whole = evaluate(*paths, with_cell_eval=False).table
    monkeypatch.setattr(sest.evaluate, "BLOCK", 5)
    pd.testing.assert_frame_equal(evaluate(*paths, with_cell_eval=False).table, whole, rtol=1e-12)


def test_the_real_cells_themselves_score_perfectly(written: Callable[..., Written], tmp_path: Path) -> None:
    _, real = written()
    copy = ad.read_h5ad(real)
    copy.X = sp.csr_matrix(log1p(copy.X.toarray(), 1000.0).astype(np.float32))
    copy.uns["sest"] = sest_uns()
    copy.write_h5ad(tmp_path / "perfect.h5ad")
    summary = evaluate(tmp_path / "perfect.h5ad", real, with_cell_eval=False).summary
    assert summary["mae"]["model"] < 1e-6  # float32
    assert summary["pearson_delta"]["model"] == pytest.approx(1.0)
    assert summary["pds"]["model"] == 1.0


def test_stored_baselines_are_matched_by_their_labels(written: Callable[..., Written]) -> None:
    _, real = written()
    r = means(real, 1000.0)
    order = PAIRS[::-1]
    truth = np.stack([r[pair] for pair in order]).astype(np.float32)
    labels = {"cell_type": np.array([c for c, _ in order]), "perturbation": np.array([p for _, p in order])}
    wrong = np.zeros_like(truth)
    uns = sest_uns(baselines={"ridge": truth, "perturbation_mean": truth + 0.5, "context_mean": wrong}, pairs=labels)
    summary = evaluate(*written(uns), with_cell_eval=False).summary
    assert list(summary["mae"]) == ["model", "context_mean", "perturbation_mean", "ridge"]
    assert summary["mae"]["ridge"] < 1e-6
    assert summary["mae"]["perturbation_mean"] == pytest.approx(0.5, abs=1e-6)
    assert summary["mae"]["context_mean"] < 1.0  # of the real controls, never the stored one (all zeros)


def test_stored_baselines_that_lack_a_pair_are_refused(written: Callable[..., Written]) -> None:
    labels = {"cell_type": np.array(["k562"]), "perturbation": np.array(["g0"])}
    uns = sest_uns(baselines={"ridge": np.ones((1, 8), np.float32)}, pairs=labels)
    with pytest.raises(InputError, match="baseline 'ridge' lacks 4 of its pairs"):
        evaluate(*written(uns), with_cell_eval=False)


@pytest.mark.parametrize(
    "values", [np.ones((5, 7), np.float32), np.full((5, 8), np.nan, np.float32)], ids=["another width", "NaN"]
)
def test_stored_baselines_of_another_width_or_with_nan_are_refused(
    written: Callable[..., Written], values: np.ndarray
) -> None:
    labels = {"cell_type": np.array([c for c, _ in PAIRS]), "perturbation": np.array([p for _, p in PAIRS])}
    uns = sest_uns(baselines={"ridge": values}, pairs=labels)
    with pytest.raises(InputError, match="'ridge' is not 5 x 8 finite numbers"):
        evaluate(*written(uns), with_cell_eval=False)


def test_log1p_real_cells_are_used_as_they_are_and_that_is_said(written: Callable[..., Written]) -> None:
    def to_log1p(real: ad.AnnData) -> ad.AnnData:
        real.X = sp.csr_matrix(log1p(real.X.toarray(), 1000.0).astype(np.float32))
        return real

    from_counts = evaluate(*written(), with_cell_eval=False)
    from_log1p = evaluate(*written(change_real=to_log1p), with_cell_eval=False)
    pd.testing.assert_frame_equal(from_log1p.table, from_counts.table, rtol=1e-5, atol=1e-6)
    assert any("log1p values: they are used as they are" in note for note in from_log1p.notes)
    assert from_log1p.provenance["real_counts_normalised_to"] is None


def test_a_layer_of_the_real_file_is_read_when_asked(written: Callable[..., Written]) -> None:
    def to_layer(real: ad.AnnData) -> ad.AnnData:
        real.layers["umi"] = real.X.copy()
        real.X = sp.csr_matrix(np.full(real.shape, 0.5, dtype=np.float32))
        return real

    from_x = evaluate(*written(), with_cell_eval=False).table
    from_layer = evaluate(*written(change_real=to_layer), layer="umi", with_cell_eval=False).table
    pd.testing.assert_frame_equal(from_layer, from_x)


def test_a_foreign_prediction_is_read_by_detection_and_the_default_normalisation_is_said(
    written: Callable[..., Written],
) -> None:
    def forget(predicted: ad.AnnData) -> ad.AnnData:
        del predicted.uns["sest"]
        return predicted

    paths = written(change_predicted=forget)
    told = evaluate(*written(), with_cell_eval=False).table
    paths = written(change_predicted=forget)
    pd.testing.assert_frame_equal(evaluate(*paths, target_sum=1000.0, with_cell_eval=False).table, told)
    assert any("normalised to 10000" in note for note in evaluate(*paths, with_cell_eval=False).notes)


def test_another_target_sum_than_the_prediction_s_is_refused(written: Callable[..., Written]) -> None:
    with pytest.raises(InputError, match="normalised to 1000 counts a cell, not 10000"):
        evaluate(*written(), target_sum=10_000.0, with_cell_eval=False)


def test_counts_cannot_be_compared_with_a_log1p_source_of_unknown_normalisation(
    written: Callable[..., Written],
) -> None:
    paths = written(uns={**sest_uns(), "scale": "log1p"})
    with pytest.raises(InputError, match="pass --target-sum"):
        evaluate(*paths, with_cell_eval=False)
    assert evaluate(*paths, target_sum=1000.0, with_cell_eval=False).provenance["real_counts_normalised_to"] == 1000.0


def test_labels_of_the_real_file_may_differ_from_the_prediction_s(written: Callable[..., Written]) -> None:
    def rename(real: ad.AnnData) -> ad.AnnData:
        real.obs = real.obs.rename(columns={"target_gene": "guide", "cell_type": "line"})
        real.obs["guide"] = real.obs["guide"].cat.rename_categories({"control": "NT-9"})
        return real

    told = evaluate(*written(), with_cell_eval=False).table
    paths = written(change_real=rename)
    renamed = evaluate(*paths, pert_col="guide", cell_type_col="line", control="NT-9", with_cell_eval=False).table
    pd.testing.assert_frame_equal(renamed, told)


def test_genes_are_found_in_another_var_column(written: Callable[..., Written]) -> None:
    def hide(real: ad.AnnData) -> ad.AnnData:
        real.var["symbol"] = real.var_names
        real.var_names = [f"ENSG{i:011d}" for i in range(real.n_vars)]
        return real

    told = evaluate(*written(), with_cell_eval=False).table
    pd.testing.assert_frame_equal(evaluate(*written(change_real=hide), with_cell_eval=False).table, told)


def test_missing_genes_are_named(written: Callable[..., Written]) -> None:
    paths = written(change_real=lambda real: real[:, [name != "g3" for name in real.var_names]].copy())
    with pytest.raises(InputError, match=r"1 of the prediction's 8 genes are not in .*: g3"):
        evaluate(*paths, with_cell_eval=False)


def test_pairs_without_real_cells_are_named(written: Callable[..., Written]) -> None:
    paths = written(
        change_real=lambda real: real[~((real.obs.cell_type == "rpe1") & (real.obs.target_gene == "g2"))].copy()
    )
    with pytest.raises(InputError, match=r"1 predicted pairs .*: rpe1/g2"):
        evaluate(*paths, with_cell_eval=False)


def test_cell_types_without_real_controls_are_named(written: Callable[..., Written]) -> None:
    paths = written(
        change_real=lambda real: real[~((real.obs.cell_type == "rpe1") & (real.obs.target_gene == "control"))].copy()
    )
    with pytest.raises(InputError, match="no control cells of cell types in the prediction: rpe1"):
        evaluate(*paths, with_cell_eval=False)


def test_real_cells_that_were_not_predicted_do_not_matter(written: Callable[..., Written]) -> None:
    def fewer(predicted: ad.AnnData) -> ad.AnnData:
        return predicted[predicted.obs.cell_type == "k562"].copy()

    some = evaluate(*written(change_predicted=fewer), with_cell_eval=False).table
    every = evaluate(*written(), with_cell_eval=False).table
    of_k562 = every[every["cell_type"] == "k562"].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, of_k562)


def test_a_cell_type_whose_controls_the_prediction_lacks_is_compared_with_the_real_ones(
    written: Callable[..., Written],
) -> None:
    def drop(predicted: ad.AnnData) -> ad.AnnData:
        return predicted[~((predicted.obs.cell_type == "rpe1") & (predicted.obs.target_gene == "control"))].copy()

    predicted, real = written(change_predicted=drop)
    evaluation = evaluate(predicted, real, with_cell_eval=False)
    row = evaluation.table.query("predictor == 'model' and cell_type == 'rpe1' and perturbation == 'g0'")
    p, r = means(predicted, None)["rpe1", "g0"], means(real, 1000.0)
    expected = pearson_delta(p[None], r["rpe1", "g0"][None], r["rpe1", "control"])[0]
    assert row["pearson_delta"].item() == pytest.approx(expected, abs=1e-5)
    assert any("no control cells of rpe1" in note for note in evaluation.notes)


def test_files_without_cell_types_are_one_cell_type(written: Callable[..., Written]) -> None:
    def forget(adata: ad.AnnData) -> ad.AnnData:
        adata = adata[adata.obs.cell_type == "k562"].copy()
        adata.obs = adata.obs[["target_gene"]]
        adata.uns.clear()
        return adata

    told = evaluate(*written(), with_cell_eval=False).table
    table = evaluate(*written(None, forget, forget), target_sum=1000.0, with_cell_eval=False).table
    assert set(table["cell_type"]) == {"unknown"}
    of_k562 = told[told["cell_type"] == "k562"].reset_index(drop=True).assign(cell_type="unknown")
    pd.testing.assert_frame_equal(table, of_k562)


def test_a_prediction_of_several_cell_types_needs_those_of_the_real_cells(written: Callable[..., Written]) -> None:
    def forget(real: ad.AnnData) -> ad.AnnData:
        real.obs = real.obs[["target_gene"]]
        return real

    with pytest.raises(InputError, match="no cell type column; the prediction has k562, rpe1"):
        evaluate(*written(change_real=forget), with_cell_eval=False)


def test_links_in_the_prediction_s_record_are_not_followed(written: Callable[..., Written]) -> None:
    predicted, real = written()
    with h5py.File(predicted, "r+") as file:
        file["uns/sest/elsewhere"] = h5py.ExternalLink("/etc/hostname", "/")
    with pytest.raises(InputError, match="elsewhere is a link"):
        evaluate(predicted, real, with_cell_eval=False)


def test_a_damaged_record_in_the_prediction_is_named(written: Callable[..., Written]) -> None:
    uns = sest_uns()
    del uns["columns"]["control"]
    with pytest.raises(InputError, match="no columns/control"):
        evaluate(*written(uns), with_cell_eval=False)


def test_without_cell_eval_the_own_metrics_are_given_and_the_extra_is_named(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sest.evaluate.importlib.util.find_spec", lambda name: None)
    evaluation = evaluate(*written())
    assert any("pip install 'sest[eval]'" in note for note in evaluation.notes)
    assert list(evaluation.summary) == ["pearson_delta", "mae", "pds"]


def test_a_cell_eval_that_fails_is_a_note_and_the_own_metrics_are_kept(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes values of 15 and more for counts; a foreign prediction may have some."""

    def enlarge(predicted: ad.AnnData) -> ad.AnnData:
        predicted.X = predicted.X * 4
        return predicted

    monkeypatch.setattr("sest.evaluate.importlib.util.find_spec", lambda name: object())
    paths = written(change_predicted=enlarge)
    evaluation = evaluate(*paths)
    assert any("cell-eval failed" in note and "below 15" in note for note in evaluation.notes)
    pd.testing.assert_frame_equal(evaluation.table, evaluate(*paths, with_cell_eval=False).table)
    assert evaluation.provenance["cell_eval"] is None
    write_results(evaluation, tmp_path / "out")


def test_results_are_written_together_and_the_same_each_time(written: Callable[..., Written], tmp_path: Path) -> None:
    paths = written()
    outs = tmp_path / "deep" / "a", tmp_path / "b"
    outs[1].mkdir()  # an empty folder is fine
    for out in outs:
        write_results(evaluate(*paths, with_cell_eval=False), out)
        assert sorted(path.name for path in out.iterdir()) == ["results.csv", "summary.json"]
    for name in ("results.csv", "summary.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    summary = json.loads((outs[0] / "summary.json").read_text())
    assert list(summary) == ["metrics", "notes", "provenance"]
    table = pd.read_csv(outs[0] / "results.csv")
    model = table[table["predictor"] == "model"]
    assert summary["metrics"]["pds"]["model"] == pytest.approx(model["pds"].mean())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_with_content_is_not_written_into(written: Callable[..., Written], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        write_results(evaluate(*written(), with_cell_eval=False), out)
    with pytest.raises(InputError, match="not an empty folder"):
        check_output(out / "notes.txt")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.filterwarnings("ignore")  # cell-eval and its dependencies warn of their own deprecations
def test_cell_eval_agrees_with_our_mae_and_pds_and_knows_that_controls_have_no_effect(
    shared_data: Path, tmp_path: Path
) -> None:
    """Real K562 cells: half of them play the prediction. float32 in cell-eval: 1e-5."""
    pytest.importorskip("cell_eval")
    adata = ad.read_h5ad(shared_data / "perturbench_devel.h5ad")
    named = ["KLF1", "SLC38A2", "CEBPE+RUNX1T1", "PTPN12+PTPN9", "TMSB4X", "control"]
    adata = adata[(adata.obs.cell_type == "k562") & adata.obs.target_gene.isin(named)].copy()
    adata = ad.AnnData(
        sp.csr_matrix(adata.X, dtype=np.float32),
        obs=adata.obs[["cell_type", "target_gene"]].astype(str),
        var=pd.DataFrame(index=adata.var_names),
    )
    half = np.random.default_rng(0).random(adata.n_obs) < 0.5
    pairs = {"cell_type": np.repeat("k562", len(named) - 1), "perturbation": np.array(named[:-1])}
    rows = [half & (adata.obs.target_gene == name).to_numpy() for name in named[:-1]]
    stored = np.stack([np.asarray(adata.X[np.flatnonzero(at)].mean(axis=0)).ravel() for at in rows])
    adata.uns["sest"] = sest_uns(scale="log1p", pairs=pairs, baselines={"oracle": stored.astype(np.float32)})
    adata[half].copy().write_h5ad(tmp_path / "predicted.h5ad")
    adata[~half].copy().write_h5ad(tmp_path / "real.h5ad")
    evaluation = evaluate(tmp_path / "predicted.h5ad", tmp_path / "real.h5ad")
    table = evaluation.table
    np.testing.assert_allclose(table["cell_eval_mae"], table["mae"], atol=1e-5)
    np.testing.assert_allclose(table["cell_eval_pds"], table["pds"], atol=1e-9)
    des = evaluation.summary["des"]
    assert des["context_mean"] == 0.0 < des["model"]
    assert des["oracle"] > 0.0  # stand-in cells with the model's means find some of its genes
    assert 0.0 < evaluation.summary["overall_score_over"]["context_mean"] < 1.0
    write_results(evaluation, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["provenance"]["cell_eval"] is not None
