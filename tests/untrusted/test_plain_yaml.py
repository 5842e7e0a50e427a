"""YAML of strangers: containers, numbers and text, or one line of refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from sest.errors import InputError
from sest.untrusted.plain_yaml import MAX_BYTES, parse_yaml, read_yaml


def test_plain_values_are_read_and_objects_are_not_made(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data:\n  kwargs: {pert_col: gene, n: 3}\n")
    assert read_yaml(file) == {"data": {"kwargs": {"pert_col": "gene", "n": 3}}}
    for text in ("a: !!python/object/apply:os.getcwd []", "a: [", "{" * 5000):
        file.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml is not YAML") as refused:
            read_yaml(file)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="larger than 1 MB"):
        parse_yaml("x" * (MAX_BYTES + 1), "the text")
    with pytest.raises(InputError, match="Cannot read"):
        read_yaml(tmp_path / "gone.yaml")
