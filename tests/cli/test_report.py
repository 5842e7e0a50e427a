"""`sest report`: what it says when it is done, and where it writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.commands import Done


def test_a_report_without_the_model_says_what_it_found_and_where_it_is(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    done = sest("report", demo.run, "--out", tmp_path / "r.html", "--no-model")
    assert done.code == 0 and "Diagnosis of run" in done.out
    assert f"Written: {tmp_path}/r.html" in done.out and (tmp_path / "r.html").is_file()


def test_only_a_report_at_its_default_place_is_replaced_without_being_asked(
    sest: Callable[..., Done],
    refused: Callable[..., str],
    demo: Demo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, mine = tmp_path / "run", tmp_path / "report.html"
    shutil.copytree(demo.run, run)
    shutil.copytree(demo.run, tmp_path / "other")
    shutil.copy(demo.folder / "report.html", run / "report.html")
    older = (run / "report.html").read_bytes()
    assert sest("report", run, "--no-model").code == 0 and (run / "report.html").read_bytes() != older
    assert "exists. Pass --force" in refused("report", run, "--no-model", "--out", run / "report.html")
    monkeypatch.chdir(tmp_path)
    mine.write_text("<html>mine</html>")
    assert "report.html exists. Pass --force" in refused("report", run, "other", "--no-model")
    assert sest("report", run, "other", "--no-model", "--force").code == 0
    assert sest("report", run, "other", "--no-model").code == 0 and "2 runs compared" in mine.read_text()


def test_no_report_is_written_over_what_the_run_is(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    link = tmp_path / "r.html"
    link.symlink_to(demo.run / "metrics.jsonl")
    assert "is used by this command already" in refused("report", demo.run, "--out", link, "--force")
