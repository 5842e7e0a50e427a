"""`sest convert`: a safetensors copy beside an encoder's .ckpt, made once, used from then on."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import Notes, counts, gene_names, write_cells, write_se

from sest.cache import open_cache
from sest.cli.main import main
from sest.config import EmbedConfig
from sest.embed import embed
from sest.weights import find_encoder, load_encoder


@pytest.fixture
def se(tmp_path: Path) -> Path:
    """An SE folder whose weights are a Lightning checkpoint."""
    folder = write_se(tmp_path / "se", gene_names(35))
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "se.ckpt")
    (folder / "model.safetensors").unlink()
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sest", "convert", *map(str, words)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_a_copy_is_written_once_and_stands_for_the_checkpoint(
    se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = write_cells(tmp_path / "a.h5ad", counts(20))
    before = load_encoder(se)
    embed([cells], tmp_path / "before.zarr", EmbedConfig(encoder=str(se), device="cpu"), Notes())
    assert command(monkeypatch, se) == 0
    copy = se / "se.sest.safetensors"
    assert f"{copy}: written" in " ".join(capsys.readouterr().out.split())
    assert find_encoder(se).weights == copy
    after = load_encoder(se)
    assert (after.sha256, after.source) == (before.sha256, "se.ckpt")
    plan = embed([cells], tmp_path / "before.zarr", EmbedConfig(encoder=str(se), device="cpu"), Notes())
    assert plan.complete  # the same encoder: the store is not made anew
    embed([cells], tmp_path / "after.zarr", EmbedConfig(encoder=str(se), device="cpu"), Notes())
    stores = [open_cache(tmp_path / name).groups["a"].embeddings() for name in ("before.zarr", "after.zarr")]
    np.testing.assert_array_equal(*stores)
    written = copy.stat().st_mtime_ns
    for path in (se, se / "se.ckpt", copy):
        assert command(monkeypatch, path) == 0
        assert f"{copy} is there already" in " ".join(capsys.readouterr().out.split())
    assert copy.stat().st_mtime_ns == written


def test_a_copy_of_an_older_checkpoint_is_written_again(se: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, se) == 0
    tensors = torch.load(se / "se.ckpt", weights_only=True)["state_dict"]
    tensors["decoder.1.bias"] += 1
    torch.save({"state_dict": tensors}, se / "se.ckpt")
    changed = load_encoder(se).sha256
    assert find_encoder(se).weights == se / "se.ckpt"
    assert command(monkeypatch, se) == 0
    assert find_encoder(se).weights == se / "se.sest.safetensors" and load_encoder(se).sha256 == changed


def test_what_needs_or_gets_no_copy_is_refused_in_one_line(
    se: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_se(tmp_path / "plain", gene_names(35))
    shutil.copytree(se, tmp_path / "genes")
    (tmp_path / "genes/protein_embeddings.pt").unlink()
    shutil.copy(se / "se.ckpt", se / "two.ckpt")
    for words, message in (
        ((plain,), "model.safetensors is read fast as it is: only a .ckpt needs a copy."),
        ((tmp_path / "genes",), "without it the copy could not be used"),
        ((tmp_path / "none",), "No SE folder or checkpoint at"),
        ((se,), "Several checkpoints in"),
        ((se, "--checkpoint", "three.ckpt"), "No checkpoint 'three.ckpt' in"),
    ):
        assert command(monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert command(monkeypatch, se, "--checkpoint", "two.ckpt") == 0
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert command(monkeypatch, se, "--checkpoint", "se.ckpt") == 2
    assert "se.ckpt cannot be written: [Errno 28] No space left on device." in capsys.readouterr().err
    assert sorted(path.name for path in se.iterdir() if "sest" in path.name) == ["two.sest.safetensors"]
