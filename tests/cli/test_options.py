"""Options made from configurations: explained, of one meaning in every command, answered when renamed."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from helpers.commands import COMMANDS, OPTIONS, Done
from sest.cli.help import Command, help_page
from sest.cli.options import options
from sest.config import EmbedConfig, EvaluateConfig, PredictConfig, ReportConfig, TrainConfig
from sest.options import RENAMED, Config, option

OTHER_MEANINGS = {"--batch-size": "a forward pass of the encoder takes cells, one of the head sets of cells"}


@pytest.mark.parametrize(
    ("command", "parameter"), OPTIONS, ids=[f"{name} {parameter.name}" for name, parameter in OPTIONS]
)
def test_every_option_has_help_and_says_what_happens_without_it(command: str, parameter: Any) -> None:
    assert parameter.help and len(parameter.help) > 5
    _, text = parameter.get_help_record(typer.Context(COMMANDS[command]))
    assert parameter.required or "default: " in text, text


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("embed", EmbedConfig),
        ("train", TrainConfig),
        ("predict", PredictConfig),
        ("evaluate", EvaluateConfig),
        ("report", ReportConfig),
    ],
)
def test_every_field_of_a_configuration_is_an_option(command: str, config: type[Config]) -> None:
    module = importlib.import_module(f"sest.cli.{command}")
    assert set(config.names()) <= set(inspect.signature(getattr(module, command)).parameters)


def meaning(parameter: Any) -> str:
    """What an option is: its help up to the first colon, semicolon or bracket; what follows is of one command."""
    return re.split(r"[;:(\[]", parameter.help)[0].strip()


def test_an_option_of_one_name_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[str]] = {}
    for _, parameter in OPTIONS:
        for flag in parameter.opts:
            if flag.startswith("--"):
                meanings.setdefault(flag, set()).add(meaning(parameter))
    assert {flag: found for flag, found in meanings.items() if len(found) > 1}.keys() == OTHER_MEANINGS.keys()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["embed", "--checkpoint", "se600m.ckpt"], "--checkpoint is now --weights."),
        (["convert", "SE-600M", "--checkpoint=se600m.ckpt"], "--checkpoint is now --weights."),
        (["train", "cache.zarr", "--run", "run", "--controls", "batch"], "--controls is now --match-controls."),
        (["predict", "--counts", "table.csv"], "--counts is now --list."),
        (["predict", "run", "--out", "o.h5ad", "--cells", "new.h5ad"], "--cells is now --controls."),
    ],
)
def test_an_option_that_was_renamed_answers_with_its_new_name(
    refused: Callable[..., str], sest: Callable[..., Done], words: list[str], answer: str
) -> None:
    assert refused(*words) == f"Error: {answer}"
    assert answer.split()[0] not in re.findall(r"^  (--[a-z-]+)", sest(words[0], "--help").out, re.MULTILINE)


def test_no_old_name_is_in_use_again() -> None:
    for config in (EmbedConfig, TrainConfig, PredictConfig):
        renamed = RENAMED[config.__name__]
        assert not set(renamed) & set(config.names()) and set(renamed.values()) <= set(config.names())


@dataclass(frozen=True)
class Brewing(Config):
    """What a made-up command takes."""

    water: float = option(0.25, "litres", least=0.0)
    sugar: bool = option(False, "sweeten")
    kind: str = option("green", "of tea", choices=("green", "black"))
    minutes: int | str | None = option(None, "how long", choices=("long",))
    name: str | None = option(None, "on the cup; default: none is written")


def brew() -> tuple[typer.Typer, list[dict[str, Any]]]:
    """A command made from `Brewing`, and what it is handed."""
    app, handed = typer.Typer(rich_markup_mode=None), list[dict[str, Any]]()

    @app.command(cls=Command)
    @help_page()
    @options(Brewing, {"Taste": "kind sugar minutes", "Size": "water"}, water={"flag": "--litres"})
    def tea(pot: Annotated[str, typer.Argument(help="pot")], name: str = "own", **options: Any) -> None:
        handed.append({"pot": pot, "name": name, **options})

    return app, handed


def test_a_command_is_handed_the_options_that_were_given_and_no_others() -> None:
    app, handed = brew()
    for words in (["p"], ["p", "--no-sugar", "--minutes", "5", "--litres", "1"], ["p", "--sugar", "--name", "mine"]):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert handed == [
        {"pot": "p", "name": "own"},
        {"pot": "p", "name": "own", "sugar": False, "minutes": "5", "water": 1.0},
        {"pot": "p", "name": "mine", "sugar": True},
    ]


def test_the_help_shows_options_below_their_headings_with_choices_and_defaults() -> None:
    text = CliRunner().invoke(brew()[0], ["--help"]).output
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["Arguments", "Options", "Taste", "Size"]
    taste = " ".join(text.partition("Taste:")[2].partition("Size:")[0].split())
    assert taste == (
        "--kind <str> of tea (green | black) [default: green] --[no-]sugar sweeten [default: off] "
        "--minutes <str> how long (N | long) [default: none]"
    )
    assert text.partition("Size:")[2].split() == "--litres <float> litres [default: 0.25]".split()
