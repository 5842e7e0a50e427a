"""Typer options read from the configuration classes: help, unit and default are written once, in sest/config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import typer

from sest.config import Config


def opt(config: type[Config], name: str, flag: str | None = None, parser: Callable[[str], Any] | None = None) -> Any:
    """The Typer option for a field. Not given on the command line means None: then a file or the default decides."""
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    default, choices = field.default, field.metadata["choices"]
    text = field.metadata["help"]
    if choices:
        text += f" ({' | '.join(choices)})"
    if isinstance(default, bool):
        text += " [default: on]" if default else " [default: off]"
    elif default not in (None, ""):
        text += f" [default: {default}]"
    elif default is None and "default: " not in text:
        text += " [default: none]"
    flag = flag or "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if isinstance(default, bool) else [flag]
    return typer.Option(*flags, help=text, show_default=False, parser=parser)


def whole_or_auto(text: str) -> int:
    """A whole number; "auto" is 0."""
    if text == "auto":
        return 0
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'.") from None


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}
