"""The one error a user is meant to see, and the words it is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one line that says what is wrong, what exists and what to do (exit code 2)."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"


def shown(names: Iterable[str], limit: int = 8) -> str:
    """Join names for an error line: the first `limit` of them and how many more there are."""
    names = [str(name) for name in names]
    if not names:
        return "(none)"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class TrainingFailed(Exception):
    """Training cannot go on (exit code 1): what happened, what is kept, what to try."""
