"""`sest report`: the whole page, what it says where something is missing, and that it is safe to open anywhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from helpers.caches import small_screen, write_cache
from helpers.pages import CELL_TYPE, HOSTILE, SIZES, Opened, Trained, brief, opened
from sest.cli.main import main
from sest.errors import InputError
from sest.evaluation.results import Evaluation
from sest.facts.run import read_runs
from sest.report.write import write_report


def sest(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sest", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# --- safety


def test_nothing_is_loaded_from_anywhere(page: Opened) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert "src" not in attributes and (attributes.get("href") or "#").startswith("#"), attributes
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    ours = [*page.scripts[::2], *re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)]  # [1] is plotly's
    assert len(page.scripts) == 3 and len(ours) == 3
    assert not any(re.search(r"https?:|url\(|@import|fetch|XMLHttp", text) for text in ours)


def test_names_from_the_data_are_never_markup(page: Opened) -> None:
    assert "<script>alert" not in page.source and "<img" not in page.source.split("plotly.js v")[0]
    assert HOSTILE in page.words and CELL_TYPE in page.words  # as text
    hovers = json.dumps([trace.get("text") for f in page.figures.values() for trace in f.get("data", [])])
    names = json.dumps([trace.get("name") for f in page.figures.values() for trace in f.get("data", [])])
    for plotly in (hovers, names):  # plotly reads tags in both
        assert "&lt;script&gt;alert(1)" in plotly and "<script" not in plotly and "<img" not in plotly
    assert "&lt;img" in hovers and "&lt;img" in names


def test_every_plot_has_a_name_and_a_table(page: Opened) -> None:
    plots = [attributes for tag, attributes in page.elements if tag == "div" and "data-figure" in attributes]
    # curves, bars of two splits, overview and sizes, cells and heat map of one pair, genes, map of the embeddings
    assert len(plots) == 9 + 2 + 2 + 1 + 1 + 2 + 1
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(plot["data-figure"] in page.figures for plot in plots)
    figures = re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL)
    assert len(figures) == len(plots) and all(
        "<summary>Numbers" in figure and "data-save" in figure for figure in figures
    )


def test_sections_can_be_reached_from_the_contents(page: Opened) -> None:
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    identities = {f"#{a['id']}" for _, a in page.elements if "id" in a}
    assert len(links) == 6 and set(links) <= identities


# --- what is missing


def test_without_its_cache_the_report_says_so_and_has_the_rest(trained: Trained, copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(trained.cache), str(trained.cache) + "-gone"))
    written = write_report([copy], None)
    assert written.path == copy / "report.html"
    page = opened(written.path)
    for identity in ("perturbations", "embeddings", "configuration"):
        assert "s.zarr-gone does not exist" in page.section(identity)
    assert len(written.notes) == 1 and page.curve("loss")
    assert f"{trained.best['val_loss']:.4g}" in page.words
    again = write_report([copy], None, cache=str(trained.cache))
    assert again.notes == [] and "does not exist" not in opened(again.path).words


def test_without_its_features_only_what_needs_them_is_left_out(copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('"onehot"', '"/gone/features.npz"'))
    page = opened(write_report([copy], None).path)
    assert "No file /gone/features.npz" in page.section("perturbations")
    assert "Pass --perturbations" in page.section("perturbations")
    assert "coloured by" in page.section("embeddings")


def test_a_cache_with_other_cells_is_not_predicted_with(copy: Path, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "other.zarr", [small_screen(sizes=SIZES, cell_types=("x", CELL_TYPE), seed=1)])
    page = opened(write_report([copy], None, cache=str(other)).path)
    assert "was trained on. Pass --cache" in page.section("perturbations")


def test_a_damaged_checkpoint_is_said(copy: Path) -> None:
    for name in ("best", "last", "checkpoint-step-4", "checkpoint-step-8", "checkpoint-step-12"):
        file = copy / name / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)
    page = opened(write_report([copy], None).path)
    assert "is damaged" in page.section("perturbations") and "coloured by" in page.section("embeddings")
    assert "no checkpoint that can be read" in page.words


def test_no_model_leaves_the_cache_alone(copy: Path, trained: Trained) -> None:
    page = brief(copy)
    for identity in ("perturbations", "embeddings"):
        assert "--no-model was given" in page.section(identity)
    assert page.curve("val_loss") and f"{trained.best['val_loss']:.4g}" in page.words


# --- the evaluation


def scored(run: Path, folder: Path, **made_by: object) -> Path:
    """An evaluation of the prediction of a run's best checkpoint, in which the head is better on mae alone."""
    state = json.loads((run / "best" / "state.json").read_text())
    mine = {"step": state["step"], "model_sha256": state["files"]["model.safetensors"]}
    values = {"model": (0.1, 0.3, 0.1), "controls": (0.0, 0.5, 0.5), "stack": (0.4, 0.4, 0.7)}
    table = pd.DataFrame(
        [("x", "Q", 5, 5, name, *scores) for name, scores in values.items()],
        columns=["cell_type", "perturbation", "n_predicted", "n_real", "predictor", "pearson_delta", "mae", "pds"],
    )
    provenance: dict[str, object] = {
        "made_by": {"run": "run", **mine, "cache_sha256": state["cache_sha256"], **made_by}
    }
    Evaluation(table, {"mae": {"model": 0.3}}, provenance, ()).write(folder)
    return folder


