"""`sest embed --to-h5ad`: a copy of the file with the embeddings in obsm, and nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import OUT, write_se
from sest.cache import open_cache
from sest.cli.main import main
from sest.config import EmbedConfig
from sest.embedding.embed import embed

N = 21


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "a.h5ad", counts(N))


@pytest.fixture
def se(tmp_path: Path) -> Path:
    return write_se(tmp_path / "se", gene_names(35))


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run `sest embed ...` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["sest", "embed", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_the_copy_has_the_state_columns_and_everything_the_file_had(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.h5ad"
    assert command(monkeypatch, cells, "--encoder", se, "--to-h5ad", out) == 0
    assert f"{out}: a.h5ad with obsm['X_state'], 21 cells x {OUT + 10}." in " ".join(capsys.readouterr().out.split())
    before, after = anndata.read_h5ad(cells), anndata.read_h5ad(out)
    embed([cells], tmp_path / "s.zarr", EmbedConfig(encoder=str(se), dim="state", dtype="float32", device="cpu"))
    expected = open_cache(tmp_path / "s.zarr").groups["a"].embeddings()
    assert after.obsm["X_state"].dtype == np.float32
    np.testing.assert_array_equal(after.obsm["X_state"], expected)
    del after.obsm["X_state"]
    assert (before.X != after.X).nnz == 0 and before.obs.equals(after.obs) and before.var.equals(after.var)
    assert sorted(os.listdir(tmp_path)) == ["a.h5ad", "out.h5ad", "s.zarr", "se"]  # no cache is kept


def test_where_a_cache_is_named_it_is_kept_and_its_width_is_written(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "out.h5ad", tmp_path / "s.zarr"
    words = (cells, "--encoder", "pca", "--dim", 3, "--cache", cache, "--to-h5ad", out, "--obsm-key", "X_pca3")
    assert command(monkeypatch, *words) == 0
    stored = open_cache(cache).groups["a"]
    np.testing.assert_array_equal(anndata.read_h5ad(out).obsm["X_pca3"], stored.embeddings().astype(np.float32))
    assert stored.targets().nnz


def test_a_stopped_run_is_continued_and_leaves_no_half_written_file(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5ad"
    words = (cells, "--encoder", se, "--to-h5ad", out)
    with monkeypatch.context() as killed:
        killed.setattr("sest.embedding.write_obsm.shutil.copyfile", lambda source, out: sys.exit(143))
        assert command(monkeypatch, *words) == 143
    assert sorted(os.listdir(tmp_path)) == [".out.h5ad.sest.zarr", "a.h5ad", "se"]
    with monkeypatch.context() as counted:
        counted.setattr("sest.encoder.state.SeEncoder.start", lambda *_: pytest.fail("encoded again"))
        assert command(monkeypatch, *words) == 0
    assert anndata.read_h5ad(out).obsm["X_state"].shape == (N, OUT + 10)
    assert sorted(os.listdir(tmp_path)) == ["a.h5ad", "out.h5ad", "se"]


def test_what_cannot_be_written_is_refused_before_anything_is_encoded(
    cells: Path, se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.h5ad"
    with h5py.File(cells, "r+") as file:
        file["obsm"].create_dataset("X_state", data=np.zeros((N, 2)))
    there = tmp_path / "there.h5ad"
    there.touch()
    for words, message in (
        ((cells, "--to-h5ad", there), "exists. Pass --force to replace it, or give another name."),
        ((cells, "--to-h5ad", cells), "is used by this command already"),
        ((cells, "--to-h5ad", cells, "--force"), "is used by this command already"),
        ((cells, "--to-h5ad", out, "--cache", out), "is used by this command already"),
        ((cells, "--to-h5ad", tmp_path / "none" / "out.h5ad"), "No folder"),
        ((cells, "--to-h5ad", out), "has obsm 'X_state' already (X_state). Pass another --obsm-key."),
        ((cells, "--to-h5ad", out, "--obsm-key", "a/b"), "--obsm-key 'a/b' cannot name"),
        ((cells, cells, "--to-h5ad", out), "--to-h5ad takes one .h5ad file as INPUT"),
        ((cells, "--to-h5ad", out, "--rank", 0, "--world-size", 2), "--to-h5ad is for one process"),
        ((cells,), "Nowhere to write. Pass --cache OUT.zarr, or --to-h5ad OUT.h5ad."),
    ):
        assert command(monkeypatch, *words, "--encoder", se) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert sorted(os.listdir(tmp_path)) == ["a.h5ad", "se", "there.h5ad"]
    assert command(monkeypatch, cells, "--to-h5ad", there, "--obsm-key", "X_new", "--force", "--encoder", se) == 0
    with h5py.File(there) as file:
        assert file["obsm/X_new"].shape == (N, OUT + 10)


def test_a_cache_without_expression_values_is_not_trained_from(cells: Path, tmp_path: Path) -> None:
    from sest.config import TrainConfig
    from sest.data.dataset import read_dataset
    from sest.errors import InputError

    embed([cells], tmp_path / "s.zarr", EmbedConfig(encoder="pca", dim="3"), targets=False)
    with pytest.raises(InputError, match="holds no expression values"):
        read_dataset(tmp_path / "s.zarr", TrainConfig())
