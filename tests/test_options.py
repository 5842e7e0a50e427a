"""What an option is: checked, explained and read from TOML. The configurations themselves: test_config.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sest.errors import InputError
from sest.options import Config, option, plain, read_toml, seconds_of


@dataclass(frozen=True)
class Example(Config):
    """A number, a word or a number, and a list."""

    size: float = option(1.0, "how large", least=0.0, most=2.0)
    width: int | str = option("auto", "how wide", choices=("auto",), least=1)
    who: str | tuple[str, ...] | None = option(None, "names")


def test_values_are_kept_as_what_they_stand_for() -> None:
    example = Example.from_values({"size": 1, "width": "7", "who": ["a"]}, "here")
    assert (example.size, example.width, example.who) == (1.0, 7, "a") and isinstance(example.size, float)
    assert example.to_values() == {"size": 1.0, "width": 7, "who": "a"}
    assert Example().to_values() == {"size": 1.0, "width": "auto"}
    assert Example.kinds()["who"] == (str, tuple, type(None))
    assert plain("a, b", (tuple,)) == ("a", "b") and plain("a, b", (str, tuple)) == "a, b"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 3}, "size is 3.0; it must be at most 2"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"width": "atuo"}, "width is 'atuo'; it takes a whole number or one of: auto. Did you mean 'auto'"),
        ({"whoo": "a"}, "Unknown key 'whoo' in here. Did you mean 'who'"),
    ],
)
def test_what_is_out_of_its_limits_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Example.from_values(values, "here")
    assert message in str(error.value)


def test_read_toml_takes_dashes_for_underscores(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("max-steps = 7\nset_size = 3\n")
    assert read_toml(tmp_path / "a.toml") == {"max_steps": 7, "set_size": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.toml: cannot read it: No such file"),
        (b"max_steps = ", "not valid TOML"),
        (b"a = '\xff'", "not UTF-8 text .at line 1"),
        (b"a = " + b"[" * 100_000, "brackets are nested too deeply"),
        (b".".join([b"a"] * 400_000) + b" = 1", "too many dots outside quotes"),  # hours otherwise
        (b"#" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_read_toml_refuses_what_is_no_configuration_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_toml(tmp_path / "a.toml")


def test_one_key_given_twice_with_dash_and_underscore_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("max-steps = 7\nmax_steps = 3\n")
    with pytest.raises(InputError, match=r"max_steps twice"):
        read_toml(tmp_path / "a.toml")


def test_a_length_of_time_has_units() -> None:
    for text, seconds in {"3h50m": 13_800, "90m": 5_400, "1d12h": 129_600, "45s": 45, "2H5s": 7_205}.items():
        assert seconds_of(text) == seconds
    assert seconds_of(None) is None
    for text in ("", "3", "h", "3h 50", "50m3h", "0m", "-1h", "1.5h", "3:50:00"):
        with pytest.raises(InputError, match=r"max-time is .* such as 3h50m"):
            seconds_of(text)
