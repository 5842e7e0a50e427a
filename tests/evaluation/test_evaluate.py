"""Evaluation of small files against a dense second computation and cell-eval where it is installed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from helpers.two_files import GENES, PAIRS, Written, log1p, means, sest_uns, write_two_files
from sest.config import EvaluateConfig
from sest.errors import InputError
from sest.evaluation.cell_eval_scores import CONTROL, LabelledCells
from sest.evaluation.evaluate import evaluate
from sest.evaluation.metrics import discrimination_score, mean_absolute_error, pearson_delta

METRICS = ["pearson_delta", "pearson_delta_independent", "mae", "pds", "energy_distance"]


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes the two files."""
    return partial(write_two_files, tmp_path)


def test_every_score_equals_a_dense_computation_from_the_two_files(written: Callable[..., Written]) -> None:
    predicted, real = written()
    table = evaluate(predicted, real, EvaluateConfig(cell_eval=False)).table
    p, r = means(predicted, None), means(real, 1000.0)
    for cell_type in ("k562", "rpe1"):
        names = sorted(name for of, name in PAIRS if of == cell_type)
        observed = np.stack([r[cell_type, name] for name in names])
        control, own = r[cell_type, "control"], p[cell_type, "control"]
        for predictor, values, its_control in (
            ("model", np.stack([p[cell_type, name] for name in names]), own),
            ("controls", np.repeat(control[None], len(names), axis=0), control),
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
    evaluation = evaluate(*written(), EvaluateConfig(cell_eval=False))
    assert set(evaluation.table["n_predicted"]) == {6} and set(evaluation.table["n_real"]) == {9}
    assert len(evaluation.table) == 2 * len(PAIRS)
    model = evaluation.table[evaluation.table["predictor"] == "model"]
    assert evaluation.summary["mae"]["model"] == pytest.approx(model["mae"].mean())
    assert evaluation.summary["pearson_delta"]["controls"] == 0.0
    assert list(evaluation.summary) == METRICS


def test_the_real_cells_themselves_score_perfectly(written: Callable[..., Written], tmp_path: Path) -> None:
    _, real = written()
    copy = ad.read_h5ad(real)
    copy.X = sp.csr_matrix(log1p(copy.X.toarray(), 1000.0).astype(np.float32))
    copy.uns["sest"] = sest_uns()
    copy.write_h5ad(tmp_path / "perfect.h5ad")
    summary = evaluate(tmp_path / "perfect.h5ad", real, EvaluateConfig(cell_eval=False)).summary
    assert summary["mae"]["model"] < 1e-6  # float32
    assert summary["pearson_delta"]["model"] == pytest.approx(1.0)
    assert summary["pds"]["model"] == 1.0


def test_a_cell_type_whose_controls_the_prediction_lacks_is_compared_with_the_real_ones(
    written: Callable[..., Written],
) -> None:
    def drop(predicted: ad.AnnData) -> ad.AnnData:
        return predicted[~((predicted.obs.cell_type == "rpe1") & (predicted.obs.target_gene == "control"))].copy()

    predicted, real = written(change_predicted=drop)
    evaluation = evaluate(predicted, real, EvaluateConfig(cell_eval=False))
    row = evaluation.table.query("predictor == 'model' and cell_type == 'rpe1' and perturbation == 'g0'")
    p, r = means(predicted, None)["rpe1", "g0"], means(real, 1000.0)
    expected = pearson_delta(p[None], r["rpe1", "g0"][None], r["rpe1", "control"])[0]
    assert row["pearson_delta"].item() == pytest.approx(expected, abs=1e-5)
    assert any("no control cells of rpe1" in note for note in evaluation.notes)


def test_cells_in_memory_score_as_their_files_do_and_stay_as_they_are(
    written: Callable[..., Written], tmp_path: Path
) -> None:
    paths = written()
    told = evaluate(*paths, EvaluateConfig(cell_eval=False))
    predicted, real = (ad.read_h5ad(path) for path in paths)
    real.obs["target_gene"] = real.obs["target_gene"].astype(str)  # text, which writing makes categories of
    real.obs["note"] = "of no use"
    before = predicted.copy(), real.copy()
    evaluation = evaluate(predicted, real, EvaluateConfig(cell_eval=False))
    pd.testing.assert_frame_equal(evaluation.table, told.table)
    assert evaluation.summary == told.summary
    assert (evaluation.provenance["predicted"], evaluation.provenance["real"]) == ("predicted AnnData", "real AnnData")
    for now, then in zip((predicted, real), before, strict=True):
        pd.testing.assert_frame_equal(now.obs, then.obs)
        assert (now.X != then.X).nnz == 0
    every_other = evaluate(str(paths[0]), real[::2], EvaluateConfig(cell_eval=False))  # a view, beside a path as text
    assert set(every_other.table["n_real"]) == {4, 5}
    backed = evaluate(ad.read_h5ad(paths[0], backed="r"), paths[1], EvaluateConfig(cell_eval=False))
    pd.testing.assert_frame_equal(backed.table, told.table)


def test_what_is_wrong_with_cells_in_memory_is_said_of_them(written: Callable[..., Written]) -> None:
    predicted, real = (ad.read_h5ad(path) for path in written())
    with pytest.raises(InputError, match=r"^The real cells have no layer 'umi'. There are: \(none\)\.$"):
        evaluate(predicted, real, EvaluateConfig(layer="umi", cell_eval=False))
    with pytest.raises(InputError, match=r"^The predicted cells are of type ndarray; pass a path or an AnnData"):
        evaluate(predicted.X.toarray(), real, EvaluateConfig(cell_eval=False))
    with pytest.raises(InputError, match=r"^1 of the prediction's 8 genes are not in real AnnData: g3"):
        evaluate(predicted, real[:, real.var_names != "g3"], EvaluateConfig(cell_eval=False))
    real.obs["odd"] = pd.to_datetime("2020-01-01")
    with pytest.raises(InputError, match=r"^The real cells cannot be written as an .h5ad: .*Datetime"):
        evaluate(predicted, real, EvaluateConfig(cell_eval=False))


def test_cell_eval_gets_the_cells_of_one_cell_type_and_baselines_made_into_as_many(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for cell-eval records what it is given; its columns and overall scores reach table and summary."""
    labels = {"cell_type": np.array([c for c, _ in PAIRS]), "perturbation": np.array([p for _, p in PAIRS])}
    ridge = np.random.default_rng(0).uniform(1, 4, (5, 8)).astype(np.float32)
    paths = written(sest_uns(baselines={"ridge": ridge}, pairs=labels))
    calls: list[tuple[LabelledCells, dict[str, LabelledCells]]] = []

    def scores(
        real: LabelledCells, predictions: dict[str, LabelledCells], genes: list[str], threads: int
    ) -> pd.DataFrame:
        assert (genes, threads) == (GENES, 3)
        calls.append((real, predictions))
        names = sorted(set(real[1]) - {CONTROL})
        return pd.DataFrame(
            [(predictor, name, len(calls)) for predictor in predictions for name in names],
            columns=["predictor", "perturbation", "des"],
        ).astype({"des": float})

    monkeypatch.setattr("sest.evaluation.evaluate.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("sest.evaluation.evaluate.importlib.metadata.version", lambda name: "0")
    monkeypatch.setattr("sest.evaluation.evaluate.cell_eval_scores", scores)
    monkeypatch.setattr("sest.evaluation.evaluate.overall_scores", lambda table: {"ridge": 0.25})
    evaluation = evaluate(*paths, EvaluateConfig(threads=3))
    p, r = means(paths[0], None), means(paths[1], 1000.0)
    for cell_type, (real, predictions) in zip(("k562", "rpe1"), calls, strict=True):
        assert list(predictions) == ["model", "controls", "ridge"]
        names = sorted(name for of, name in PAIRS if of == cell_type)
        expected = {
            "model": [p[cell_type, name] for name in names],
            "controls": [r[cell_type, "control"]] * len(names),
            "ridge": [ridge[PAIRS.index((cell_type, name))] for name in names],
        }
        for predictor, (cells, labelled) in {"real": real, **predictions}.items():
            own = p if predictor in ("model", "ridge") else r
            wanted = expected.get(predictor, [r[cell_type, name] for name in names])
            n = 9 if predictor == "real" else 6
            assert Counter(labelled) == {CONTROL: 6 if own is p else 9, **dict.fromkeys(names, n)}
            for name, mean in {CONTROL: own[cell_type, "control"], **dict(zip(names, wanted, strict=True))}.items():
                of_name = np.asarray(cells[np.flatnonzero(labelled == name)].mean(axis=0)).ravel()
                np.testing.assert_allclose(of_name, mean, atol=1e-5)  # float32 of values up to 7
    assert evaluation.table["des"].tolist() == [1.0, 1.0, 1.0, 2.0, 2.0] * 3
    assert evaluation.summary["des"]["model"] == 1.4
    assert evaluation.summary["overall_score_over"] == {"ridge": 0.25}
    assert evaluation.provenance["cell_eval"] == "0"


def test_without_cell_eval_the_own_metrics_are_given_and_the_extra_is_named(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sest.evaluation.evaluate.importlib.util.find_spec", lambda name: None)
    evaluation = evaluate(*written())
    assert any("pip install 'sest[eval]'" in note for note in evaluation.notes)
    assert list(evaluation.summary) == METRICS


def test_a_cell_eval_that_fails_is_a_note_and_the_own_metrics_are_kept(
    written: Callable[..., Written], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes values of 15 and more for counts; a foreign prediction may have some."""

    def enlarge(predicted: ad.AnnData) -> ad.AnnData:
        predicted.X = predicted.X * 4
        return predicted

    monkeypatch.setattr("sest.evaluation.evaluate.importlib.util.find_spec", lambda name: object())
    paths = written(change_predicted=enlarge)
    evaluation = evaluate(*paths)
    assert any("cell-eval failed" in note and "below 15" in note for note in evaluation.notes)
    pd.testing.assert_frame_equal(evaluation.table, evaluate(*paths, EvaluateConfig(cell_eval=False)).table)
    assert evaluation.provenance["cell_eval"] is None
    evaluation.write(tmp_path / "out")


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
    assert des["controls"] == 0.0 < des["model"]
    assert des["oracle"] > 0.0  # stand-in cells with the model's means find some of its genes
    assert 0.0 < evaluation.summary["overall_score_over"]["controls"] < 1.0
    evaluation.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["provenance"]["cell_eval"] is not None


def test_a_cell_type_of_one_perturbation_has_no_pds_which_is_said(
    written: Callable[..., Written], tmp_path: Path
) -> None:
    predicted, real = written()
    cells = ad.read_h5ad(predicted)
    types = next(column for _, column in cells.obs.astype(str).items() if set(column) == {"k562", "rpe1"})
    names = next(column for _, column in cells.obs.astype(str).items() if "control" in set(column))
    one = next(name for of, name in PAIRS if of == "rpe1")
    cells[((types == "k562") | names.isin([one, "control"])).to_numpy()].copy().write_h5ad(tmp_path / "one.h5ad")
    scored = evaluate(tmp_path / "one.h5ad", real, EvaluateConfig(cell_eval=False))
    model = scored.table[scored.table["predictor"] == "model"]
    alone = model["cell_type"] == "rpe1"
    assert model.loc[alone, "pds"].isna().tolist() == [True]
    assert scored.summary["pds"]["model"] == pytest.approx(model.loc[~alone, "pds"].mean())
    assert [note for note in scored.notes if "rpe1: no pds" in note]


def test_counts_of_fewer_genes_are_compared_over_these(written: Callable[..., Written], tmp_path: Path) -> None:
    """Their totals are of these genes, so those of the real cells must be too; log1p values cannot be made so."""
    _, real = written()
    some = ad.read_h5ad(real)[:, GENES[:-3]].copy()
    some.write_h5ad(tmp_path / "some.h5ad")
    found = evaluate(tmp_path / "some.h5ad", real, EvaluateConfig(cell_eval=False))
    assert found.summary["mae"]["model"] == 0 and any("over the genes of the prediction" in n for n in found.notes)
    logged = ad.read_h5ad(real)
    logged.X = sp.csr_matrix(log1p(logged.X.toarray(), 1000.0).astype(np.float32))
    logged.write_h5ad(tmp_path / "logged.h5ad")
    found = evaluate(tmp_path / "some.h5ad", tmp_path / "logged.h5ad", EvaluateConfig(cell_eval=False))
    assert any("were over more of them, so that mae means nothing" in note for note in found.notes)
