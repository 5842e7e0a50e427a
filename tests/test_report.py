"""`sest report`: the page's numbers, what it says where something is missing, and that it is safe to open anywhere."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import DIM, GENES, TinyGroup, tiny_config, tiny_group, write_store

from sest import embedding_map, report_figures
from sest.cache import open_cache
from sest.cli.main import main
from sest.cli.report import report as command
from sest.embedding_map import map_cells, principal_components
from sest.errors import InputError
from sest.progress import Silent
from sest.report import DEFAULT_SETS, write_report
from sest.report_data import read_runs
from sest.report_figures import Line, curve
from sest.report_page import text
from sest.train import train

HOSTILE = "<script>alert(1)</script>"
CELL_TYPE = "y<img src=x onerror=alert(2)>"
SIZES = {"P": 8, "Q": 5, "S": 6, "T": 9, HOSTILE: 7}
SPLITS = f"""
[datasets]
screen = "screen.h5ad"
[training]
screen = "train"
[fewshot."screen.x"]
val = ["P", "{HOSTILE}", "T"]
test = ["Q"]
[fewshot."screen.{CELL_TYPE}"]
val = ["S"]
"""


@dataclass
class Opened(HTMLParser):
    """A page as a browser reads it: its text, its elements with their attributes, and the figures."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    words: str = ""
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.source)
        self.figures: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.words += " "

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words += data

    def curve(self, y: str, number: int = 0) -> dict[int, float | None]:
        """Step -> value of a curve of the first figure with this y axis."""
        plot = next(f for f in self.figures.values() if f["layout"]["yaxis"]["title"]["text"] == y)
        return dict(zip(plot["data"][number]["x"], plot["data"][number]["y"], strict=True))

    def section(self, identity: str) -> str:
        """The HTML of a section."""
        return self.source.split(f'id="{identity}"')[1].split("</section>")[0]


def opened(path: Path) -> Opened:
    return Opened(path.read_text())


