"""`sest simulate`: sizes that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_simulating_what_cannot_be_leaves_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "x.h5ad"
    assert "n_genes is 20" in refused("simulate", out, "--n-genes", "20")
    assert "expressed_genes is 700" in refused("simulate", out, "--n-genes", "300")
    assert "ends in .npz, .safetensors, .pt" in refused("simulate", out, "--features", tmp_path / "f.csv")
    (tmp_path / "genes.txt").write_text("A\nB\nA\n")
    assert "n_genes is 3" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    (tmp_path / "genes.txt").write_text("\n".join([*(f"G{i}" for i in range(900)), "G1"]))
    assert "must be distinct" in refused("simulate", out, "--genes", tmp_path / "genes.txt")
    assert "Cannot read" in refused("simulate", out, "--genes", tmp_path / "gone.txt")
