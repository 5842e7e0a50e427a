"""A run folder that somebody made to do harm, given to the commands that read runs: nothing of it is carried out."""

from __future__ import annotations

import gzip
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Demo

from sest.config import PredictConfig
from sest.describe import describe
from sest.errors import InputError
from sest.options import read_toml
from sest.prediction.predict import predict
from sest.report.write import write_report


@pytest.mark.parametrize("where", [None, "http://127.0.0.1:9/cells.zarr"])
def test_a_cache_that_a_run_names_by_a_url_is_not_opened(
    demo: Demo, shared_cases: Path, tmp_path: Path, where: str | None
) -> None:
    """The case run-reference-url: the reference is a template that runs a command in older versions of fsspec."""
    make, run, canary = shared_cases / "faults" / "run-reference-url" / "make.py", tmp_path / "run", tmp_path / "canary"
    words = [str(make), str(demo.run), str(run), str(canary), *([where] if where else [])]
    subprocess.run([sys.executable, *words], check=True)
    facts, _ = describe(run)
    assert "at a URL" in facts["split_notes"][0]
    with pytest.raises(InputError, match=r"says that its cache is at a URL; pass it yourself: --cache"):
        predict(run, tmp_path / "o.h5ad", PredictConfig(cell_type="alpha"))
    written = write_report([run], tmp_path / "r.html")
    assert any("at a URL" in note for note in written.notes)
    assert not canary.exists() and not (tmp_path / "o.h5ad").exists()


def test_a_configuration_of_400_000_dots_is_refused_at_once(shared_cases: Path, tmp_path: Path) -> None:
    with gzip.open(shared_cases / "faults" / "toml-dotted-config" / "dotted.toml.gz") as file:
        (tmp_path / "dotted.toml").write_bytes(file.read())
    began = time.monotonic()
    with pytest.raises(InputError, match="too many dots outside quotes"):
        read_toml(tmp_path / "dotted.toml")
    assert time.monotonic() - began < 1
