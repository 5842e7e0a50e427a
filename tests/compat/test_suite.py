"""The challenge's packages as `sest evaluate --suite` runs them: scores, refusals, and what is refused before."""

from __future__ import annotations

import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Demo

from helpers.notes import Notes
from sest.compat import suite
from sest.compat.suite import COLUMNS, MEMBERS, OVERALL, SCORES, score_suite
from sest.config import EvaluateConfig, PredictConfig
from sest.errors import InputError
from sest.prediction.predict import predict
from sest.progress import reporting

NAMES = 6


@pytest.fixture(scope="module")
def folder(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """real.h5ad with contexts A and B; F.h5ad, a submission of 2026; P.h5ad, one of 2025 in one cell type."""
    folder = tmp_path_factory.mktemp("suite")
    cells = ad.read_h5ad(demo.cells)
    control = str(cells.obs["target_gene"].value_counts().index[0])
    cells.obs["target_gene"] = cells.obs["target_gene"].astype(str).replace(control, "non-targeting")
    cells.obs["context"] = cells.obs["cell_type"].astype(str).map({"alpha": "A", "beta": "B"})
    cells.write_h5ad(folder / "real.h5ad")
    cells[cells.obs["target_gene"] == "non-targeting"].copy().write_h5ad(folder / "controls.h5ad")
    names = tuple(sorted(set(cells.obs["target_gene"]) - {"non-targeting"})[:NAMES])
    made = PredictConfig(format="vcc2026", controls=str(folder / "controls.h5ad"), only=names, n_cells=40)
    predict(demo.run, folder / "F.h5ad", made)
    predict(demo.run, folder / "P.h5ad", PredictConfig(format="vcc2025", only=names, cell_type="beta", n_cells=40))
    return folder


def program(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_scores_of_2026_stand_between_mean_response_and_replicate(folder: Path, tmp_path: Path) -> None:
    """Recomputed from the measured values: (u - b) / (r - b), but for the member that is cut to 0 and 1."""
    program("cell-eval2")
    results = score_suite(folder / "F.h5ad", folder / "real.h5ad", "vcc2026", tmp_path, EvaluateConfig())
    assert [result.context for result in results] == ["A", "B"]
    whole = pd.read_csv(tmp_path / SCORES)
    assert list(whole.columns) == ["context", *COLUMNS]
    for result in results:
        if result.failed:  # the package finds no effect in these few cells
            assert result.context not in set(whole["context"])
            continue
        table = result.table.set_index("metric")
        assert list(table.index) == [*MEMBERS["vcc2026"], OVERALL]
        for name in set(MEMBERS["vcc2026"]) - {"expr_mse_unbiased_capped_norm"}:
            row = table.loc[name]
            for who, score in (("prediction", "score"), ("controls", "score_of_controls")):
                expected = (row[who] - row["baseline"]) / (row["replicate"] - row["baseline"])
                assert row[score] == pytest.approx(expected, abs=1e-6) or row[score] == pytest.approx(-6)
        assert table.loc[OVERALL, "score"] == pytest.approx(table["score"][:-1].mean())
        assert {"model", "controls"} <= set(result.own.summary["mae"])


def test_scores_of_2025_are_over_the_mean_of_all_cells(folder: Path, tmp_path: Path) -> None:
    program("cell-eval")
    (result,) = score_suite(
        folder / "P.h5ad", folder / "real.h5ad", "vcc2025", tmp_path, EvaluateConfig(cell_type_col="cell_type")
    )
    assert result.context == "beta" and not result.failed
    table = result.table.set_index("metric")
    for name, best in (("overlap_at_N", 1.0), ("discrimination_score_l1", 1.0), ("mae", 0.0)):
        row = table.loc[name]
        expected = max((row["prediction"] - row["baseline"]) / (best - row["baseline"]), 0.0)
        assert row["score"] == pytest.approx(expected, abs=1e-6)
    assert result.own.summary["pds"]["model"] == pytest.approx(table.loc["discrimination_score_l1", "prediction"])


def test_what_a_package_refuses_is_said_and_what_sest_measured_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "cell-eval2"
    script.write_text(f"#!{sys.executable}\nraise ValueError('no measurable\\taggregate effect')\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr("shutil.which", lambda name, path=None: str(script))
    out = tmp_path / "out"
    out.mkdir()
    results = score_suite(folder / "F.h5ad", folder / "real.h5ad", "vcc2026", out, EvaluateConfig())
    assert [result.failed for result in results] == ["ValueError: no measurable aggregate effect"] * 2
    assert pd.read_csv(out / SCORES).empty
    for result in results:
        assert (out / "contexts" / result.context / "sest" / "summary.json").is_file()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]  # the pairs are gone


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: "never-run")
    real = ad.read_h5ad(folder / "real.h5ad")

    def refused(cells: ad.AnnData, **options: Any) -> str:
        cells.write_h5ad(tmp_path / "real.h5ad")
        with pytest.raises(InputError) as error:
            score_suite(folder / "F.h5ad", tmp_path / "real.h5ad", "vcc2026", tmp_path, EvaluateConfig(**options))
        return str(error.value)

    assert "lacks 1 of the" in refused(real[:, 1:].copy())
    assert "has no column 'guide'" in refused(real.copy(), pert_col="guide")
    assert "has no control cells: none is 'ctrl'" in refused(real.copy(), control="ctrl")
    elsewhere = real.copy()
    elsewhere.obs["context"] = "C"
    assert "no cells of the contexts A, B. It has: C" in refused(elsewhere)
    unnamed = real.copy()
    unnamed.obs = unnamed.obs[["target_gene"]]
    assert "REAL names none" in refused(unnamed)
    last = max(set(real.obs["target_gene"].astype(str)) - {"non-targeting"})
    others = real[real.obs["target_gene"].isin(["non-targeting", last])].copy()
    assert "No perturbation is both predicted and real" in refused(others)


def test_cells_of_no_effect_are_the_controls(folder: Path, tmp_path: Path) -> None:
    real = ad.read_h5ad(folder / "real.h5ad")
    predicted = ad.read_h5ad(folder / "F.h5ad")
    predicted, real = (cells[cells.obs["context"] == "A"].copy() for cells in (predicted, real))
    pair = suite._write_pair(tmp_path, predicted, real, "target_gene", "non-targeting", "vcc2026", 0)
    cells = {name: ad.read_h5ad(path) for name, path in pair.items()}
    assert len({tuple(c.var_names) for c in cells.values()}) == 1
    assert len({frozenset(c.obs["target_gene"]) for c in cells.values()}) == 1
    unmoved = cells["controls"]
    rows = {row.tobytes() for row in real[real.obs["target_gene"] == "non-targeting"].X.toarray().astype(np.float32)}
    assert all(row.tobytes() in rows for row in unmoved.X.toarray().astype(np.float32))
    sizes = [
        c.obs["target_gene"].value_counts().drop("non-targeting").to_dict() for c in (cells["prediction"], unmoved)
    ]
    assert sizes[0] == sizes[1] == dict.fromkeys(sizes[0], 40)


def test_contexts_without_real_cells_are_left_out_and_said() -> None:
    ours = pd.DataFrame({"context": ["A", "B", "A"]})
    notes = Notes()
    with reporting(notes):
        parts = suite._contexts(ours, pd.DataFrame({"context": ["B", "A", "A"]})[1:], None)
    assert list(parts) == ["A"] and parts["A"][0].tolist() == [0, 2] and parts["A"][1].tolist() == [0, 1]
    assert any("no cells of the contexts B: they are not scored" in note for note in notes.notes)
