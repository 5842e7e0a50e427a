"""`import sest`: the pipeline from Python, on paths and on cells in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import sest
from helpers.processes import server
from sest.errors import InputError, TrainingFailed
from sest.report.write import write_report

SIZES: dict[str, Any] = {"batch_size": 4, "set_size": 8, "hidden": 16, "n_layers": 1, "n_heads": 2, "device": "cpu"}
SIZES |= {"n_encoder_layers": 2, "n_decoder_layers": 2, "num_workers": 0, "dropout": 0.0, "lr": 1e-3}
SIMULATION: dict[str, Any] = {"n_perturbations": 8, "n_cells_per_perturbation": 12, "n_controls": 24, "n_genes": 80}
SIMULATION |= {"expressed_genes": 40, "umi_per_cell": 300}


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with simulated cells of two types (screen.h5ad), features and splits that hold perturbations out."""
    folder = tmp_path_factory.mktemp("api")
    path = sest.simulate(
        folder / "screen.h5ad", features=folder / "screen.npz", splits=str(folder / "screen.toml"), **SIMULATION
    )
    assert path == folder / "screen.h5ad"
    return folder


@pytest.fixture(scope="module")
def cache(screen: Path) -> sest.Cache:
    return sest.embed(screen / "screen.h5ad", screen / "screen.zarr", dim=6, dtype="float32")


@pytest.fixture(scope="module")
def run(cache: sest.Cache, screen: Path) -> sest.Run:
    """Six steps, validated at 3 and 6."""
    files = {"perturbations": screen / "screen.npz", "splits": screen / "screen.toml"}
    return sest.train(cache, screen / "run", max_steps=6, val_every=3, log_every=1, **files, **SIZES)


def test_importing_sest_imports_nothing_slow_and_its_names_are_all_there() -> None:
    slow = ["numpy", "torch", "pandas", "anndata", "zarr", "rich", "typer"]
    code = f"import sys, sest; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    for name in sest.__all__:
        assert getattr(sest, name).__doc__, name
        assert name in dir(sest)
    with pytest.raises(AttributeError, match="no attribute 'embeds'"):
        sest.embeds  # noqa: B018


def test_every_public_name_is_on_the_page_about_python() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "api.md").read_text()
    assert [name for name in sest.__all__ if f"::: sest.{name}\n" not in page and f".{name}\n" not in page] == []


def test_cells_in_memory_give_the_embeddings_of_the_same_cells_in_a_file(
    cache: sest.Cache, screen: Path, tmp_path: Path
) -> None:
    cells = anndata.read_h5ad(screen / "screen.h5ad")
    before = cells.copy()
    made = sest.embed(cells, tmp_path / "memory.zarr", dim=6, dtype="float32")
    assert list(made.groups) == ["cells"] and made.dim == 6
    np.testing.assert_array_equal(made.groups["cells"].embeddings(), cache.groups["screen"].embeddings())
    assert cells.obs.equals(before.obs) and (cells.X != before.X).nnz == 0
    again = sest.embed(cells, str(tmp_path / "memory.zarr"), dim=6, dtype="float32")  # complete: nothing to do
    assert again.sha256 == made.sha256


def test_a_cache_reads_back_as_anndata(cache: sest.Cache, screen: Path, tmp_path: Path) -> None:
    cells, back = anndata.read_h5ad(screen / "screen.h5ad"), sest.open_cache(cache.path).to_anndata()
    assert back.obsm["X_sest"].shape == (cells.n_obs, 6)
    assert list(back.obs_names) == list(cells.obs_names) and list(back.var_names) == list(cells.var_names)
    np.testing.assert_array_equal(back.X.toarray(), cells.X.toarray())
    assert (back.obs["perturbation"].astype(str) == cells.obs["target_gene"].astype(str)).all()


