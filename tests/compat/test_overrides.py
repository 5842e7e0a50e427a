"""Overrides in Hydra's form: what is read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sest.compat.overrides import parse_overrides
from sest.errors import InputError


@pytest.mark.parametrize("sign", ["", "+", "++"])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("-3", -3),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("run1", "run1"),
        ("a=b", "a=b"),
        ("SE-600M/se.ckpt", "SE-600M/se.ckpt"),
        ("'16'", "16"),
        ('"null"', "null"),
        ("'it\\'s'", "it's"),
        ("'[a, b]'", "[a, b]"),
        ("nan", "nan"),  # a number nobody may mean
        ("9" * 30, 1e30),
    ],
)
def test_values_are_read_as_hydra_reads_them(sign: str, text: str, value: Any) -> None:
    found = parse_overrides([f"{sign}a.b_c={text}"])["a.b_c"].value
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["~training.patience"], "'~training.patience' deletes a key"),
        (["--config-name=x"], "'--config-name=x' is not ++KEY=VALUE"),
        (["train"], "'train' is not ++KEY=VALUE"),
        (["++=3"], "is not ++KEY=VALUE"),
        (["++wandb.tags=[a,b]"], "wandb.tags=[a,b]: lists, dictionaries"),
        (["a={b: 1}"], "lists, dictionaries"),
        (["a=${oc.env:HOME}"], "lists, dictionaries"),
        (["++name="], "name has no value. Give ++name=VALUE"),
        (["++a.b=1", "a.b=2"], "a.b is given twice, as 1 and as 2"),
        (["++a.b=1", "++a.b=1"], "a.b is given twice"),
    ],
)
def test_what_is_no_plain_override_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_overrides(words)
    assert message in str(refused.value)


def test_an_override_is_shown_as_it_is_written() -> None:
    assert str(parse_overrides(["a.b='c d'"])["a.b"]) == "++a.b=c d"
