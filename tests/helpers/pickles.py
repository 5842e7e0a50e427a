"""Pickles that call what they like when a careless reader loads them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class Pickled:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


def pretend_module(monkeypatch: pytest.MonkeyPatch, name: str, *members: Any) -> None:
    """Make `members` importable from a module `name`, as they were where the checkpoint was saved."""
    monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType(name.partition(".")[0]))
    module = types.ModuleType(name)
    for member in members:
        member.__module__ = name
        member.__qualname__ = member.__name__
        setattr(module, member.__name__, member)
    monkeypatch.setitem(sys.modules, name, module)