def test_several_groups_become_one_anndata_over_the_genes_that_all_have(screen: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(screen / "screen.h5ad")
    cells[:, :70].copy().write_h5ad(tmp_path / "a.h5ad")
    cells[:, 10:].copy().write_h5ad(tmp_path / "b.h5ad")
    made = sest.embed([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "two.zarr", dim=4)
    both = made.to_anndata()
    assert both.shape == (2 * cells.n_obs, 60) and list(both.var_names) == list(cells.var_names[10:70])
    assert both.obs["group"].value_counts().to_dict() == {"a": cells.n_obs, "b": cells.n_obs}
    assert both.obs_names.is_unique
    np.testing.assert_array_equal(both.X[: cells.n_obs].toarray(), cells.X[:, 10:70].toarray())
    assert made.to_anndata("b").shape == (cells.n_obs, 70)
    with pytest.raises(sest.Error, match=r"no group 'c'.*a, b"):
        made.to_anndata("c")


def test_a_run_gives_its_metrics_best_step_model_and_config(run: sest.Run) -> None:
    metrics = run.metrics
    assert isinstance(metrics, pd.DataFrame)
    assert metrics["step"].tolist() == [1, 2, 3, 3, 4, 5, 6, 6]
    validations = metrics.dropna(subset=["val_loss"]).set_index("step")["val_loss"]
    assert run.best_step == validations.idxmin()
    model = run.load_model("best")
    assert not model.training and model.sizes.dim == 6
    same = sest.load_model(run.folder / "best")
    basal, perturbation = torch.ones(1, 2, 6), torch.ones(1, model.sizes.n_features)
    assert torch.equal(model(basal, perturbation), same(basal, perturbation))
    assert run.config.max_steps == 6 and sest.open_run(str(run.folder)).best_step == run.best_step


def test_a_resumed_run_is_the_run_of_all_steps(cache: sest.Cache, run: sest.Run, screen: Path, tmp_path: Path) -> None:
    files = {"perturbations": screen / "screen.npz", "splits": screen / "screen.toml"}
    options = {"val_every": 3, "log_every": 1, **files, **SIZES}
    sest.train(cache.path, tmp_path / "run", max_steps=4, **options)
    resumed = sest.train(cache.path, str(tmp_path / "run"), resume=True, max_steps=6)
    a, b = run.load_model("last").state_dict(), resumed.load_model("last").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(sest.Error, match=r"exists\. Continue it"):
        sest.train(cache, run.folder, **options)
    with pytest.raises(sest.Error, match="nothing to resume"):
        sest.train(cache, tmp_path / "absent", resume=True)


def test_predictions_are_those_of_the_command(run: sest.Run, tmp_path: Path) -> None:
    done = server().run(["-m", "sest", "predict", run.folder, "--out", tmp_path / "command.h5ad"])
    assert done.returncode == 0, done.stderr
    expected, predicted = anndata.read_h5ad(tmp_path / "command.h5ad"), run.predict(out=tmp_path / "api.h5ad")
    np.testing.assert_array_equal(predicted.X.toarray(), expected.X.toarray())
    assert predicted.obs.equals(expected.obs) and predicted.var_names.equals(expected.var_names)
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "api.h5ad").X.toarray(), expected.X.toarray())


def test_perturbations_are_named_or_counted_and_controls_may_be_new_cells(run: sest.Run, screen: Path) -> None:
    cells = anndata.read_h5ad(screen / "screen.h5ad")
    names = [name for name in cells.obs["target_gene"].cat.categories if name != "non-targeting"][:2]
    predicted = run.predict(names, cell_type="alpha", n_cells=10)
    assert predicted.obs["target_gene"].value_counts()[names].tolist() == [10, 10]
    counted = run.predict({names[0]: 5, names[1]: 7}, cell_type="alpha")
    assert counted.obs["target_gene"].value_counts()[names].tolist() == [5, 7]
    controls = cells[(cells.obs["target_gene"] == "non-targeting") & (cells.obs["cell_type"] == "alpha")].copy()
    predicted = run.predict(names, cell_type="alpha", n_cells=10, blend="head")
    anew = run.predict(names, controls=controls, n_cells=10, blend="head")
    # the same controls, embedded again with the run's encoder and projection
    np.testing.assert_allclose(
        anew[anew.obs["target_gene"] != "non-targeting"].X.toarray().mean(0),
        predicted[predicted.obs["target_gene"] != "non-targeting"].X.toarray().mean(0),
        atol=0.2,  # other draws of the controls
    )
    with pytest.raises(sest.Error, match="NOPE"):
        run.predict(["NOPE"], cell_type="alpha")


def test_files_that_are_there_are_replaced_only_with_force_and_inputs_never(
    run: sest.Run, screen: Path, tmp_path: Path
) -> None:
    out, older = tmp_path / "out.h5ad", tmp_path / "out.html"
    for path in (out, older):
        path.write_text("older")
    small: dict[str, Any] = {"n_perturbations": 2, "n_cells_per_perturbation": 3, "n_genes": 50, "expressed_genes": 20}
    with pytest.raises(sest.Error, match=r"exists\. Pass --force"):
        run.predict(out=out)
    with pytest.raises(sest.Error, match=r"exists\. Pass --force"):
        run.report(older, with_model=False)
    with pytest.raises(sest.Error, match=r"exists\. Pass --force"):
        sest.simulate(out, **small)
    with pytest.raises(sest.Error, match=r"exists\. Pass --force"):
        sest.simulate(features=out.rename(tmp_path / "f.npz"), **small)
    assert [path.read_text() for path in (older, tmp_path / "f.npz")] == ["older", "older"]
    sest.simulate(features=tmp_path / "f.npz", force=True, **small)
    assert run.report(older, with_model=False, force=True).stat().st_size > 1000
    sest.simulate(out, **small)
    assert run.predict(out=out, force=True).n_obs == anndata.read_h5ad(out).n_obs
    copy = tmp_path / "copy.h5ad"
    anndata.read_h5ad(screen / "screen.h5ad").write_h5ad(copy)
    for controls in (copy, anndata.read_h5ad(copy, backed="r")):
        with pytest.raises(sest.Error, match="is used by this command already"):
            run.predict(["A"], controls=controls, out=copy, force=True)


