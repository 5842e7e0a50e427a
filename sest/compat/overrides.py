"""Overrides on a command line in Hydra's form, as far as the ancestor's documentation uses it.

    ++a.b=value    +a.b=value    a.b=value    set a.b; here the three mean the same
    'text'    "text"                          text, whatever is in it
    true    false    null    16    1e-4       words in any case; null is as good as not given

Grammar: hydra.cc/docs/advanced/override_grammar/basic. What has no meaning for one run of known keys (deletions, lists,
dictionaries, interpolations, Hydra's own options) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sest.errors import InputError

_OVERRIDE = re.compile(r"(?:\+\+|\+)?([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""(['"])(.*)\1""", re.DOTALL)
_WHOLE = re.compile(r"[+-]?\d+(?:_\d+)*", re.ASCII)
_REAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WORDS = {"true": True, "false": False, "null": None}

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Override:
    """One key and what it is set to."""

    key: str  # with dots
    text: str  # the value as written, without quotes
    value: Value

    def __str__(self) -> str:
        return f"++{self.key}={self.text}"


def parse_overrides(words: Sequence[str]) -> dict[str, Override]:
    """Read the words of a command line, by key.

    Raises:
        InputError: a word of another form, a list or another value that is not plain, or a key given twice.
    """
    found: dict[str, Override] = {}
    for word in words:
        override = _parse(word)
        if override.key in found:
            raise InputError(
                f"{override.key} is given twice, as {found[override.key].text} and as {override.text}. Keep one."
            )
        found[override.key] = override
    return found


def _parse(word: str) -> Override:
    if word.startswith("~"):
        raise InputError(f"'{word}' deletes a key, which is not needed here: leave the key out, or give KEY=null.")
    match = _OVERRIDE.fullmatch(word)
    if match is None:
        raise InputError(f"'{word}' is not ++KEY=VALUE. --help lists the keys.")
    key, raw = match[1], match[2].strip()
    if raw.startswith(("[", "{")) or "${" in raw:
        raise InputError(
            f"{key}={raw}: lists, dictionaries and ${{...}} are not read here. Give one plain value (text that looks "
            "like a list in quotes)."
        )
    if not raw:
        raise InputError(f"{key} has no value. Give ++{key}=VALUE, or leave it out.")
    if quoted := _QUOTED.fullmatch(raw):
        text = quoted[2].replace("\\" + quoted[1], quoted[1])
        return Override(key, text, text)
    return Override(key, raw, _plain(raw))


def _plain(raw: str) -> Value:
    if raw.lower() in _WORDS:
        return _WORDS[raw.lower()]
    if _WHOLE.fullmatch(raw) and len(raw) <= 20:
        return int(raw)
    return float(raw) if _REAL.fullmatch(raw) else raw
