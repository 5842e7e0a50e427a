"""Files of a run and of a prediction that were changed afterwards: each is refused in one line, said, or harmless.

A run's config.toml and splits.toml may be edited by those who own it: that they are not as they were is said, not
refused.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import Demo

from helpers.damage import KINDS, damage, files_of
from sest.config import EvaluateConfig, PredictConfig
from sest.errors import Error
from sest.evaluation.evaluate import evaluate
from sest.prediction.predict import predict
from sest.runs.checkpoint import checkpoints, open_checkpoint
from sest.runs.curves import read_lines
from sest.runs.run_folder import CONFIG, METRICS, SPLITS, read_run_config
from sest.runs.schema import STATE

logger = logging.getLogger(__name__)

ATTEMPTS = 500  # of each of the two sweeps, in `make faults`


def content(run: Path) -> dict[str, Any]:
    """All that is read of a run."""
    values, provenance = read_run_config(run)
    found: dict[str, Any] = {"config": (values, provenance), "lines": read_lines(run / METRICS)}
    found["splits"] = (run / SPLITS).read_bytes() if (run / SPLITS).exists() else b""
    for folder in checkpoints(run):
        opened = open_checkpoint(folder)
        found[folder.name] = opened.state, {name: (folder / name).read_bytes() for name in opened.state["files"]}
    return found


def scores(predicted: Path, real: Path) -> list[Any]:
    """All that is read of a prediction."""
    result = evaluate(predicted, real, EvaluateConfig())
    return [result.table.to_numpy().tolist(), result.summary, result.provenance["made_by"]]


def sweep(
    sound: Path, copy: Path, names: list[str], kinds: list[str], rng: np.random.Generator, read: Callable[[Path], Any]
) -> Counter[str]:
    """Change one file after the other of copies; how each ended."""
    expected, ends = read(sound), Counter[str]()
    said: list[str] = []
    notes = logging.Handler()
    notes.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sest.runs.run_folder").addHandler(notes)
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        path = copy / str(number)  # of its own: a change is said once for each run
        shutil.copytree(sound, path) if sound.is_dir() else shutil.copy(sound, path)
        damage(path / name if name else path, kind, rng)
        said.clear()
        try:
            found = read(path)
        except Error as refused:
            line = str(refused)
            assert "\n" not in line and len(line) < 1000, line
            ends["refused"] += 1
        else:
            if name == METRICS and kind in ("cut", "empty"):  # as a kill leaves it: what is left is a beginning
                assert found["lines"] == expected["lines"][: len(found["lines"])]
                found["lines"] = expected["lines"]
            is_same = repr(found).replace(str(path), "") == repr(expected).replace(str(sound), "")
            assert is_same or any("is not as sest wrote it" in line for line in said), (name, kind)
            ends["harmless" if is_same else "said"] += 1
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    logging.getLogger("sest.runs.run_folder").removeHandler(notes)
    return ends


def names_of(run: Path) -> list[str]:
    names = [file.relative_to(run).as_posix() for file in files_of(run)]
    return [name for name in names if "/" in name or name in (CONFIG, METRICS, SPLITS)]  # no reports


@pytest.fixture
def predicted(demo: Demo, tmp_path: Path) -> Path:
    """Some cells of one perturbation, and the controls."""
    predict(demo.run, tmp_path / "predicted.h5ad", PredictConfig(cell_type="beta"))
    return tmp_path / "predicted.h5ad"


def test_a_change_of_any_file_of_a_run_is_refused_or_said(demo: Demo, tmp_path: Path) -> None:
    names = names_of(demo.run)
    assert {CONFIG, METRICS, SPLITS, f"last/{STATE}"} <= set(names)
    ends = sweep(demo.run, tmp_path, names, ["bit"] * len(names), np.random.default_rng(0), content)
    assert ends["refused"] >= len(names) - 2, ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_a_prediction_is_refused(demo: Demo, predicted: Path, tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    ends = sweep(predicted, tmp_path, [""] * 4, [kind] * 4, rng, lambda path: scores(path, demo.cells))
    assert ends == {"refused": 4}


def test_a_prediction_that_anndata_or_hdf5_changed_is_read(demo: Demo, predicted: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(predicted)
    cells.obs["mine"] = pd.Categorical(["x"] * cells.n_obs)
    cells.write_h5ad(tmp_path / "again.h5ad")
    assert repr(scores(tmp_path / "again.h5ad", demo.cells)) == repr(scores(predicted, demo.cells))


@pytest.mark.full
def test_hundreds_of_changes_of_a_run_are_refused_said_or_harmless(demo: Demo, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    names = list(rng.choice(names_of(demo.run), ATTEMPTS))
    kinds = list(rng.choice(KINDS, ATTEMPTS, p=[0.7, 0.1, 0.1, 0.1]))
    ends = sweep(demo.run, tmp_path, names, kinds, rng, content)
    logger.info(f"{dict(ends)}")  # shown with --log-cli-level=INFO
    assert ends.total() == ATTEMPTS


@pytest.mark.full
def test_hundreds_of_changes_of_a_prediction_are_refused_or_harmless(
    demo: Demo, predicted: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(21)
    kinds = list(rng.choice(KINDS, ATTEMPTS, p=[0.7, 0.1, 0.1, 0.1]))
    ends = sweep(predicted, tmp_path, [""] * ATTEMPTS, kinds, rng, lambda path: scores(path, demo.cells))
    logger.info(f"{dict(ends)}")  # shown with --log-cli-level=INFO
    assert set(ends) <= {"refused", "harmless"} and ends.total() == ATTEMPTS