def test_predicted_cells_in_memory_score_as_their_file_does(run: sest.Run, screen: Path, tmp_path: Path) -> None:
    predicted = run.predict(out=tmp_path / "predicted.h5ad")
    memory = sest.evaluate(predicted, anndata.read_h5ad(screen / "screen.h5ad"), cell_eval=False)
    file = sest.evaluate(str(tmp_path / "predicted.h5ad"), screen / "screen.h5ad", cell_eval=False)
    assert isinstance(memory, sest.Evaluation) and isinstance(memory.table, pd.DataFrame)
    pd.testing.assert_frame_equal(memory.table, file.table)
    assert {"model", "perturbation_mean"} <= set(memory.table["predictor"])


def test_the_report_is_written_where_it_is_asked_for(run: sest.Run, tmp_path: Path) -> None:
    assert run.report() == run.folder / "report.html"
    assert run.report(tmp_path / "page.html", with_model=False) == tmp_path / "page.html"
    assert (run.folder / "report.html").stat().st_size > 1000 < (tmp_path / "page.html").stat().st_size


def test_paths_are_text_or_path_likes_and_numbers_are_numbers(screen: Path, tmp_path: Path) -> None:
    class Place(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "like.zarr")

    made = sest.embed(str(screen / "screen.h5ad"), Place(), dim=4)
    options = {"target_sum": 1e4, "max_steps": 1, **SIZES}
    trained = sest.train(made, str(tmp_path / "run"), **options)
    assert made.dim == 4 and trained.config.target_sum == 1e4


def test_what_input_can_cause_is_one_line_and_a_value_error(cache: sest.Cache, screen: Path, tmp_path: Path) -> None:
    assert issubclass(sest.Error, ValueError) and issubclass(InputError, sest.Error)
    assert not issubclass(TrainingFailed, sest.Error)
    calls = [
        (lambda: sest.open_cache(tmp_path / "absent.zarr"), "does not exist"),
        (lambda: sest.open_run(tmp_path), "no run folder"),
        (lambda: sest.load_model(tmp_path / "absent"), "does not exist"),
        (lambda: sest.embed(tmp_path / "absent.h5ad", tmp_path / "x.zarr"), "absent.h5ad"),
        (lambda: sest.embed(screen / "screen.h5ad", tmp_path / "x.zarr", dims=3), "Did you mean 'dim'"),
        (lambda: sest.train(cache, tmp_path / "run", max_step=3), "Did you mean 'max_steps'"),
        (lambda: sest.evaluate(tmp_path / "absent.h5ad", screen / "screen.h5ad"), "absent.h5ad"),
        (lambda: sest.simulate(n_gene=3), "Did you mean 'n_genes'"),
    ]
    for call, message in calls:
        with pytest.raises(sest.Error) as refused:
            call()
        assert message in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed(screen: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = sest.embed(screen / "screen.h5ad", tmp_path / "quiet.zarr", dim=4)
    sest.train(made, tmp_path / "run", max_steps=1, **SIZES)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_several_runs_are_averaged_and_reported_side_by_side(
    cache: sest.Cache, screen: Path, run: sest.Run, tmp_path: Path
) -> None:
    files = {"perturbations": screen / "screen.npz", "splits": screen / "screen.toml"}
    runs = [
        sest.train(cache, tmp_path / "runs" / f"seed-{i}", seed=i, max_steps=1, val_every=1, **files, **SIZES)
        for i in (0, 1)
    ]
    both = sest.predict(runs)
    assert list(both.uns["sest"]["provenance"]["ensemble"]) == ["seed-0/best", "seed-1/best"]
    np.testing.assert_array_equal(sest.predict(tmp_path / "runs").X.toarray(), both.X.toarray())
    page = write_report(tmp_path / "runs", tmp_path / "r.html", with_model=False).path.read_text()
    assert "2 runs compared" in page and "seed-0" in page and "seed-1" in page
    np.testing.assert_array_equal(sest.predict(run).X.toarray(), run.predict().X.toarray())
