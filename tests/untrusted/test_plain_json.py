"""JSON of others: bounded, and refused with the place of what is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sest.errors import InputError
from sest.untrusted.plain_json import (
    Kind,
    check_plain,
    flag,
    list_of,
    mapping_of,
    maybe,
    number,
    read_json,
    record,
    text,
    whole,
)

KIND = record({"n": whole(1, 9), "of": mapping_of(list_of(number()))}, {"word": maybe(text("a", "b"))})


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (whole(), [0, 2**53], [-1, 2**53 + 1, 1.0, True, None, "1", [1]]),
        (number(), [0, -1.5, 1e308], [math.nan, math.inf, -math.inf, True, None, "1", 10**500]),
        (number(finite=False), [math.nan, math.inf, 3], [None, "nan"]),
        (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, 10**20]),
        (text(), ["", "x" * 1000], [None, 1, "x" * 100_000, []]),
        (text("a", "b"), ["a"], ["c", ""]),
        (flag, [True, False], [0, 1, None, "true"]),
        (maybe(flag), [None, True], [0]),
        (list_of(whole()), [[], [1, 2]], [{}, "ab", [1, -1], None]),
        (list_of(whole(), 2), [[1, 2]], [[], [1], [1, 2, 3]]),
        (mapping_of(whole()), [{}, {"a": 1}], [[], {"a": -1}]),
        (KIND, [{"n": 1, "of": {}}, {"n": 9, "of": {"x": [1.5]}, "word": None, "new": {"any": 1}}], [{}, {"n": 1}, []]),
    ],
)
def test_a_value_is_of_its_kind_or_refused(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_plain(value, kind, "x")
    for value in bad:
        with pytest.raises(InputError):
            check_plain(value, kind, "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"of": {}}, "state has no 'n'."),
        ({"n": 10**12, "of": {}}, "state: n is 1000000000000, not a whole number from 1 to 9."),
        ({"n": 1, "of": {"x": [1, None]}}, "state: of.x[1] is None, not a number."),
        ({"n": 1, "of": {}, "word": "c"}, "state: word is 'c', not 'a' or 'b'."),
    ],
)
def test_the_line_names_the_place(value: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_plain(value, KIND, "state")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "brackets are nested too deeply"),
        (b"{", "is no JSON"),
        (b'"\xff"', "is no JSON"),
        (b"1" * 5_000, "is no JSON"),
        (b" " * 1_001, "is larger than"),
    ],
)
def test_what_is_no_json_or_too_much_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(tmp_path / "a.json", 1_000 if content[:1] == b" " else 2**20)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_for_the_caller(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="Cannot read"):
        read_json(tmp_path)
