"""What an evaluation shows and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.two_files import Written, write_two_files
from sest.config import EvaluateConfig
from sest.errors import InputError
from sest.evaluation.evaluate import evaluate
from sest.evaluation.results import Evaluation, means_over_pairs, read_evaluation


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Written]:
    """Writes the two files."""
    return partial(write_two_files, tmp_path)


def test_results_are_written_together_and_the_same_each_time(written: Callable[..., Written], tmp_path: Path) -> None:
    paths = written()
    outs = tmp_path / "deep" / "a", tmp_path / "b"
    outs[1].mkdir()  # an empty folder is fine
    for out in outs:
        evaluate(*paths, EvaluateConfig(cell_eval=False)).write(out)
        assert sorted(path.name for path in out.iterdir()) == ["results.csv", "summary.json"]
    for name in ("results.csv", "summary.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    summary = json.loads((outs[0] / "summary.json").read_text())
    assert list(summary) == ["ceilings", "metrics", "notes", "provenance"]
    table = pd.read_csv(outs[0] / "results.csv")
    model = table[table["predictor"] == "model"]
    assert summary["metrics"]["pds"]["model"] == pytest.approx(model["pds"].mean())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_with_content_is_not_written_into(written: Callable[..., Written], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    evaluation = evaluate(*written(), EvaluateConfig(cell_eval=False))
    for force in (False, True):
        with pytest.raises(InputError, match=r"not an empty folder: it holds notes.txt, which is never replaced"):
            evaluation.write(out, force=force)
        with pytest.raises(InputError, match="not an empty folder"):
            evaluation.write(out / "notes.txt", force=force)
    assert [path.name for path in out.iterdir()] == ["notes.txt"] and (out / "notes.txt").read_text() == "mine"


def test_an_older_evaluation_is_replaced_only_when_that_is_asked_for(
    written: Callable[..., Written], tmp_path: Path
) -> None:
    out, evaluation = tmp_path / "out", evaluate(*written(), EvaluateConfig(cell_eval=False))
    evaluation.write(out)
    table = (out / "results.csv").read_bytes()
    (out / "results.csv").write_text("older")
    with pytest.raises(InputError, match=r"not an empty folder\. Pass --force to replace"):
        evaluation.write(out)
    evaluation.write(out, force=True)
    assert (out / "results.csv").read_bytes() == table


def test_a_notebook_shows_the_means_over_pairs_as_a_small_table() -> None:
    table = pd.DataFrame({"cell_type": ["x"] * 4, "perturbation": ["A", "B"] * 2, "predictor": ["model"] * 4})
    summary = {"mae": {"model": 0.125, "ridge": 0.25}, "overall_score_over": {"ridge": 0.5}}
    assert repr(Evaluation(table, summary, {}, ())).splitlines() == [
        "Evaluation of 2 pairs (cell type, perturbation), means over them:",
        "                    model  ridge",
        "mae                0.1250 0.2500",
        "overall_score_over      - 0.5000",
    ]


def test_means_are_over_pairs_and_a_pair_without_a_score_is_not_passed_over(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "perturbation": ["A", "B", "A", "B"],
            "predictor": ["model", "model", "context_mean", "context_mean"],
            "n_real": [5, 6, 5, 6],
            "mae": [1.0, 2.0, 3.0, 4.5],
            "des": [0.5, 1.0, np.nan, 0.0],
        }
    )
    means = means_over_pairs(table)
    assert list(means) == ["mae", "des"] and list(means["mae"]) == ["model", "context_mean"]
    assert means["mae"] == {"model": 1.5, "context_mean": 3.75}
    assert means["des"]["model"] == 0.75 and np.isnan(means["des"]["context_mean"])
    Evaluation(table, means, {}, ("said",)).write(str(tmp_path / "out"))  # a path as text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metrics"]["des"] == {"model": 0.75, "context_mean": None}  # JSON has no NaN
    assert summary["notes"] == ["said"]


def test_what_was_written_is_read_again(written: Callable[..., Written], tmp_path: Path) -> None:
    made = evaluate(*written(), EvaluateConfig(cell_eval=False))
    made.table.loc[0, "cell_type"] = "NA"  # a name, and no missing value
    made.write(tmp_path / "scores")
    found = read_evaluation(tmp_path / "scores")
    pd.testing.assert_frame_equal(found.table, made.table, check_dtype=False)
    assert found.provenance == made.provenance and found.notes == made.notes and found.ceilings == made.ceilings
    for metric, scores in made.summary.items():
        assert found.summary[metric] == pytest.approx(scores, nan_ok=True), metric


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", "{", "cannot be read as an evaluation"),
        ("summary.json", "[]", "cannot be read as an evaluation"),
        ("results.csv", "a,b\n1,2\n", "cannot be read as an evaluation"),
        (None, "", "it has no results.csv"),
    ],
)
def test_what_is_no_evaluation_is_said(
    written: Callable[..., Written], tmp_path: Path, name: str | None, text: str, said: str
) -> None:
    folder = tmp_path / "scores"
    evaluate(*written(), EvaluateConfig(cell_eval=False)).write(folder)
    if name is None:
        (folder / "results.csv").unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_evaluation(folder)
