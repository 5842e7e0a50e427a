"""JSON in files that nobody vouches for: bounded, and checked against what it must say before anything uses it.

A kind is a function of a value that raises `Wrong` where the value is none of its kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sest.errors import InputError, one_line

MAX_BYTES = 2**25  # of a file that is read whole: as Python's objects at most 20 times as many
LARGEST = 2**53  # a whole number that every program reads as it is
LONGEST = 2**16  # characters of a text

Kind = Callable[[Any], None]


class Wrong(Exception):
    """A value is none of its kind: where in the whole, and what it is instead."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(f"{where} {what}".strip())
        self.what, self.where = what, where


def whole(least: int = 0, most: int = LARGEST) -> Kind:
    """A whole number."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise Wrong(f"is {_brief(value)}, not a whole number from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf, *, finite: bool = True) -> Kind:
    """A number; not `finite`: also NaN and infinity."""

    def check(value: Any) -> None:
        if type(value) not in (int, float) or (isinstance(value, int) and abs(value) > LARGEST**8):
            raise Wrong(f"is {_brief(value)}, not a number")
        if (finite and not math.isfinite(value)) or not (math.isnan(value) or least <= value <= most):
            raise Wrong(f"is {_brief(value)}, not a number" + (f" from {least:g} to {most:g}" if finite else ""))

    return check


def text(*choices: str) -> Kind:
    """A text; one of the `choices` where there are any."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > LONGEST or (choices and value not in choices):
            raise Wrong(f"is {_brief(value)}, not " + (" or ".join(map(repr, choices)) if choices else "text"))

    return check


def flag(value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise Wrong(f"is {_brief(value)}, not true or false")


def maybe(kind: Kind) -> Kind:
    """null, or of the kind."""

    def check(value: Any) -> None:
        if value is not None:
            kind(value)

    return check


def list_of(kind: Kind, n: int | None = None) -> Kind:
    """A list of values of one kind, `n` of them where that is given."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or n not in (None, len(value)):
            raise Wrong(f"is {_brief(value)}, not a list" + (f" of {n}" if n is not None else ""))
        for i, item in enumerate(value):
            _inside(f"[{i}]", kind, item)

    return check


def mapping_of(kind: Kind) -> Kind:
    """Values of one kind by names."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Wrong(f"is {_brief(value)}, not a mapping")
        for name, item in value.items():
            _inside(name, kind, item)

    return check


def record(required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """Named values of a kind each; names that are not listed may be there as well."""
    kinds = {**required, **(optional or {})}

    def check(value: Any) -> None:
        mapping_of(_anything)(value)
        if missing := [name for name in required if name not in value]:
            raise Wrong(f"has no {missing[0]!r}")
        for name, kind in kinds.items():
            if name in value:
                _inside(name, kind, value[name])

    return check


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """What a file says.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, is larger than `most` bytes, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    if len(data) > most:
        raise InputError(f"{path} is larger than {most / 1e6:.0f} MB.")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise InputError(f"{path} is no JSON that can be read: its brackets are nested too deeply.") from error
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of thousands of digits
        raise InputError(f"{path} is no JSON ({one_line(error)}).") from error


def check_plain(value: Any, kind: Kind, where: object) -> None:
    """Refuse a value that is not of the kind; `where` it is from.

    Raises:
        InputError: the first that is wrong.
    """
    try:
        kind(value)
    except Wrong as wrong:
        raise InputError(f"{where}{':' if wrong.where else ''} {wrong}.") from wrong


def _inside(name: str, kind: Kind, value: Any) -> None:
    try:
        kind(value)
    except Wrong as wrong:
        inner = wrong.where if wrong.where.startswith("[") or not wrong.where else f".{wrong.where}"
        raise Wrong(wrong.what, f"{name[:60]}{inner}") from None


def _anything(value: Any) -> None:
    """Of every kind."""


def _brief(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return repr(value)[:40]
