"""The pages of `--help`: what a command does, its usual options, examples; those of `--help-all` have every option."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

Function = TypeVar("Function", bound=Callable[..., Any])
HELP_ALL = "help_all"  # name of that option, and key of a context's `meta` once it was given
WIDEST = 30  # characters of names, beyond which their text begins on a line of its own


def help_page(*examples: str, usual: str = "") -> Callable[[Function], Function]:
    """Give a command the examples of its help and the options that `--help` shows.

    Args:
        examples: command lines as one would type them.
        usual: names of parameters; those left out, unless they are required, are for `--help-all`. "": all are shown.
    """

    def extend(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        own = list(signature.parameters.values())
        asked = Parameter(HELP_ALL, Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _help_all()])

        @functools.wraps(function)
        def command(*arguments: Any, **values: Any) -> Any:
            values.pop(HELP_ALL, None)  # its callback has answered
            return function(*arguments, **values)

        signature = signature.replace(parameters=[*own, asked])
        vars(command).update(examples=examples, usual=frozenset(usual.split()), __signature__=signature)
        return command  # type: ignore[return-value]

    return extend


def _help_all() -> Any:
    def answer(ctx: typer.Context, asked: bool) -> None:
        if asked and not ctx.resilient_parsing:
            ctx.meta[HELP_ALL] = True
            typer.echo(ctx.get_help())
            raise typer.Exit

    help = "Show every option and exit."
    return typer.Option("--help-all", is_eager=True, callback=answer, help=help, show_default=False)


class Command(TyperCommand):
    """A command with such pages."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page: usage, what it does, options, examples, how many options more there are."""
        self.format_usage(ctx, formatter)
        _write_text(formatter, self.help or "")
        left_out = self._write_options(ctx, formatter)
        _write_examples(formatter, vars(self.callback)["examples"])
        if left_out:
            formatter.write(f"\n{left_out} options more: {ctx.command_path} --help-all\n")

    def _write_options(self, ctx: Any, formatter: Any) -> int:
        """Write the options below their headings; returns how many were left out."""
        usual = frozenset() if ctx.meta.get(HELP_ALL) else vars(self.callback)["usual"]
        sections: dict[str, list[tuple[str, str]]] = {}
        left_out = 0
        for parameter in sorted(self.get_params(ctx), key=lambda p: p.name == HELP_ALL):
            is_argument = parameter.param_type_name == "argument"
            heading = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
            record = parameter.get_help_record(ctx)
            if record is None or (parameter.name == HELP_ALL and not vars(self.callback)["usual"]):
                continue
            if usual and not (parameter.required or parameter.name in {*usual, "help", HELP_ALL}):
                left_out += 1
                continue
            names = re.sub(r"--(\S+) / --no-\1\b", r"--[no-]\1", record[0])
            names = re.sub(r"<(?:list\[)?(\w+)(?:\]| range)?>", lambda kind: f"<{kind[1].lower()}>", names)
            sections.setdefault(heading, []).append((names, record[1]))
        for heading, rows in sections.items():
            with formatter.section(heading):
                _write_rows(formatter, rows)
        return left_out


class Group(TyperGroup):
    """The overview: commands below the headings they were given (`rich_help_panel`), each with its first sentence."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page: usage, commands, options, examples."""
        self.format_usage(ctx, formatter)
        _write_text(formatter, self.help or "")
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            first = inspect.cleandoc(command.help or "").partition("\n\n")[0]
            sections.setdefault(command.rich_help_panel, []).append((name, first))  # type: ignore[attr-defined]
        options = [record for parameter in self.get_params(ctx) if (record := parameter.get_help_record(ctx))]
        for heading, rows in {**sections, "Options": options}.items():
            with formatter.section(heading):
                _write_rows(formatter, rows)
        _write_examples(formatter, (self.epilog or "").splitlines())


def _write_text(formatter: Any, text: str) -> None:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        formatter.write("\n" + _wrapped(paragraph, formatter.width, "  ", "  "))


def _write_examples(formatter: Any, examples: Sequence[str]) -> None:
    if not examples:
        return
    with formatter.section("Examples"):
        for line in examples:
            formatter.write(f"  {line}\n")


def _write_rows(formatter: Any, rows: Sequence[tuple[str, str]]) -> None:
    """Names and their texts, in two columns."""
    column = min(max(len(names) for names, _ in rows), WIDEST) + 4
    for names, text in rows:
        begin = f"  {names}"
        if len(begin) > column - 2:
            formatter.write(f"{begin}\n")
            begin = ""
        formatter.write(_wrapped(text, formatter.width, begin.ljust(column), " " * column))


def _wrapped(text: str, width: int, first: str, rest: str) -> str:
    """The text in lines that begin so; options stay whole."""
    words = " ".join(text.split())
    return textwrap.fill(words, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) + "\n"
