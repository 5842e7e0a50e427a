"""What `--help` shows: short enough to be read, whole words, examples that are commands; `--help-all` has the rest."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import pytest

from helpers.commands import COMMANDS, OPTIONS, Done

MOST_LINES, COLUMNS = 59, 80


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))


def flags(text: str) -> set[str]:
    """The options that stand at the beginning of a line."""
    named = re.findall(r"^  (?:-\w, )?--(\[no-\])?([a-z0-9-]+)", text, re.MULTILINE)
    return {f"--{name}" for _, name in named}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_on_a_page_of_80_columns_with_two_examples(sest: Callable[..., Done], command: str) -> None:
    lines = sest(*command.split(), "--help").out.rstrip().splitlines()
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) < COLUMNS
    assert not [line for line in lines if line.endswith("-") or re.search(r"\w\.\.\.$", line)]  # cut or broken words
    assert sum(line.startswith(("  sest ", "  torchrun ")) for line in lines[lines.index("Examples:") :]) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_has_every_option_and_help_says_how_many_it_left_out(sest: Callable[..., Done], command: str) -> None:
    every = {max(p.opts, key=len) for name, p in OPTIONS if name == command and p.param_type_name == "option"}
    short, full = (sest(command, option).out for option in ("--help", "--help-all"))
    assert every <= flags(full) <= every | {"--help", "--help-all"}
    left_out = every - flags(short)
    said = re.findall(r"^(\d+) options more: .* --help-all$", short, re.MULTILINE)
    assert said == ([str(len(left_out))] if left_out else [])
    assert "options more" not in full
    required = {max(p.opts, key=len) for name, p in OPTIONS if name == command and p.required}
    assert not required & left_out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_example_is_a_command_line_that_is_understood(command: str) -> None:
    for line in COMMANDS[command].callback.examples:
        words = shlex.split(line)
        words = words[words.index("sest") + 1 :]
        assert words[0] == command
        with COMMANDS[command].make_context(command, words[1:]) as parsed:
            assert not parsed.args


def test_names_of_the_usual_options_are_those_of_parameters() -> None:
    for name, command in COMMANDS.items():
        assert command.callback.usual <= {parameter.name for parameter in command.params}, name


def test_the_overview_names_every_command_below_a_heading(sest: Callable[..., Done]) -> None:
    text = sest("--help").out
    assert sorted(re.findall(r"^  (\w+)  +\S", text, re.MULTILINE)) == sorted(COMMANDS)
    assert "From cells to an answer:" in text.splitlines()
