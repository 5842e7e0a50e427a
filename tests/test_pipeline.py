"""All stages through the command line, each in a process of its own: the first time in a Python that is started for it,
as users do, later in a forked one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Demo

from helpers.packages import canonical, needed_by
from helpers.processes import server
from sest.baselines.effects import BASELINES

ROOT = Path(__file__).resolve().parent.parent


def sest(folder: Path, *words: str, forked: bool = False) -> str:
    """Run `sest` in a folder; returns its standard output."""
    command, environment = ["-m", "sest", *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    if forked:
        done = server().run(command, cwd=folder, env=environment)
    else:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout


def info(folder: Path, path: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(sest(folder, "info", path, "--json", forked=True))
    return facts


@pytest.mark.slow
def test_cells_become_a_cache_a_run_a_prediction_and_scores(tmp_path: Path) -> None:
    """Sizes of seconds: 8 perturbations, 200 genes, 480 cells. Paths are relative: everything lies in one folder."""
    size = "--n-perturbations 8 --n-cells 20 --n-controls 80 --n-genes 200 --expressed-genes 80 --umi-per-cell 400"
    sest(tmp_path, "simulate", "cells.h5ad", "--features", "f.npz", "--splits", "starter.toml", *size.split())
    sest(tmp_path, "embed", "cells.h5ad", "--encoder", "pca", "--dim", "16", "--cache", "cells.zarr")
    cache = info(tmp_path, "cells.zarr")
    assert (cache["complete"], cache["n_cells"], cache["dim"], cache["encoder"]) == (True, 480, 16, "pca")
    assert cache["groups"]["cells"]["perturbations"] == 8

    head = "--batch-size 4 --set-size 8 --hidden 16 --n-layers 1 --n-heads 2 --num-workers 1"
    steps = "--max-steps 6 --val-every 3 --checkpoint-every 3 --log-every 3"
    inputs = ("--splits", "starter.toml", "--perturbations", "f.npz")
    sest(tmp_path, "train", "cells.zarr", "--run", "run", *inputs, *head.split(), *steps.split())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert all({"loss", "it_per_s"} <= set(line) for line in lines if "val_loss" not in line)

    sest(tmp_path, "predict", "run", "--out", "predicted.h5ad")
    predicted = ad.read_h5ad(tmp_path / "predicted.h5ad")
    assert dict(predicted.obs["target_gene"].value_counts())["non-targeting"] == 80
    assert predicted.n_obs == 80 + 2 * 20 and np.isfinite(predicted.X.data).all()

    sest(tmp_path, "evaluate", "predicted.h5ad", "cells.h5ad", "--out", "scores", "--no-cell-eval")
    metrics = json.loads((tmp_path / "scores" / "summary.json").read_text())["metrics"]
    assert set(metrics) == {"pearson_delta", "pearson_delta_independent", "mae", "pds", "energy_distance"}
    assert set(metrics["mae"]) == {"model", *BASELINES, "real_half"}

    sest(tmp_path, "train", "cells.zarr", "--run", "run", "--resume", "auto", "--max-steps", "9", forked=True)
    run = info(tmp_path, "run")
    assert (run["kind"], run["step"], run["dim"], run["n_genes"]) == ("run", 9, 16, 200)
    assert run["best_step"] in (3, 6, 9) and run["val_loss"] == run["best_val_loss"] > 0


def absent_from_an_image() -> list[str]:
    """Modules here that belong neither to PyTorch and what it needs, as an image has them, nor to carry.txt."""
    listed = [line for line in (ROOT / "carry.txt").read_text().splitlines() if not line.startswith("#")]
    there = needed_by(["torch", "numpy", "fsspec"]) | {canonical(line) for line in listed}
    there |= {"sest", *needed_by(["pydantic"])}  # typer 0.29 needs it, which carry.txt does not take
    found = importlib.metadata.packages_distributions()
    return sorted(module for module, names in found.items() if not there & {canonical(name) for name in names})


STAGES = """
import json, sys
from sest.cli.main import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
"""


@pytest.mark.slow
def test_with_an_image_and_carry_txt_alone_the_cache_has_the_same_bytes_and_the_scores_are_the_same(
    demo: Demo, tmp_path: Path
) -> None:
    absent = absent_from_an_image()
    assert {"numba", "llvmlite", "plotly", "pygments"} <= set(absent)
    # as where they are not installed: each import fails
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    moved = [line.replace(str(demo.folder), str(tmp_path)) for line in demo.commands]
    simulate, *stages, _ = [shlex.split(line)[1:] for line in moved]  # the last one: report
    assert [words[0] for words in (simulate, *stages)] == ["simulate", "embed", "train", "predict", "evaluate"]
    both = tmp_path, demo.folder
    for name in ("cells.h5ad", "features.safetensors", "starter.toml"):
        shutil.copy(demo.folder / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", STAGES, json.dumps(stages)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without numba") == 1, done.stderr
    kept = [path for path in demo.cache.rglob("*") if path.is_file() and ".derived" not in path.parts]
    assert len(kept) > 20
    for path in kept:
        ours = tmp_path / path.relative_to(demo.folder)
        assert ours.read_bytes() == path.read_bytes(), ours
    # NumPy may round a float32 log1p of a target otherwise than the C library; the same cells are drawn for each step
    lines = [json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0]) for folder in both]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-6)
    values = [ad.read_h5ad(folder / "predicted.h5ad").X.toarray() for folder in both]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4, atol=1e-4)
    scores = [pd.read_csv(folder / "evaluation" / "results.csv") for folder in both]
    pd.testing.assert_frame_equal(scores[0], scores[1], rtol=1e-4)
