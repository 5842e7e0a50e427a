"""Files of run folders that are somebody else's: what no run says is one line, before anything uses it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sest.errors import InputError
from sest.runs.checkpoint import _state_sha256, checkpoints, open_checkpoint
from sest.runs.curves import read_lines
from sest.runs.run_folder import CONFIG, METRICS, own_cache, read_run_config
from sest.runs.schema import BLEND, MODEL, STATE, read_state

ODD: tuple[Any, ...] = (10**12, -1, None, True, "x", [], {}, math.nan, [[]], "MISSING")


def places(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def changed(values: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy with one value replaced, or taken out."""
    made = copy.deepcopy(values)
    inner = made
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    if value == "MISSING":
        del inner[place[-1]]
    return made


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Write a state.json with the hash of what it says now."""
    (folder / STATE).write_text(json.dumps({**state, "sha256": _state_sha256(state)}))


@pytest.fixture
def best(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "best", tmp_path / "best"))


def test_every_odd_value_in_a_resealed_state_is_refused_or_harmless(best: Path) -> None:
    """Of about 300 in a checkpoint with a blend, none gets past as an error that is not one line."""
    state = read_state(best)
    refused, lines = 0, set[str]()
    for number, place in enumerate(places(state)):
        for value in ODD[number % 3 :: 3]:
            seal(best, changed(state, place, value))
            try:
                opened = open_checkpoint(best, check=False)
                if place[0] in ("sizes", "blend"):
                    opened.model()
                    opened.blend()
            except InputError as problem:
                refused += 1
                lines |= {str(problem)}
    assert refused > 150 and not any("\n" in line for line in lines)
    for place, value, words in (
        (("sizes", "n_layers"), 10**12, "sizes.n_layers is 1000000000000, not a whole number from 0 to 512"),
        (("sizes", "hidden"), 7, "the sizes in state.json do not fit each other"),
        (("step",), -1, "step is -1"),
        (("genes",), None, "genes is None, not a list"),
        (("files",), {"../../secret": "0"}, "names '../../secret', which is no file of a checkpoint"),
        (("encoder", "name"), "MISSING", "encoder has no 'name'"),
    ):
        seal(best, changed(state, place, value))
        with pytest.raises(InputError) as error:
            open_checkpoint(best)
        assert words in str(error.value), error.value


def test_brackets_without_end_and_a_state_of_gigabytes_are_one_line(best: Path) -> None:
    for content, words in (("[" * 200_000, "nested too deeply"), (" " * (2**25 + 1), "is larger than 34 MB")):
        (best / STATE).write_text(content)
        with pytest.raises(InputError, match=words):
            open_checkpoint(best)
        assert checkpoints(best.parent) == [best]  # sorted by a step that cannot be read


def test_tensors_that_do_not_fit_the_state_are_one_line(best: Path) -> None:
    state = read_state(best)
    for place, value in (
        (("blend", "contexts"), ["one"] * 50),
        (("blend", "perturbations"), []),
        (("sizes", "dim"), 3),
    ):
        seal(best, changed(state, place, value))
        opened = open_checkpoint(best, check=False)
        with pytest.raises(InputError, match=f"({MODEL}|{BLEND}) does not fit state.json"):
            (opened.model if place[0] == "sizes" else opened.blend)()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": -1}', "step is -1"),
        ('{"step": 1e3}', "step is 1000.0"),
        ('{"step": true}', "step is True"),
        ('{"loss": 1.0}', "has no 'step'"),
        ("[1]", "is a list"),
        ('{"step": 1, "loss": "low"}', "loss is 'low'"),
        ('{"step": 1, "loss": [1]}', "loss is a list"),
        ('{"step": 1, "limited_by": "\\u001b[31m"}', "limited_by"),
        ('{"step": 1, "[red]": 1}', "has names that no line of metrics has"),
        ('{"step": 1, "loss": ' + "[" * 10_000, "nested too deeply"),
        ('{"step": 1, "loss": ' + " " * 40_000 + "1}", "is longer, or further down"),
    ],
)
def test_a_line_of_metrics_that_no_run_writes_is_refused_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / METRICS).write_text(f'{{"step": 1, "loss": null}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl(:|,) line 2") as error:
        read_lines(tmp_path / METRICS)
    assert words in str(error.value)


def test_numbers_that_were_not_finite_are_lines_too(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": NaN}\n{"step": 2, "pds": null}\n{"step": 3, "lo')
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2]


def test_a_configuration_of_others_is_checked_and_its_urls_are_not_followed(whole: Path, tmp_path: Path) -> None:
    text = (whole / CONFIG).read_text()
    for wrong, words in (
        (
            text.replace("[provenance]", "[provenance]\nx = 1").replace("cache = ", "cache = 1 #"),
            "cache is 1, not text",
        ),
        (text.partition("[provenance]")[0] + "provenance = 3\n", "[provenance] is 3, not a mapping"),
        (text.replace("max_steps = 12", "max_steps = -12"), "max-steps is -12"),
        (text.replace("hidden = ", "hidden = 1000000000000 #"), "hidden is 1000000000000; it must be at most"),
        (text.replace("n_layers = ", "n_layers = 1000000000000 #"), "n-layers is 1000000000000; it must be at most"),
    ):
        assert wrong != text
        (tmp_path / CONFIG).write_text(wrong)
        with pytest.raises(InputError) as error:
            read_run_config(tmp_path)
        assert words in str(error.value), error.value
    for url in ("s3://bucket/cells.zarr", "reference://x::/tmp/ref.json", "http://127.0.0.1:1/c.zarr"):
        with pytest.raises(InputError, match=r"at a URL.*--cache"):
            own_cache(tmp_path, {"cache": url})
    with pytest.raises(InputError, match="does not exist"):
        own_cache(tmp_path, {"cache": "/gone.zarr"})
    with pytest.raises(InputError, match="does not say where its cache is"):
        own_cache(tmp_path, {})
    assert own_cache(tmp_path, {"cache": str(tmp_path)}) == str(tmp_path)
