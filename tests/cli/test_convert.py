"""`sest convert`: a safetensors copy beside an encoder's .ckpt, made once; `sest import` of what is no checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import Done
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import write_se
from sest.cache import open_cache
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.se.weights import find_encoder, load_encoder


@pytest.fixture
def se(tmp_path: Path) -> Path:
    """An SE folder whose weights are a Lightning checkpoint."""
    folder = write_se(tmp_path / "se", gene_names(35))
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "se.ckpt")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_copy_is_written_once_and_stands_for_the_checkpoint(
    se: Path, tmp_path: Path, sest: Callable[..., Done]
) -> None:
    cells = write_cells(tmp_path / "a.h5ad", counts(20))
    before = load_encoder(se)
    embed([cells], tmp_path / "before.zarr", EmbedConfig(encoder=str(se), device="cpu"))
    copy = se / "se.sest.safetensors"
    assert f"{copy}: written" in " ".join(sest("convert", se).out.split())
    assert find_encoder(se).weights == copy
    after = load_encoder(se)
    assert (after.sha256, after.source) == (before.sha256, "se.ckpt")
    plan = embed([cells], tmp_path / "before.zarr", EmbedConfig(encoder=str(se), device="cpu"))
    assert plan.complete  # the same encoder: the cache is not made anew
    embed([cells], tmp_path / "after.zarr", EmbedConfig(encoder=str(se), device="cpu"))
    first, second = (open_cache(tmp_path / name).groups["a"].embeddings() for name in ("before.zarr", "after.zarr"))
    np.testing.assert_array_equal(first, second)
    written = copy.stat().st_mtime_ns
    for path in (se, se / "se.ckpt", copy):
        assert f"{copy} is there already" in " ".join(sest("convert", path).out.split())
    assert copy.stat().st_mtime_ns == written


def test_a_copy_of_an_older_checkpoint_is_written_again(se: Path, sest: Callable[..., Done]) -> None:
    assert sest("convert", se).code == 0
    tensors = torch.load(se / "se.ckpt", weights_only=True)["state_dict"]
    tensors["decoder.1.bias"] += 1
    torch.save({"state_dict": tensors}, se / "se.ckpt")
    changed = load_encoder(se).sha256
    assert find_encoder(se).weights == se / "se.ckpt"
    assert sest("convert", se).code == 0
    assert find_encoder(se).weights == se / "se.sest.safetensors" and load_encoder(se).sha256 == changed


def test_what_needs_or_gets_no_copy_is_refused_in_one_line(
    se: Path, tmp_path: Path, sest: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
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
        ((se, "--weights", "three.ckpt"), "No checkpoint 'three.ckpt' in"),
    ):
        done = sest("convert", *words)
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
    assert sest("convert", se, "--weights", "two.ckpt").code == 0
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        done = sest("convert", se, "--weights", "se.ckpt")
    assert done.code == 2 and "se.ckpt cannot be written: [Errno 28] No space left on device." in done.err
    assert sorted(path.name for path in se.iterdir() if "sest" in path.name) == ["two.sest.safetensors"]


def test_an_encoder_without_a_checkpoint_file_has_nothing_to_convert(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    refused("convert", write_se(tmp_path / "se", ["A", "B", "C", "D"]))
    refused("convert", tmp_path / "gone")


def test_what_is_no_checkpoint_of_upstream_is_not_imported(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cells.ckpt").write_text("no weights")
    assert "cells.ckpt" in refused("import", tmp_path / "cells.ckpt", tmp_path / "out")
