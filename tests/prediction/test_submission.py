"""Submissions to the challenge of 2026: what the challenge's own clients take, and what is refused before any work."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zstandard
from conftest import Demo

import sest
from helpers.demo_cells import CONTROL
from helpers.notes import Notes
from sest.config import PredictConfig
from sest.prediction import submission
from sest.prediction.predict import predict
from sest.progress import reporting


def client(name: str) -> str:
    """A program of the challenge, as it was installed: beside Python, or on the way there.

    vcc is among what tests install. cell-eval2 brings 40 packages: it is where somebody installed sest[challenge].
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None and name == "cell-eval2":
        pytest.skip("cell-eval2 is not installed (sest[challenge])")
    assert found is not None, f"{name} is not installed"
    return found


@pytest.fixture(scope="module")
def bundle(demo: Demo, real: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the challenge hands out: control cells of contexts A and B, genes with a header, a bare list; real cells."""
    folder = tmp_path_factory.mktemp("bundle")
    cells = real.copy()
    cells.obs["target_gene"] = cells.obs["target_gene"].astype(str).replace(CONTROL, "non-targeting").astype("category")
    cells.obs["context"] = cells.obs["cell_type"].astype(str).map({"alpha": "A", "beta": "B"}).astype("category")
    cells.obs = cells.obs[["target_gene", "context"]]
    extra = ad.AnnData(np.ones((cells.n_obs, 1), np.float32), obs=cells.obs)
    extra.var_names = ["NEWGENE"]
    cells = ad.concat([cells, extra], axis=1, merge="first")
    for context in ("A", "B"):
        cells[cells.obs["context"] == context].copy().write_h5ad(folder / f"real{context}.h5ad")
    cells[cells.obs["target_gene"] == "non-targeting"].copy().write_h5ad(folder / "controls.h5ad")
    names = list(reversed(cells.var_names))
    (folder / "gene_names.csv").write_text("\n".join(["gene_name", *names]) + "\n")
    wanted = sorted(set(cells.obs["target_gene"]) - {"non-targeting"})
    (folder / "pert_counts.csv").write_text("\n".join(["target_gene", *wanted]) + "\n")
    return folder


def options(bundle: Path, **changes: Any) -> PredictConfig:
    values: dict[str, Any] = {
        "format": "vcc2026",
        "controls": str(bundle / "controls.h5ad"),
        "genes": str(bundle / "gene_names.csv"),
        "list": str(bundle / "pert_counts.csv"),
    }
    return PredictConfig(**values | changes)


@pytest.fixture(scope="module")
def submitted(demo: Demo, bundle: Path) -> Path:
    """F.h5ad, and copies/ with control cells."""
    predict(demo.run, bundle / "F.h5ad", options(bundle, with_controls=str(bundle / "copies")))
    return bundle


def test_every_context_has_400_cells_of_every_perturbation_and_no_control(submitted: Path) -> None:
    cells = ad.read_h5ad(submitted / "F.h5ad")
    wanted = (submitted / "pert_counts.csv").read_text().split()[1:]
    sizes = cells.obs.astype(str).groupby(["context", "target_gene"]).size()
    assert sizes.to_dict() == {(context, name): 400 for context in "AB" for name in wanted}
    assert list(cells.obs.columns) == ["target_gene", "context"] and cells.obs_names.is_unique
    assert list(cells.var_names) == (submitted / "gene_names.csv").read_text().split()[1:]
    assert cells.X.dtype == np.float32 and (cells.X.data == np.rint(cells.X.data)).all() and cells.X.data.min() >= 1


def test_counts_are_as_deep_as_the_controls_and_a_gene_the_run_lacks_keeps_theirs(submitted: Path) -> None:
    cells, controls = ad.read_h5ad(submitted / "F.h5ad"), ad.read_h5ad(submitted / "controls.h5ad")
    for context in "AB":
        mine, theirs = (np.asarray(x[x.obs["context"] == context].X.sum(1)).ravel() for x in (cells, controls))
        assert abs(mine.mean() / theirs.mean() - 1) < 0.1 and abs(mine.std() / theirs.std() - 1) < 0.3
    assert (cells[:, "NEWGENE"].X.toarray() == 1).all()  # as in every control cell


def test_without_an_effect_every_cell_is_a_control_cell(demo: Demo, submitted: Path, tmp_path: Path) -> None:
    name = (submitted / "pert_counts.csv").read_text().split()[1]
    predict(demo.run, tmp_path / "a.h5ad", options(submitted, blend="controls", list=None, only=name))
    cells, controls = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(submitted / "controls.h5ad")
    for context in "AB":
        mine, theirs = (x[x.obs["context"] == context][:, cells.var_names].X.toarray() for x in (cells, controls))
        assert {row.tobytes() for row in mine.astype(np.float32)} <= {
            row.tobytes() for row in theirs.astype(np.float32)
        }


def test_the_bulk_moves_by_the_predicted_fold_changes(demo: Demo, submitted: Path, tmp_path: Path) -> None:
    """The log1p prediction of the same blend, another code, says how far; genes of many counts: exp of the effect."""
    name = (submitted / "pert_counts.csv").read_text().split()[1]
    given: dict[str, Any] = {"list": None, "only": name, "blend": "stack", "n_cells": 2000, "cell_type": "B"}
    predict(demo.run, tmp_path / "counts.h5ad", options(submitted, **given))
    predict(demo.run, tmp_path / "log1p.h5ad", options(submitted, format="log1p", **given))
    counts, log1p = (ad.read_h5ad(tmp_path / f"{which}.h5ad") for which in ("counts", "log1p"))
    controls = ad.read_h5ad(submitted / "controls.h5ad")
    controls = controls[controls.obs["context"] == "B"][:, counts.var_names]
    depth = np.asarray(controls.X.sum(1)).ravel()
    is_control = (log1p.obs["target_gene"] != name).to_numpy()
    effect = np.asarray(log1p.X[~is_control].mean(0) - log1p.X[is_control].mean(0)).ravel()
    bulk, before = (np.asarray(x.X.mean(0)).ravel() for x in (counts, controls))
    many = before > 0.0005 * depth.mean()
    assert many.sum() > 20 and np.ptp(effect[many]) > 0.1
    assert np.corrcoef(np.log(bulk[many] / before[many]), effect[many])[0, 1] > 0.9


def test_copies_have_the_same_cells_and_the_controls_count_for_count(submitted: Path) -> None:
    whole, controls = ad.read_h5ad(submitted / "F.h5ad"), ad.read_h5ad(submitted / "controls.h5ad")
    for context in "AB":
        copy = ad.read_h5ad(submitted / "copies" / f"{context}.h5ad")
        is_control = (copy.obs["target_gene"] == "non-targeting").to_numpy()
        mine, theirs = whole[whole.obs["context"] == context], controls[controls.obs["context"] == context]
        np.testing.assert_array_equal(copy.X[~is_control].toarray(), mine.X.toarray())
        np.testing.assert_array_equal(copy.X[is_control].toarray(), theirs[:, copy.var_names].X.toarray())


def test_a_submission_without_copies_has_the_same_cells_and_the_seed_decides(
    demo: Demo, submitted: Path, tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        predict(demo.run, tmp_path / f"{name}.h5ad", options(submitted, seed=seed))
    first, again, other = (ad.read_h5ad(path).X for path in (
        submitted / "F.h5ad", tmp_path / "again.h5ad", tmp_path / "other.h5ad"))  # fmt: skip
    assert (first != again).nnz == 0 and (first != other).nnz > 0


def test_vcc_prep_takes_it_unchanged(submitted: Path, tmp_path: Path) -> None:
    n_genes = len((submitted / "gene_names.csv").read_text().split()) - 1
    command: list[str | Path] = [client("vcc"), "prep", submitted / "F.h5ad", "--perts", submitted / "pert_counts.csv"]
    command += ["--genes", submitted / "gene_names.csv", "--contexts", "A,B", "--expected-gene-dim", str(n_genes)]
    done = subprocess.run([*command, "-o", tmp_path / "F.vcc"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "F.vcc").stat().st_size > 0, done.stdout + done.stderr
    assert "counts-preserved" in done.stdout + done.stderr


def test_a_package_is_the_one_that_vcc_prep_makes(demo: Demo, submitted: Path, tmp_path: Path) -> None:
    """The client's own reader of packages, and the cells inside of both."""
    from vcc.vccfile import contexts_from_vcc, nnz_from_vcc, read_vcc_meta, validate_vcc

    ours, theirs, n_genes = tmp_path / "ours.vcc", tmp_path / "theirs.vcc", ad.read_h5ad(submitted / "F.h5ad").n_vars
    predict(demo.run, tmp_path / "F.h5ad", options(submitted, vcc=str(ours)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["F.h5ad", "ours.vcc"]
    prep: list[str | Path] = [client("vcc"), "prep", tmp_path / "F.h5ad", "-o", theirs, "--contexts", "A,B"]
    prep += ["--perts", submitted / "pert_counts.csv", "--genes", submitted / "gene_names.csv"]
    subprocess.run([*prep, "--expected-gene-dim", str(n_genes)], capture_output=True, check=True)
    validate_vcc(ours)
    mine, other = (read_vcc_meta(path) or {} for path in (ours, theirs))
    assert mine.pop("made_by").startswith("sest ") and other.pop("cli_version") and mine == other
    assert (contexts_from_vcc(ours), nnz_from_vcc(ours)) == (("A", "B"), nnz_from_vcc(theirs))
    cells = []
    for path in (ours, theirs):
        with tarfile.open(path) as tar:
            assert tar.getnames() == ["meta.json", "pred.h5ad.zst"]
            assert {(member.uid, member.gid, member.uname, member.mtime) for member in tar} == {(0, 0, "", 0)}
            member = tar.extractfile("pred.h5ad.zst")
            assert member is not None
            with open(tmp_path / "cells.h5ad", "wb") as file:
                zstandard.ZstdDecompressor().copy_stream(member, file)
        cells.append(ad.read_h5ad(tmp_path / "cells.h5ad"))
    assert (cells[0].X != cells[1].X).nnz == 0 and cells[0].X.dtype == cells[1].X.dtype and not cells[0].uns
    assert cells[0].obs.astype(str).to_numpy().tolist() == cells[1].obs.astype(str).to_numpy().tolist()
    assert list(cells[0].obs) == list(cells[1].obs) and cells[0].var_names.equals(cells[1].var_names)


def test_a_package_says_when_its_cells_are_not_as_many_as_the_challenge_asks_for(
    demo: Demo, submitted: Path, tmp_path: Path
) -> None:
    with reporting(notes := Notes()):
        predict(demo.run, tmp_path / "F.h5ad", options(submitted, n_cells=3, vcc=str(tmp_path / "F.vcc")))
    assert any("takes 400 cells of each" in note and "some have 3" in note for note in notes.notes)


def test_what_makes_no_package_is_refused(
    refusal: Callable[..., str], submitted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = options(submitted).to_values()
    given = {name: value for name, value in given.items() if value is not None}
    assert "does not end in .vcc" in refusal(**given, vcc="package.tar")
    bare = {name: value for name, value in given.items() if name not in ("genes", "list")}
    for fewer in (bare | {"list": given["list"]}, bare | {"genes": given["genes"], "all_perturbations": True}):
        assert "pass --format vcc2026, --genes gene_names.csv and --list" in refusal(**fewer, vcc="F.vcc")
    (tmp_path / "there.vcc").write_text("mine")
    assert "--force" in refusal(**given, vcc=str(tmp_path / "there.vcc"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sest[challenge]'" in refusal(**given, vcc=str(tmp_path / "new.vcc"))


def test_cell_eval2_scores_a_copy(submitted: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        client("cell-eval2"),
        "run",
        "-ap",
        submitted / "copies" / "B.h5ad",
        "--preset",
        "vcc2026",
    ]
    real = ad.read_h5ad(submitted / "realB.h5ad")
    real[:, ad.read_h5ad(submitted / "copies" / "B.h5ad").var_names].copy().write_h5ad(tmp_path / "real.h5ad")
    command += ["-ar", tmp_path / "real.h5ad", "--pert-col", "target_gene", "-o", tmp_path / "scores"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with open(tmp_path / "scores" / "agg_results.csv", newline="") as file:
        mean = next(row for row in csv.DictReader(file) if row["statistic"] == "mean")
    assert float(mean["pds_cosine"]) > 0.5  # perturbations are told apart


def test_an_n_cells_column_wins_and_a_bare_list_of_other_predictions_has_128(
    demo: Demo, submitted: Path, tmp_path: Path
) -> None:
    first, second = (submitted / "pert_counts.csv").read_text().split()[1:3]
    (tmp_path / "list.csv").write_text(f"target_gene,n_cells\n{first},7\n{second},3\n")
    predict(demo.run, tmp_path / "a.h5ad", options(submitted, list=str(tmp_path / "list.csv")))
    assert ad.read_h5ad(tmp_path / "a.h5ad").obs["target_gene"].value_counts().to_dict() == {first: 14, second: 6}
    (tmp_path / "bare.csv").write_text(f"target_gene\n{first}\n")
    notes = Notes()
    with reporting(notes):
        found = predict(demo.run, tmp_path / "b.h5ad", PredictConfig(list=str(tmp_path / "bare.csv"), cell_type="beta"))
    assert found.n_predicted == 128 and any("has no column n_cells: 128 cells" in note for note in notes.notes)


def test_log1p_predictions_take_genes_that_the_run_lacks_from_new_controls_too(
    demo: Demo, submitted: Path, tmp_path: Path
) -> None:
    name = (submitted / "pert_counts.csv").read_text().split()[1]
    notes = Notes()
    with reporting(notes):
        predict(demo.run, tmp_path / "a.h5ad", options(submitted, format="log1p", list=None, only=name))
    assert any("1 of" in note and "NEWGENE" in note and "no perturbation has an effect" in note for note in notes.notes)
    cells, controls = ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_h5ad(submitted / "controls.h5ad")
    written = cells[cells.obs["target_gene"] != name][:, "NEWGENE"].X.toarray().ravel()
    totals = np.asarray(controls.X.sum(1)).ravel()
    np.testing.assert_allclose(np.sort(written), np.sort(np.log1p(1e4 / totals)), rtol=1e-5)
    both = ad.concat([ad.read_h5ad(submitted / f"real{context}.h5ad") for context in "AB"])
    both.write_h5ad(tmp_path / "real.h5ad")
    score = sest.evaluate(tmp_path / "a.h5ad", tmp_path / "real.h5ad", cell_eval=False)
    assert np.isfinite(score.summary["mae"]["model"]) and np.isfinite(score.summary["mae"]["stack"])


def test_what_makes_no_submission_is_refused_before_controls_are_embedded(
    refusal: Callable[..., str], submitted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(submission, "MOST_CELLS", 1000)
    given = options(submitted).to_values()

    def refused(**changes: Any) -> str:
        return refusal(**{name: value for name, value in (given | changes).items() if value is not None})

    assert "a submission has at most 1,000" in refused()
    assert "Pass them with --controls" in refused(controls=None, genes=None)
    assert "own labels" in refused(template="x.h5ad", list=None)
    assert "'non-targeting' is the control" in refused(list=None, only="non-targeting")
    assert "goes with --format vcc2026" in refused(format="log1p", with_controls="folder")
    assert "has no column 'context' of obs" in refused(controls=str(_without_context(submitted)), n_cells=1)
    log1p = submitted / "log1p.h5ad"
    cells = ad.read_h5ad(submitted / "controls.h5ad")
    cells.X = np.log1p(cells.X.toarray() * 1e4 / np.asarray(cells.X.sum(1)))
    cells.write_h5ad(log1p)
    assert "holds log1p" in refused(controls=str(log1p), n_cells=1)


def _without_context(bundle: Path) -> Path:
    path = bundle / "no_context.h5ad"
    cells = ad.read_h5ad(bundle / "controls.h5ad")
    cells.obs = cells.obs[["target_gene"]]
    cells.write_h5ad(path)
    return path


def test_too_many_stored_values_leave_nothing(
    refusal: Callable[..., str], submitted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(submission, "MOST_STORED", 1000)
    assert "more than 1,000 values that are not zero" in refusal(**options(submitted).to_values())
    controls = ad.read_h5ad(submitted / "controls.h5ad")
    about = 9600 * controls.X.nnz / controls.n_obs
    monkeypatch.setattr(submission, "MOST_STORED", int(about / 1.05))  # seen only once the cells are made
    assert "values that are not zero" in refusal(**options(submitted).to_values())


def test_a_control_cell_that_is_too_deep_is_refused_before_writing(
    refusal: Callable[..., str], submitted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deepest = int(ad.read_h5ad(submitted / "controls.h5ad").X.sum(1).max())
    monkeypatch.setattr(submission, "MOST_A_CELL", deepest - 1)
    assert f"A cell has {deepest:,} counts" in refusal(**options(submitted).to_values())


def test_copies_are_not_written_over_without_force(
    demo: Demo, refusal: Callable[..., str], submitted: Path, tmp_path: Path
) -> None:
    folder = submitted / "copies"
    line = refusal(**options(submitted, with_controls=str(folder)).to_values())
    assert str(folder) in line and "--force" in line
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(**options(submitted, with_controls=str(tmp_path / "mine")).to_values())


def test_a_submission_of_2025_has_the_challenges_labels_and_scale(
    demo: Demo, bundle: Path, real: ad.AnnData, tmp_path: Path
) -> None:
    """Values of counts normalised to the median of the controls, as cell-eval normalises what it is given."""
    out, notes = tmp_path / "p.h5ad", Notes()
    wanted = tmp_path / "list.csv"
    names = (bundle / "pert_counts.csv").read_text().split()[1:4]
    wanted.write_text("target_gene,n_cells\n" + "".join(f"{name},30\n" for name in names))
    with reporting(notes):
        predict(demo.run, out, PredictConfig(format="vcc2025", list=str(wanted), cell_type="beta"))
    cells = ad.read_h5ad(out)
    controls = real[(real.obs["cell_type"] == "beta") & (real.obs["target_gene"] == CONTROL)]
    sizes = {"non-targeting": len(controls), **dict.fromkeys(names, 30)}
    assert dict(cells.obs["target_gene"].value_counts()) == sizes
    counts = controls.X.toarray().astype(np.float64)
    median = np.median(counts.sum(1))
    assert any(f"normalised to {median:,.0f}, the median of the control cells" in note for note in notes.notes)
    mine = cells[cells.obs["target_gene"] == "non-targeting"].X.toarray()
    np.testing.assert_allclose(mine, np.log1p(counts * median / counts.sum(1, keepdims=True)), atol=2e-6)
    assert cells.uns["sest"]["target_sum"] == pytest.approx(median)


def test_what_makes_no_submission_of_2025_is_refused(
    refusal: Callable[..., str], bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {"format": "vcc2025", "all_perturbations": True, "cell_type": "beta"}
    assert "has its own labels" in refusal(format="vcc2025", template="t.h5ad")
    monkeypatch.setattr(submission, "MOST_CELLS_2025", 1000)
    assert "at most 1,000. Lower --n-cells" in refusal(**asked)


def test_cell_eval_prepares_and_scores_it_as_it_is(demo: Demo, bundle: Path, real: ad.AnnData, tmp_path: Path) -> None:
    """Against real counts, which cell-eval normalises to their median: its mae is ours, and not far above."""
    program = shutil.which("cell-eval")
    if program is None:
        pytest.skip("cell-eval is not installed (sest[eval])")
    names = (bundle / "pert_counts.csv").read_text().split()[1:5]
    predict(demo.run, tmp_path / "p.h5ad", PredictConfig(format="vcc2025", only=tuple(names), cell_type="beta"))
    cells = ad.read_h5ad(tmp_path / "p.h5ad")
    (tmp_path / "genes.csv").write_text("\n".join(cells.var_names) + "\n")
    prep = [program, "prep", "-i", "p.h5ad", "-g", "genes.csv", "-o", "p.vcc"]
    done = subprocess.run(prep, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = real[(real.obs["cell_type"] == "beta") & real.obs["target_gene"].isin([*names, CONTROL])].copy()
    counts.obs["target_gene"] = counts.obs["target_gene"].astype(str).replace(CONTROL, "non-targeting")
    counts.X = counts.X.astype(np.float32)
    counts.write_h5ad(tmp_path / "real.h5ad")
    ours = sest.evaluate(tmp_path / "p.h5ad", tmp_path / "real.h5ad", cell_eval=False).summary["mae"]["model"]
    run = [program, "run", "-ap", "p.h5ad", "-ar", "real.h5ad", "--profile", "vcc", "-o", "out"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out" / "agg_results.csv").set_index("statistic")
    assert float(table.loc["mean", "mae"]) == pytest.approx(ours, rel=0.05)