@dataclass(frozen=True)
class Trained:
    """A run of 12 steps on a tiny store, with a val and a test split and hostile names."""

    group: TinyGroup
    store: Path
    run: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "val_loss" in line]

    @property
    def best(self) -> dict[str, Any]:
        return min(self.validations, key=lambda line: line["val_loss"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("report")
    group = tiny_group(sizes=SIZES, cell_types=("x", CELL_TYPE))
    store = write_store(folder / "s.zarr", [group])
    (folder / "splits.toml").write_text(SPLITS)
    train(store, folder / "run", tiny_config(splits=str(folder / "splits.toml")), Silent())
    return Trained(group, store, folder / "run")


@pytest.fixture(scope="module")
def page(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The whole report of that run."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    written = write_report([trained.run], out, Silent(), n_sets=0)
    assert written.notes == [] and written.n_bytes == out.stat().st_size
    return opened(out)


@pytest.fixture
def copy(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return Path(shutil.copytree(trained.run, tmp_path / "copy"))


def brief(run: Path, **options: Any) -> Opened:
    """The report of a run without its store."""
    write_report([run], run / "report.html", Silent(), with_model=False, **options)
    return opened(run / "report.html")


def rewrite(run: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def sest(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sest", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# --- numbers


def test_the_headline_is_the_best_validation_beside_its_baselines(trained: Trained, page: Opened) -> None:
    best = trained.best
    for metric in ("val_loss", "pearson_delta", "mae", "pds"):
        figures = [best[metric + of] for of in ("", "_perturbation_mean", "_controls")]
        cells = re.escape(metric) + "".join(rf"\s+{re.escape(f'{value:.4g}')}" for value in figures)
        assert re.search(cells, page.words), metric
    assert f"best val_loss, at step {best['step']}" in page.words
    beaten = sum(best["val_loss"] < best[f"val_loss_{name}"] for name in ("perturbation_mean", "controls"))
    assert len(re.findall(r"(?<!not )beaten", page.words)) == beaten
    assert page.words.count("not beaten") == 2 - beaten


def test_curves_are_the_lines_of_metrics_jsonl(trained: Trained, page: Opened) -> None:
    logs = [line for line in trained.lines if "loss" in line]
    for name, y in (("loss", "loss"), ("grad_norm", "norm"), ("it_per_s", "it/s")):
        assert page.curve(y) == {line["step"]: float(f"{line[name]:.6g}") for line in logs}
    for metric in ("val_loss", "pearson_delta", "mae", "pds"):
        for number, of in enumerate(("", "_perturbation_mean", "_controls")):
            expected = {line["step"]: float(f"{line[metric + of]:.6g}") for line in trained.validations}
            if metric != "pearson_delta":  # the overview has that axis too
                assert page.curve(metric, number) == expected
    assert f"{logs[3]['loss']:.4g}" in page.section("curves")  # the table below the plot


def rows_of(page: Opened) -> dict[str, list[str]]:
    """Perturbation -> its row in the tables of all pairs."""
    tables = page.section("perturbations").split("all pairs, the worst first")[1:]
    rows = re.findall(r"<tr>(.*?)</tr>", "".join(tables), re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows]
    return {row[0]: row for row in cells if row}


def test_pairs_average_to_the_validation_of_that_checkpoint(trained: Trained, page: Opened) -> None:
    rows = rows_of(page)
    assert set(rows) == {"P", "T", "S", "Q", "&lt;script&gt;alert(1)&lt;/script&gt;"}
    validated = [row for name, row in rows.items() if name != "Q"]
    for column, name in ((3, "pearson_delta"), (4, "pearson_delta_perturbation_mean"), (5, "mae"), (6, "pds")):
        mean = np.mean([float(row[column]) for row in validated])
        assert mean == pytest.approx(trained.best[name], rel=2e-3, abs=1e-4), name  # the page shows four digits


def test_the_effect_of_a_pair_is_that_of_its_raw_counts(trained: Trained, page: Opened) -> None:
    group, rows = trained.group, rows_of(page)
    counts = group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    for name, cell_type in (("P", "x"), ("Q", "x"), ("S", CELL_TYPE)):
        of = (group.obs["cell_type"] == cell_type).to_numpy()
        mine, control = (of & (group.obs["perturbation"] == label).to_numpy() for label in (name, "ctrl"))
        change = log1p[mine].mean(0) - log1p[control].mean(0)
        assert int(rows[name][2]) == SIZES[name] == mine.sum()
        assert float(rows[name][7]) == pytest.approx(np.linalg.norm(change), rel=1e-3)  # four digits
        scatter = next(f for f in page.figures.values() if f.get("columns", [""])[0] == "gene" and is_of(page, f, name))
        shown = {gene: observed for gene, observed, _ in scatter["rows"]}
        assert [shown[gene] for gene in GENES] == pytest.approx(change, rel=1e-4, abs=1e-5)  # six digits of float32


def is_of(page: Opened, figure: dict[str, Any], name: str) -> bool:
    """Whether a scatter of genes is the one that the list offers for a perturbation."""
    key = next(key for key, value in page.figures.items() if value is figure)
    return f'value="{key}">{name} in ' in page.source or f'value="{key}" selected>{name} in ' in page.source


def test_a_limit_on_sets_is_kept_and_said(trained: Trained, tmp_path: Path) -> None:
    write_report([trained.run], tmp_path / "r.html", Silent(), n_sets=5)
    # val: 8, 7, 9 and 6 cells in sets of 4; 2 + 2 + 3 + 2 sets; test: 5 cells, 2 sets
    assert "(5 of its 9 sets predicted)" in opened(tmp_path / "r.html").words
    assert "(all its sets predicted)" in opened(tmp_path / "r.html").words


def test_options_that_differ_come_first_and_the_splits_are_counted(page: Opened) -> None:
    configuration = page.section("configuration")
    changed = configuration.split("All options")[0]
    assert "--set-size" in changed and "--weight-decay" not in changed
    assert "--weight-decay" in configuration
    splits = configuration.split(">Splits<")[1]
    assert re.search(r"screen</td>\s*<td[^>]*>x</td>\s*<td[^>]*>test</td>\s*<td[^>]*>1</td>\s*<td[^>]*>5<", splits)


def test_speed_shows_the_limit_and_what_is_not_recorded(copy: Path, trained: Trained) -> None:
    measured = ("limit_it_per_s", "limited_by", "memory_bytes")
    old = [{k: v for k, v in line.items() if k not in measured} for line in trained.lines]
    rewrite(copy, old)
    assert brief(copy).section("speed").count("not recorded") == 4
    new = [line | {"it_per_s": 50.0, "limit_it_per_s": 200.0, "limited_by": "memory", "memory_bytes": 3_000_000_000}
           if "loss" in line else line for line in old]  # fmt: skip
    rewrite(copy, new)
    speed = brief(copy).section("speed")
    assert all(words in speed for words in ("200 it/s", ">memory<", ">25%<", "3.00 GB", "50 it/s"))


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
    hovers = json.dumps([trace.get("text") for f in page.figures.values() for trace in f["data"]])
    names = json.dumps([trace.get("name") for f in page.figures.values() for trace in f["data"]])
    for plotly in (hovers, names):  # plotly reads tags in both
        assert "&lt;script&gt;alert(1)" in plotly and "<script" not in plotly and "<img" not in plotly
    assert "&lt;img" in hovers and "&lt;img" in names


def test_every_plot_has_a_name_and_a_table(page: Opened) -> None:
    plots = [attributes for tag, attributes in page.elements if tag == "div" and "data-figure" in attributes]
    assert len(plots) == 7 + 1 + 2 + 1  # curves, overview, two of genes, map
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(plot["data-figure"] in page.figures for plot in plots)
    figures = re.findall(r"<figure>.*?</figure>", page.source, re.DOTALL)
    assert len(figures) == len(plots) and all("<summary>Numbers" in figure for figure in figures)


def test_sections_can_be_reached_from_the_contents(page: Opened) -> None:
    links = [a["href"] for tag, a in page.elements if tag == "a"]
    identities = {f"#{a['id']}" for _, a in page.elements if "id" in a}
    assert len(links) == 6 and set(links) <= identities


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "-"),
        (None, "-"),
        (0.123456, "0.1235"),
        (12345, "12,345"),
        (1e4, "10,000"),
        (True, "yes"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_values_are_shown_in_words(value: object, shown: str) -> None:
    assert text(value) == shown


# --- what is missing


def test_without_its_store_the_report_says_so_and_has_the_rest(trained: Trained, copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace(str(trained.store), str(trained.store) + "-gone"))
    written = write_report([copy], None, Silent())
    assert written.path == copy / "report.html"
    page = opened(written.path)
    for identity in ("perturbations", "embeddings", "configuration"):
        assert "s.zarr-gone does not exist" in page.section(identity)
    assert len(written.notes) == 1 and page.curve("loss")
    assert f"{trained.best['val_loss']:.4g}" in page.words
    again = write_report([copy], None, Silent(), cache=str(trained.store))
    assert again.notes == [] and "does not exist" not in opened(again.path).words


def test_without_its_features_only_what_needs_them_is_left_out(copy: Path) -> None:
    config = copy / "config.toml"
    config.write_text(config.read_text().replace('"onehot"', '"/gone/features.npz"'))
    page = opened(write_report([copy], None, Silent()).path)
    assert "No file /gone/features.npz" in page.section("perturbations")
    assert "Pass --perturbations" in page.section("perturbations")
    assert "coloured by" in page.section("embeddings")


def test_a_store_with_other_cells_is_not_predicted_with(copy: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other.zarr", [tiny_group(sizes=SIZES, cell_types=("x", CELL_TYPE), seed=1)])
    page = opened(write_report([copy], None, Silent(), cache=str(other)).path)
    assert "is not the store" in page.section("perturbations")


def test_a_damaged_checkpoint_is_said(copy: Path) -> None:
    for name in ("best", "last", "checkpoint-step-4", "checkpoint-step-8", "checkpoint-step-12"):
        file = copy / name / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)
    page = opened(write_report([copy], None, Silent()).path)
    assert "is damaged" in page.section("perturbations") and "coloured by" in page.section("embeddings")
    assert "no checkpoint that can be read" in page.words


def test_no_model_leaves_the_store_alone(copy: Path, trained: Trained) -> None:
    page = brief(copy)
    for identity in ("perturbations", "embeddings"):
        assert "--no-model was given" in page.section(identity)
    assert page.curve("val_loss") and f"{trained.best['val_loss']:.4g}" in page.words


def test_null_values_and_a_cut_line_are_shown_as_what_they_are(copy: Path, trained: Trained) -> None:
    lines = trained.lines
    lines[1]["loss"] = None
    next(line for line in lines if "val_loss" in line)["pds"] = None
    rewrite(copy, lines, tail='{"step": 13, "loss": 0.')
    page = brief(copy)
    losses = page.curve("loss")
    assert losses[lines[1]["step"]] is None and 13 not in losses
    assert list(page.curve("pds").values()).count(None) == 1
    assert re.search(rf'>{lines[1]["step"]}</td>\s*<td class="number">-</td>', page.section("curves"))
    assert "nan" not in page.words.lower().split()


def test_a_run_without_any_validation_yet_has_a_report(copy: Path, trained: Trained) -> None:
    rewrite(copy, [line for line in trained.lines if "val_loss" not in line])
    page = brief(copy)
    assert "No validation yet" in page.words and page.curve("loss")
    rewrite(copy, [])
    for name in ("best", "last", *(f"checkpoint-step-{step}" for step in (4, 8, 12))):
        shutil.rmtree(copy / name)
    page = opened(write_report([copy], None, Silent()).path)
    assert "has no checkpoint yet" in page.section("perturbations")
    assert "trained for 0 of 12 steps" in page.words and "No values." in page.words


# --- several runs


@pytest.fixture(scope="module")
def other(trained: Trained) -> Path:
    """The same cells with a wider head and another learning rate."""
    config = tiny_config(splits=str(trained.run.parent / "splits.toml"), hidden=24, lr=3e-3)
    train(trained.store, trained.run.parent / "wider", config, Silent())
    return trained.run.parent / "wider"


def test_runs_are_compared_and_the_better_one_is_named(trained: Trained, other: Path, tmp_path: Path) -> None:
    write_report([trained.run, other], tmp_path / "r.html", Silent(), with_model=False)
    page = opened(tmp_path / "r.html")
    best = {
        run.name: min(line["val_loss"] for line in Trained(trained.group, trained.store, run).validations)
        for run in (trained.run, other)
    }
    low, high = sorted(best, key=best.__getitem__)
    share = (best[high] - best[low]) / best[high]
    expected = (
        f"{low} has the lower best val_loss: {best[low]:.4g}, against {best[high]:.4g} of {high} ({share:.1%} lower)."
    )
    assert expected in page.words
    comparison = page.section("comparison")
    assert re.search(
        rf">perturbation mean</td>\s*<td[^>]*>-</td>\s*<td[^>]*>{trained.best['val_loss_perturbation_mean']:.4g}<",
        comparison,
    )
    assert "hidden" in comparison.split("What differs")[1] and "24" in comparison and "n_layers" not in comparison
    assert "not measured on the same task" not in page.words
    plot = next(f for f in page.figures.values() if f["layout"]["yaxis"]["title"]["text"] == "val_loss")
    assert [trace["name"] for trace in plot["data"]] == ["run", "wider"]
    assert {"run-1-diagnosis", "run-2-configuration"} <= {a.get("id") for _, a in page.elements}


def test_runs_on_different_tasks_are_warned_about(trained: Trained, tmp_path: Path) -> None:
    for name, changes, words in (
        ("sets", {"set_size": 3}, "--set-size"),
        ("sums", {"target_sum": "500"}, "the target sum"),
        ("splits", {"splits": None}, "the splits"),
    ):
        config = tiny_config(**({"splits": str(trained.run.parent / "splits.toml")} | changes))
        train(trained.store, tmp_path / name, config, Silent())
        write_report([trained.run, tmp_path / name], tmp_path / "r.html", Silent(), with_model=False)
        warned = re.search(r"These runs differ in ([^:]*):", opened(tmp_path / "r.html").words)
        assert warned and words in warned[1] and "the validation cells" in warned[1]


def test_runs_of_the_same_name_are_told_apart_and_one_given_twice_is_refused(trained: Trained, tmp_path: Path) -> None:
    same = shutil.copytree(trained.run, tmp_path / "again" / "run")
    assert [run.name for run in read_runs([trained.run, same])] == [f"{trained.run.parent.name}/run", "again/run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs([trained.run, trained.run / ".." / "run"])


# --- figures and the map


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    steps = np.arange(1, 5002, dtype=float)
    figure = curve([Line("a", steps, steps**0.5)], "a", falls=True)
    assert figure is not None
    x = figure.plot["data"][0]["x"]
    assert len(x) <= report_figures.MOST_POINTS and x[-1] == 5001 and len(set(np.diff(x))) == 1
    assert len(figure.rows) <= report_figures.MOST_ROWS and figure.rows[-1][0] == 5001
    assert figure.plot["layout"]["yaxis"]["type"] == "log"  # 1 to 71
    assert curve([Line("a", steps, steps * math.nan)], "a") is None


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 7)) @ np.diag([5, 3, 2, 1, 1, 1, 1])
    places, explained = principal_components(vectors.astype(np.float32))
    values, basis = np.linalg.eigh(np.cov(vectors.T))
    expected = (vectors - vectors.mean(0)) @ basis[:, ::-1][:, :2]
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=1e-4)  # float32 vectors; signs are free
    assert explained == pytest.approx(values[::-1][:2] / values.sum(), rel=1e-5)
    flat, shares = principal_components(np.ones((1, 3), np.float32))
    assert flat.shape == (1, 2) and shares == (0.0, 0.0)


def test_the_map_is_a_seeded_sample_with_the_labels_of_its_cells(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_map, "MOST_CELLS", 30)
    group, cache = trained.group, open_cache(trained.store)
    cells, again = (map_cells(cache, Silent(), seed=3) for _ in range(2))
    assert cells.n_cells == len(group.obs) and len(cells.is_control) == 30
    assert cells.labels == again.labels and (cells.places["PCA"] == again.places["PCA"]).all()
    rows = np.sort(np.random.default_rng(3).choice(len(group.obs), 30, replace=False))
    obs = group.obs.iloc[rows]
    assert cells.labels["cell type"] == obs["cell_type"].tolist() and cells.labels["batch"] == obs["batch"].tolist()
    assert cells.is_control.tolist() == (obs["perturbation"] == "ctrl").tolist()
    assert cells.places["PCA"] == pytest.approx(principal_components(group.embeddings[rows])[0], abs=0.05)  # float16
    assert group.embeddings.shape[1] == DIM


def test_only_the_most_frequent_labels_have_a_colour(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    monkeypatch.setattr(report_figures, "MOST_GROUPS", 2)
    cells = map_cells(open_cache(trained.store), Silent())
    figure = report_figures.embedding_map(cells, "PCA", "perturbation")
    assert [row[0] for row in figure.rows] == ["3 others", "control", "T", "P"]
    assert [row[1] for row in figure.rows] == [2 * (5 + 6 + 7), 14, 18, 16]


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


def test_the_default_that_the_command_repeats_is_the_library_s() -> None:
    assert inspect.signature(command).parameters["sets"].default == DEFAULT_SETS


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
    write_report([trained.run], tmp_path / "r.html", Silent())
    done = chromium(tmp_path / "r.html", tmp_path / "profile")
    plots = re.findall(r'<div class="plot( tall)?( js-plotly-plot)?"', done.stdout)
    assert len(plots) == 11 and all(drawn for _, drawn in plots)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
