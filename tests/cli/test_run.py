"""`sest run` as it is typed; what it does is in tests/pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Demo

from helpers.commands import Done


def test_every_stage_is_shown_as_it_would_be_typed_and_the_report_comes_last(
    sest: Callable[..., Done], demo: Demo, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("run", demo.cells, "--out", out, "--head", "none", "--splits", demo.folder / "starter.toml")
    done = sest(*words)
    assert done.code == 0, done.err
    shown = [line.split()[2] for line in done.err.splitlines() if line.startswith("$ sest ")]
    assert shown == ["info", "embed", "train", "predict", "evaluate", "report"]
    assert done.out.splitlines()[-1] == f"Everything is in {out}. The report: {out / 'report.html'}"
    for words_of_a_stage in ("perturbation column", "embedded at width", "No head", "predicted cells", "real half"):
        assert words_of_a_stage in done.out, words_of_a_stage
    again = sest(*words)
    assert again.code == 0 and again.err.count("Finished before, and passed over: ") == 5
    assert again.out.splitlines()[-1] == done.out.splitlines()[-1]


def test_what_is_no_file_of_cells_is_refused(refused: Callable[..., str], demo: Demo, tmp_path: Path) -> None:
    assert "does not exist" in refused("run", tmp_path / "no.h5ad", "--out", tmp_path / "out")
    assert "is a cache; sest run takes a file of cells" in refused("run", demo.cache, "--out", tmp_path / "out")
    line = refused("run", demo.cells, "--out", tmp_path / "out", "--cell-type-col", "kind")
    assert "No column 'kind' in obs" in line
