"""Features of the perturbations to predict: those of the run, others that fit it, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Demo
from safetensors.numpy import load_file, save_file

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import SMALL, Predict, rows_of
from helpers.notes import Notes
from sest.baselines.effects import BASELINES
from sest.config import EmbedConfig, PredictConfig, TrainConfig
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.prediction.predict import predict
from sest.progress import reporting
from sest.training.train import train


def test_a_one_hot_run_refuses_what_trained_nowhere(
    refusal: Callable[..., str], predicted: Predict, tmp_path: Path
) -> None:
    cache, run = write_cache(tmp_path / "cache.zarr", [small_screen("d")]), tmp_path / "run"
    (tmp_path / "s.toml").write_text(
        '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n'
        '[fewshot."d.y"]\ntest = ["P", "S"]\n'
    )
    train(cache, run, small_config(splits=str(tmp_path / "s.toml"), max_steps=1))
    line = refusal(run, cell_type="y")
    assert "never trained on 1 of 2 perturbations: P. It was on: Q, R, S, T." in line and "--perturbations FILE" in line
    assert set(predicted(run, cell_type="y", only="S").obs["gene"]) == {"S", "ctrl"}
    moved, notes = shutil.copytree(run / "best", tmp_path / "moved"), Notes()
    with reporting(notes):
        predict(moved, tmp_path / "o.h5ad", PredictConfig(cache=str(cache), cell_type="y", only="P"))
    assert any("is not known here: what it never saw, it guesses" in note for note in notes.notes)


def test_a_misspelt_name_is_refused_where_zeros_stand_in_and_a_known_one_is_said(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    cache, run, given = write_cache(tmp_path / "cache.zarr", [small_screen("d")]), tmp_path / "run", tmp_path / "f.npz"
    vectors = {name: np.full(3, number, np.float32) for name, number in zip("PQRS", (1, 2, 1, 4), strict=True)}
    np.savez(given, allow_pickle=False, **vectors)
    train(cache, run, small_config(perturbations=str(given), missing_perturbations="zero", max_steps=1))
    line = refusal(run, cell_type="y", only="NOPE")
    assert "Neither" in line and "has NOPE" in line and "for example: P, Q, R, S" in line
    assert "Of P+NOPE it lacks NOPE." in refusal(run, cell_type="y", only="P+NOPE")
    notes = Notes()
    with reporting(notes):
        predict(run, tmp_path / "o.h5ad", PredictConfig(cell_type="y", only="T,P,P+Q"))
    assert "1 combinations get the sum of their targets' vectors in f.npz: P+Q." in notes.notes
    assert any(note.startswith("No features for T: predicted from zeros") for note in notes.notes)
    assert any(note.endswith("get the same prediction: P, R.") for note in notes.notes)


def test_the_case_of_a_misspelt_name(shared_cases: Path, tmp_path: Path) -> None:
    case = shared_cases / "labels_scales_genes" / "01-predict-typo-zero"
    cache, run = tmp_path / "c", tmp_path / "run"
    embed([case / "s08_combo.h5ad"], cache, EmbedConfig(encoder="pca", dim="16"))
    options = {**SMALL, "perturbations": str(case / "feat.safetensors"), "missing_perturbations": "zero"}
    train(cache, run, TrainConfig(**options))
    with pytest.raises(InputError, match="has NOPE"):
        predict(run, tmp_path / "o.h5ad", PredictConfig(only="NOPE", cell_type="alpha"))


def test_a_run_with_features_of_genes_predicts_any_measured_gene_from_its_checkpoint_alone(
    predicted: Predict, refusal: Callable[..., str], tmp_path: Path
) -> None:
    names = ("P", "Q", "R", "S", "T", *(f"G{i}" for i in range(20)))
    cache, run = write_cache(tmp_path / "cache.zarr", [small_screen("d", genes=names)]), tmp_path / "run"
    train(cache, run, small_config(perturbations="genes", max_steps=2))
    kept = load_file(run / "last" / "features.safetensors")["genes"]
    assert kept.shape == (25, kept.shape[1])
    cells = {name: predicted(run, cell_type="y", only=name) for name in ("G3", "G4", "P+G3")}
    means = {name: np.asarray(c[c.obs["gene"] == name].X.mean(0)) for name, c in cells.items()}
    assert len({mean.tobytes() for mean in means.values()}) == 3
    assert "genes has no features for 1 of 1 perturbations: NOPE" in refusal(
        run, tmp_path / "other.h5ad", cell_type="y", only="NOPE"
    )
    train(cache, run, small_config(perturbations="genes", max_steps=3), resume="auto")
    np.testing.assert_array_equal(load_file(run / "last" / "features.safetensors")["genes"], kept)


def test_a_one_hot_run_predicts_what_it_saw_and_refuses_the_rest(
    demo: Demo, refusal: Callable[..., str], predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(demo.cache, run, TrainConfig(**SMALL, splits=str(demo.folder / "starter.toml"), perturbations="onehot"))
    line = refusal(run, only=names[0][:-1] + "X", cell_type="beta")
    assert "one-hot features and never saw" in line and "--perturbations FILE" in line
    assert sorted(predicted(run).uns["sest"]["baselines"]) == sorted(BASELINES[1:])
    assert "features of width 64" in refusal(run, tmp_path / "other.h5ad", perturbations=str(demo.features))


def test_features_that_are_not_the_runs_are_refused(
    demo: Demo, refusal: Callable[..., str], predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    vectors, other = load_file(demo.features), tmp_path / "other.safetensors"
    save_file({name: row[:-1].copy() for name, row in vectors.items()}, other)
    assert "width 63; the checkpoint takes 64" in refusal(perturbations=str(other))
    save_file({name: row + 1 for name, row in vectors.items()}, other)
    assert "other features than the checkpoint was trained with" in refusal(perturbations=str(other))
    assert "Pass --perturbations" in refusal(perturbations=str(tmp_path / "gone.pt"))
    save_file({**vectors, "NEW": vectors[names[0]]}, other)
    cells = predicted(perturbations=str(other), only="NEW", cell_type="beta")
    assert len(rows_of(cells, "NEW", "beta")) == 128  # never seen in training, but it has features
