"""What is printed: plain lines where nobody interprets escape codes, tables that fit."""

from __future__ import annotations

import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Demo

from helpers.commands import Done
from sest.cli.console import duration


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
    process = subprocess.Popen(
        [sys.executable, "-m", "sest", *words],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"} | variables,
    )
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65_536):
            written += part
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0 and b"cells" in written
    assert (b"\x1b[?25l" in written) == live  # hides the cursor, to draw over lines


def test_a_log_file_gets_plain_lines_even_where_colour_is_forced(tmp_path: Path) -> None:
    words = ["simulate", str(tmp_path / "x.h5ad"), "--n-perturbations", "2", "--n-cells", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "sest", *words], capture_output=True, env={**os.environ, "FORCE_COLOR": "1"}, check=True
    )
    assert b"\x1b" not in done.stdout + done.stderr and b"cells" in done.stderr


def test_durations_are_in_the_unit_a_person_would_use() -> None:
    seconds = [0.4, 59.4, 60, 3540, 3600, 11_100, math.inf]
    assert [duration(s) for s in seconds] == ["0 s", "59 s", "1 min", "59 min", "1 h 00 min", "3 h 05 min", "?"]
