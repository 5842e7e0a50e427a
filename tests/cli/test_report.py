"""`sest report`: what it says when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Demo

from helpers.commands import Done


def test_a_report_without_the_model_says_what_it_found_and_where_it_is(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    done = sest("report", demo.run, "--out", tmp_path / "r.html", "--no-model")
    assert done.code == 0 and "Diagnosis of run" in done.out
    assert f"Written: {tmp_path}/r.html" in done.out and (tmp_path / "r.html").is_file()
