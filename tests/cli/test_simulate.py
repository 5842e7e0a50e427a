"""`sest simulate`: sizes that cannot be, files that are there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from helpers.commands import Done

TINY = ("--n-perturbations", 2, "--n-cells", 3, "--n-controls", 4, "--n-genes", 50, "--expressed-genes", 20)


def test_simulating_what_cannot_be_leaves_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "x.h5ad"
    assert "n_genes is 20" in refused("simulate", out, "--n-genes", "20")
    assert "expressed_genes is 700" in refused("simulate", out, "--n-genes", "300", "--expressed-genes", "700")
    assert "does not end in .npz, .safetensors, .pt" in refused("simulate", out, "--features", tmp_path / "f.csv")
    (tmp_path / "genes.txt").write_text("A\nB\nA\n")
    assert "n_genes is 3" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    (tmp_path / "genes.txt").write_text("\n".join([*(f"G{i}" for i in range(900)), "G1"]))
    assert "must be distinct" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    assert "Cannot read" in refused("simulate", out, "--genes", tmp_path / "gone.txt")


def test_files_that_are_there_are_replaced_only_when_that_is_asked_for(
    sest: Callable[..., Done], refused: Callable[..., str], tmp_path: Path
) -> None:
    """The case first_hour/simulate_overwrites."""
    cells, splits, features = (tmp_path / name for name in ("cells.h5ad", "starter.toml", "f.npz"))
    splits.touch()
    assert f"{splits} exists. Pass --force" in refused("simulate", cells, "--splits", splits, *TINY)
    features.touch()
    assert f"{features} exists. Pass --force" in refused("simulate", cells, "--features", features, *TINY)
    cells.touch()
    assert f"{cells} exists. Pass --force" in refused("simulate", cells, *TINY)
    words = ("simulate", cells, "--splits", splits, "--features", features, *TINY)
    assert sest(*words, "--force").code == 0
    assert all(path.stat().st_size for path in (cells, splits, features))


def test_no_output_is_another_output_or_the_list_of_genes(refused: Callable[..., str], tmp_path: Path) -> None:
    genes, cells, both = tmp_path / "genes.h5ad", tmp_path / "cells.h5ad", tmp_path / "x.npz"
    genes.write_text("\n".join(f"G{i}" for i in range(50)))
    os.link(genes, cells)
    for force in ((), ("--force",)):
        assert "is used by this command already" in refused("simulate", cells, "--genes", genes, *TINY, *force)
        assert "is used by this command already" in refused("simulate", both, "--features", both, *TINY, *force)
        words = ("--features", both, "--splits", both)
        assert "is used by this command already" in refused("simulate", tmp_path / "y.h5ad", *words, *TINY, *force)
