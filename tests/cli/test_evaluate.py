"""`sest evaluate` overwrites nothing unasked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.commands import Done
from helpers.demo_cells import CONTROL


def test_an_older_evaluation_is_replaced_only_when_that_is_asked_for(
    sest: Callable[..., Done], refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.folder / "evaluation", tmp_path / "evaluation")
    words = ("evaluate", demo.folder / "predicted.h5ad", demo.cells, "--out", tmp_path / "evaluation")
    assert "not an empty folder. Pass --force" in refused(*words)
    assert sest(*words, "--no-cell-eval", "--force").code == 0


def test_a_folder_that_holds_what_is_evaluated_is_never_replaced(
    refused: Callable[..., str], demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.folder / "evaluation", tmp_path / "out")
    shutil.copy(demo.folder / "predicted.h5ad", tmp_path / "out" / "results.csv")
    words = ("evaluate", tmp_path / "out" / "results.csv", demo.cells, "--out", tmp_path / "out", "--force")
    assert "results.csv, which this command reads: never replaced" in refused(*words)


def test_a_suite_says_what_to_install_and_which_there_are(
    demo: Demo, sest: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (demo.folder / "predicted.h5ad", demo.cells)
    done = sest("evaluate", *files, "--suite", "vcc2027", "-o", tmp_path / "o")
    assert done.code == 2 and "it takes one of: vcc2025, vcc2026" in done.err
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    done = sest("evaluate", *files, "--suite", "vcc2026", "-o", tmp_path / "o")
    assert done.code == 2 and "pip install 'sest[challenge]'" in done.err and not (tmp_path / "o").exists()


def test_the_scores_of_the_challenge_stand_below_those_of_sest(
    demo: Demo, sest: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is a script that refuses every pair; tests/compat/test_suite.py runs the real ones."""
    script = tmp_path / "cell-eval"
    script.write_text(f"#!{sys.executable}\nraise SystemExit('no measurable effect')\n")
    script.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name, path=None: str(script))
    predicted = demo.folder / "predicted.h5ad"
    asked = ("--suite", "vcc2025", "--control", CONTROL, "-o", tmp_path / "o")
    done = sest("evaluate", predicted, demo.cells, *asked)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "context beta: predicted.h5ad" in said and "The package says: no measurable effect" in said
    assert (tmp_path / "o" / "suite.csv").is_file()
    assert (tmp_path / "o" / "contexts" / "beta" / "sest" / "summary.json").is_file()
    again = sest("evaluate", predicted, demo.cells, *asked)
    assert again.code == 2 and "Pass --force" in again.err
    assert sest("evaluate", predicted, demo.cells, *asked, "--force").code == 0
