"""Typer options made from the configurations: name, type, help and default are written once, in sest/config.py."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Annotated, Any, TypeVar

import typer

from sest.config import TrainConfig
from sest.errors import InputError
from sest.head.preset import OPTIONS
from sest.options import RENAMED, Config

Force = Annotated[
    bool,
    typer.Option("--force", help="replace the output where it exists; never what is read [default: off]"),
]
Function = TypeVar("Function", bound=Callable[..., Any])


def options(
    config: type[Config], groups: Mapping[str, str] | None = None, **changes: Mapping[str, Any]
) -> Callable[[Function], Function]:
    """Give a command, whose last parameter is `**options`, an option for every field of `config`.

    The command is handed those that were given, by field: what was not given is for a file or the default to decide.
    Fields that the command has a parameter of its own for are left to it.

    Args:
        groups: heading in the help -> names of the fields below it; None: all, below no heading of their own.
        changes: field -> arguments for `opt` that the field does not give.
    """
    names = [name for text in groups.values() for name in text.split()] if groups else config.names()
    heading_of = {name: heading for heading, text in (groups or {}).items() for name in text.split()}

    def extend(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = {name: p for name, p in signature.parameters.items() if p.kind != Parameter.VAR_KEYWORD}
        made = [
            _parameter(name, _kind(config, name), opt(config, name, heading_of.get(name), **changes.get(name, {})))
            for name in names
            if name not in own
        ]
        renamed = RENAMED.get(config.__name__, {}).items()
        moved = [_parameter(old, str, _moved(old, new)) for old, new in renamed if new in names]

        @functools.wraps(function)
        def command(*arguments: Any, **values: Any) -> Any:
            return function(*arguments, **{name: value for name, value in values.items() if value not in (None, [])})

        command.__signature__ = signature.replace(parameters=[*own.values(), *made, *moved])  # type: ignore[attr-defined]
        return command  # type: ignore[return-value]

    return extend


def opt(
    config: type[Config],
    name: str,
    heading: str | None = None,
    *,
    flag: str | None = None,
    parser: Callable[[str], Any] | None = None,
) -> Any:
    """The Typer option for a field. Not given on the command line means None: then a file or the default decides."""
    flag = flag or "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if _kind(config, name) is bool else [flag]
    text = help_of(config, name)
    return typer.Option(*flags, help=text, show_default=False, parser=parser, rich_help_panel=heading)


def help_of(config: type[Config], name: str, *, preset: bool = True) -> str:
    """The line that a field's option has in the help: what it is, what it takes, and its default.

    `preset`: whether a preset chooses where nothing is given.
    """
    field = next(f for f in dataclasses.fields(config) if f.name == name)
    default, choices, text = field.default, field.metadata["choices"], str(field.metadata["help"])
    if choices:
        number = ["N"] if {int, float} & set(config.kinds()[name]) else []
        text += f" ({' | '.join([*number, *choices])})"
    if default is None and "default: " in text:
        return text
    if isinstance(default, bool):
        said = "on" if default else "off"
    elif isinstance(default, float):
        said = f"{default:g}"
    elif isinstance(default, tuple):
        said = ",".join(default)
    else:
        said = "none" if default is None else str(default)
    if preset and config is TrainConfig and name in OPTIONS:
        said = f"by --preset; full: {said}"
    return f"{text} [default: {said}]" if said else text


def _kind(config: type[Config], name: str) -> type:
    """What Typer reads for a field: text, where words and numbers may stand, or several words; texts, where one may."""
    kinds = [kind for kind in config.kinds()[name] if kind is not type(None)]
    if {str, tuple} <= set(kinds):
        return list[str]
    return str if {str, tuple} & set(kinds) else kinds[0]


def _parameter(name: str, kind: type, option: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _moved(old: str, new: str) -> Any:
    """An option that is not in the help and, where it is given, answers with its new name."""
    flag, now = (f"--{name.replace('_', '-')}" for name in (old, new))

    def answer(value: str | None) -> None:
        if value is not None:
            raise InputError(f"{flag} is now {now}.")

    return typer.Option(flag, hidden=True, is_eager=True, callback=answer)  # eager: before what else is missing


def whole_or_auto(text: str) -> int:
    """A whole number; "auto" is 0."""
    if text == "auto":
        return 0
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'.") from None