def test_the_evaluation_of_the_run_stands_at_the_top(copy: Path, tmp_path: Path) -> None:
    scored(copy, copy / "evaluation")
    page = opened(write_report(copy, with_model=False).path)
    top = page.source.split('id="perturbations"')[0]
    assert "Worse than doing nothing (predicting the controls) on 1 of 3 metrics, in pds 0.1 against 0.5" in top
    assert "better than every baseline on 1 of 3 metrics, in mae 0.3 against 0.4, 1.3 times better of the stack" in top
    assert "Evaluated cells, 1 pairs" in top and "as <code>sest evaluate</code> scored them" in top
    tables = [f["columns"] for f in page.figures.values() if f["columns"][:2] == ["perturbation", "cell type"]]
    assert tables == [["perturbation", "cell type", "cells", "this model", "controls", "stack"]] * 3


def test_an_evaluation_of_another_checkpoint_is_used_only_if_it_is_named(copy: Path, tmp_path: Path) -> None:
    scored(copy, copy / "evaluation", step=99)
    assert "Evaluated cells" not in opened(write_report(copy, with_model=False).path).words
    page = opened(write_report(copy, with_model=False, evaluation=copy / "evaluation").path)
    assert "Evaluated cells" in page.words and "of run, step 99" in page.words
    with pytest.raises(InputError, match="is no folder that `sest evaluate` wrote"):
        write_report(copy, with_model=False, evaluation=tmp_path)


def test_one_evaluation_is_not_that_of_several_runs(copy: Path, trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of one prediction, and 2 runs are given"):
        write_report([copy, trained.run], tmp_path / "r.html", with_model=False, evaluation=copy / "evaluation")


def test_a_report_without_plotly_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="A report needs plotly, which is not installed"):
        write_report("nowhere")


def test_a_umap_without_its_package_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else name)
    with pytest.raises(InputError, match="--umap needs umap-learn"):
        write_report(copy, umap=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("sest.machine.jit.REASON", "No module named 'numba'")
    with pytest.raises(InputError, match=r"umap-learn, and that needs numba, which is not here \(No module"):
        write_report(copy, umap=True)


# --- from Python


def test_runs_and_places_may_be_text_or_paths_one_or_several(copy: Path, trained: Trained, tmp_path: Path) -> None:
    one = write_report(str(copy), str(tmp_path / "one.html"), with_model=False)
    assert one.path == tmp_path / "one.html" and list(one.findings) == ["copy"]
    assert write_report(copy, with_model=False).path == copy / "report.html"
    several = write_report([str(copy), trained.run], tmp_path / "two.html", with_model=False)
    assert list(several.findings) == ["copy", "run"] and several.n_bytes == several.path.stat().st_size
    with pytest.raises(InputError, match="Name one run folder at least"):
        write_report([])


# --- the command


def test_the_command_says_where_the_file_is_and_what_the_diagnosis_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sest(monkeypatch, "report", copy, "--no-model") == 0
    out = capsys.readouterr().out
    size = (copy / "report.html").stat().st_size
    assert f"Written: {copy.resolve() / 'report.html'} ({size / 1e6:.1f} MB)" in out
    for finding in read_runs([copy])[0].findings:
        assert f"- {finding.name} ({finding.level}): {finding.evidence}" in out
    assert sest(monkeypatch, "report", copy, "--no-model") == 0  # an older report is replaced
    assert not list(copy.glob("*.partial"))


def test_several_runs_are_written_to_the_working_folder(
    trained: Trained, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sest(monkeypatch, "report", trained.run, copy, "--no-model") == 0
    assert "2 runs compared" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{run}", "--out", "{folder}/x.txt"), "does not end in .html"),
        (("{run}", "--out", "{folder}/gone/x.html"), "No folder"),
        (("{folder}",), "is no run folder"),
        (("{folder}/gone",), "is no run folder"),
        (("{run}", "--device", "abacus"), "No device 'abacus'"),
    ],
)
def test_what_cannot_be_written_or_read_is_refused_in_one_line(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    assert sest(monkeypatch, "report", *(word.format(run=copy, folder=tmp_path) for word in words)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("Error: ") and said in error[-1]
    assert not (copy / "report.html").exists()


# --- in a browser


@pytest.fixture
def chromium() -> Callable[[Path, Path], subprocess.CompletedProcess[str]]:
    """Opens a page without a window; gives its elements after the scripts have run, and what they logged."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium here")

    def dump(path: Path, profile: Path) -> subprocess.CompletedProcess[str]:
        options = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --enable-logging=stderr --window-size=1280,9000 "
            "--virtual-time-budget=3000 --dump-dom"
        ).split()
        words = [program, *options, f"--user-data-dir={profile}", path.as_uri()]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)

    return dump


def test_a_browser_draws_every_plot_without_an_error(
    trained: Trained, tmp_path: Path, chromium: Callable[[Path, Path], subprocess.CompletedProcess[str]]
) -> None:
    write_report([trained.run], tmp_path / "r.html")
    done = chromium(tmp_path / "r.html", tmp_path / "profile")
    plots = re.findall(r'<div class="plot( js-plotly-plot)?"', done.stdout)
    assert len(plots) == 18 and all(plots)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    assert "&lt;img src=x" in done.stdout  # the names are there, as text: no element came of one
    assert not re.search(r"<img[^>]*onerror|<script>alert", done.stdout.split("</style>")[1].split("<script")[0])
