"""Bars on a terminal, lines elsewhere, and what is left of a step that has ended."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from sest.cli import console
from sest.cli.progress import ConsoleProgress


def test_a_finished_step_is_said_when_it_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    with ConsoleProgress() as progress:
        progress.begin("Reading", 10, "cells")
        progress.advance(10)
        assert "Reading: 10/10 cells" in capsys.readouterr().err
        progress.command("sest next")
        assert capsys.readouterr().err.strip() == "$ sest next"
        progress.begin("Training", 10, "it")
        progress.advance(4)  # stopped early
        progress.command("sest after")
        stopped, command = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stopped.startswith("Training: 4/10 it") and command == "$ sest after"
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_one_bar_and_commands_that_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, force_terminal=True, width=80))
    text = "sest train demo/cache.zarr --run demo/run " + " ".join(f"--option-{i} {i}" for i in range(9))
    with ConsoleProgress() as progress:
        progress.command(text)
        progress.begin("Reading", 10, "cells")
        progress.advance(10)
        progress.note("a note")
        progress.begin("Writing", 10, "cells")
        progress.advance(4)
        assert progress._bars is not None and len(progress._bars.tasks) == 1
        progress.begin("Training", 10, "it")
        assert not progress._bars  # the panel takes its place
        progress.advance(4)
        progress.note("between")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    assert text in re.sub(r" \\\n +", " ", plain)
    assert max(map(len, re.split(r"[\r\n]", plain))) <= 80
    assert plain.index("$ sest") < plain.index("Reading: 10/10 cells") < plain.index("a note")
    assert plain.index("Writing: 4/10 cells") < plain.index("between")
    last = plain.rindex("Training")  # what is left on the screen
    assert "step 4/10" in plain[last:] and "between" not in plain[last:]


def test_a_validation_in_words_says_what_it_beats_and_where_that_is_no_measure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = {"step": 5, "val_loss": 1.0, "val_loss_perturbation_mean": 1.5, "pearson_delta": 0.5, "pds": 0.9}
    for change, words in (
        ({}, "(better than the perturbation mean, 1.5000)"),
        ({"val_loss": 2.0}, "(not yet better than the perturbation mean, 1.5000)"),
        ({"val_pairs": 9, "val_pairs_not_measurable": 9}, "(no measure; beside the perturbation mean, 1.5000)"),
        ({"val_pairs": 9, "val_pairs_not_measurable": 0}, "(better than the perturbation mean, 1.5000)"),
    ):
        with ConsoleProgress() as progress:
            progress.begin("Training", 10, "it")
            progress.show(line | change)
        assert words in capsys.readouterr().err
