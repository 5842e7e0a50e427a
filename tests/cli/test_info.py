"""`sest info`: facts for people and programs, and damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import Demo

from helpers.commands import Done
from helpers.runs import metrics
from sest.cache.schema import COMPLETE


def test_an_unfinished_cache_is_described_and_no_error(sest: Callable[..., Done], demo: Demo, tmp_path: Path) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    (cache / COMPLETE).unlink()
    done = sest("info", cache, "--json")
    assert done.code == 0 and json.loads(done.out)["complete"] is False
    assert sest("info", cache).code == 0


def test_damage_found_by_info_is_an_error_after_the_facts(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    cache = shutil.copytree(demo.cache, tmp_path / "cache.zarr")
    shard = next(file for file in sorted((cache / "cells" / "obsm").rglob("c/0/0")))
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    done = sest("info", cache, "--json", "--verify")
    assert done.code == 2 and json.loads(done.out)["verified"] is False
    assert "1 files differ from their sha256" in done.err and "cells/obsm" in done.err


def test_json_is_strict_and_a_table_shows_what_is_not_a_number(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    run = shutil.copytree(demo.run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = metrics(run, timed=True)[-1] | {"pds": float("nan")}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    facts = json.loads(sest("info", run, "--json").out, parse_constant=refuse)
    assert facts["metrics"]["pds"] is None
    assert re.search(r"pds\s+│\s+- │", sest("info", run).out)
