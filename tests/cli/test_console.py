"""What is printed: plain lines where nobody interprets escape codes, tables that fit."""

from __future__ import annotations

import os
import pty
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.commands import Done
from helpers.processes import server
from sest.cli import console


def test_no_line_of_a_table_is_wider_than_a_terminal(sest: Callable[..., Done], demo: Demo) -> None:
    for path in (demo.cache, demo.run, demo.cells):
        assert max(map(len, sest("info", path).out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("variables", "live"), [({}, True), ({"JPY_PARENT_PID": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_notebook_s_terminal_gets_plain_lines(tmp_path: Path, variables: dict[str, str], live: bool) -> None:
    """`!sest ...` in a notebook runs under a pseudo-terminal whose escape codes nobody interprets."""
    ours, theirs = pty.openpty()
    words = ["simulate", str(tmp_path / "x.h5ad"), "--n-perturbations", "2", "--n-cells", "3"]
    environment = {**os.environ, "TERM": "xterm"} | variables
    process = server().start(["-m", "sest", *words], env=environment, terminal=theirs)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65_536):
            written += part
    except OSError:  # the other end is closed
        pass
    process.communicate()
    assert process.returncode == 0 and b"cells" in written
    assert (b"\x1b[?25l" in written) == live  # hides the cursor, to draw over lines


def test_a_log_file_gets_plain_lines_even_where_colour_is_forced(tmp_path: Path) -> None:
    words = ["simulate", str(tmp_path / "x.h5ad"), "--n-perturbations", "2", "--n-cells", "3"]
    done = server().run(["-m", "sest", *words], env={**os.environ, "FORCE_COLOR": "1"})
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr and "cells" in done.stderr


HOSTILE = "[/nope][red]a[/red] :smile: \x1b]0;title\x07\x1b[2J \u202egnp.exe\nError: forged"
SHOWN = r"[/nope][red]a[/red] :smile: \x1b]0;title\x07\x1b[2J \u202egnp.exe\nError: forged"


def test_names_from_files_are_text_wherever_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stream in (console.out, console.err):
        monkeypatch.setattr(stream, "width", 300)
    for print_line in (console.say, console.note, console.command):
        print_line(HOSTILE)
    console.table(HOSTILE, ["what", HOSTILE], [[HOSTILE, "1"]])
    console.error(HOSTILE)
    captured = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e"} & set(captured.out + captured.err)
    assert captured.out.count(SHOWN) == 4 and captured.err.count(SHOWN) == 2  # say; title, column, cell; note, command
    assert captured.err.splitlines()[-1] == "Error: " + SHOWN.replace(r"\n", " ")  # always one line


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("h5ad-markup-labels/escape_labels.h5ad", "[/nope]"),
        ("h5ad-markup-labels/escape_columns.h5ad", "[/bold]"),
        ("h5ad-escape-gene/escape_layer.h5ad", r"\x1b[31mlayer["),
        ("h5ad-escape-gene/escape_gene_dup.h5ad", r"\x1b]0;pwned"),
    ],
)
def test_names_in_cells_of_others_reach_the_terminal_as_text(
    sest: Callable[..., Done], shared_cases: Path, file: str, expected: str
) -> None:
    done = sest("info", shared_cases / "faults" / file)
    assert done.code in (0, 2) and "\x1b" not in done.out + done.err
    assert expected in (done.out + done.err).replace("\n", "")
