"""Embeddings that mean the same: `sest embed --like` a cache, and like what a checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sest
from helpers.configs import small_config
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import write_se
from sest.api import made_by
from sest.cache import open_cache
from sest.config import EmbedConfig
from sest.encoder.made import alike
from sest.errors import InputError
from sest.training.train import train

WITH_WEIGHTS, FITTED = {"dim": 4, "max_tokens": 6, "seed": 3, "dtype": "float32"}, {"dim": 4, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, and caches of the first one."""
    folder = tmp_path_factory.mktemp("made")
    for name, n in {"a": 41, "b": 23}.items():
        write_cells(folder / f"{name}.h5ad", counts(n, seed=n))
    write_se(folder / "se", gene_names(35))
    write_se(folder / "other", gene_names(35), seed=1)
    for encoder in ("pca", "genes", "se"):
        given: dict[str, Any] = WITH_WEIGHTS if encoder == "se" else FITTED
        sest.embed(folder / "a.h5ad", folder / f"{encoder}.zarr", encoder=path_of(folder, encoder), **given)
    return folder


def path_of(folder: Path, encoder: str) -> str:
    return str(folder / "se") if encoder == "se" else encoder


@pytest.mark.parametrize("encoder", ["pca", "genes", "se"])
def test_another_cache_has_the_embeddings_that_the_cells_would_have_had_as_added_ones(
    folder: Path, encoder: str, tmp_path: Path
) -> None:
    """Like a cache and like a checkpoint: the same, and the same as a file that joins the cache."""
    whole = tmp_path / "whole.zarr"
    given: dict[str, Any] = WITH_WEIGHTS if encoder == "se" else FITTED
    sest.embed(folder / "a.h5ad", whole, encoder=path_of(folder, encoder), **given)
    sest.embed(folder / "b.h5ad", whole, encoder=path_of(folder, encoder), add=True, **given)
    train(folder / f"{encoder}.zarr", tmp_path / "run", small_config(max_steps=1))
    named: dict[str, Any] = {"encoder": path_of(folder, encoder)} if encoder == "se" else {}
    caches = [
        sest.embed(folder / "b.h5ad", tmp_path / f"{i}.zarr", like=like, **named)
        for i, like in enumerate((folder / f"{encoder}.zarr", tmp_path / "run", tmp_path / "run" / "last"))
    ]
    assert len({cache.sha256 for cache in caches}) == 1 and all(cache.verify() == [] for cache in caches)
    for cache in caches:
        assert np.array_equal(cache.groups["b"].embeddings(), open_cache(whole).groups["b"].embeddings())
        assert cache.projection is not None
        for name, values in (open_cache(whole).projection or {}).items():
            assert np.array_equal(cache.projection[name], values)
        assert cache.projection_attributes == open_cache(whole).projection_attributes
        for key in ("dim", "dtype", "seed", "max_tokens", "encoder_sha256", "projection"):
            assert cache.attributes[key] == open_cache(whole).attributes[key], key
    again = sest.embed(folder / "b.h5ad", tmp_path / "0.zarr", like=folder / f"{encoder}.zarr", **named)
    assert again.sha256 == caches[0].sha256  # a finished one is left as it is


def test_what_would_make_other_embeddings_is_refused(folder: Path, tmp_path: Path) -> None:
    se, pca = made_by(folder / "se.zarr"), made_by(folder / "pca.zarr")
    assert alike(EmbedConfig(), pca).encoder == "pca" and alike(EmbedConfig(dim=4), pca).seed == 3
    with pytest.raises(InputError, match=r"was made with the encoder .*Pass --encoder with its folder"):
        alike(EmbedConfig(), se)
    for config, option in (
        (EmbedConfig(encoder="genes"), "--encoder"),
        (EmbedConfig(seed=5), "--seed"),
        (EmbedConfig(dim=3), "--dim"),
        (EmbedConfig(dim="native"), "--dim"),
        (EmbedConfig(dtype="float32"), "--dtype"),
    ):
        with pytest.raises(InputError, match=rf"takes {option} from there\. Leave it out"):
            alike(config, pca)
    with pytest.raises(InputError, match=r"other is not the encoder that .*se\.zarr was made with"):
        sest.embed(folder / "b.h5ad", tmp_path / "c.zarr", encoder=folder / "other", like=folder / "se.zarr")
    with pytest.raises(InputError, match="Leave --like out"):
        sest.embed(folder / "b.h5ad", folder / "pca.zarr", add=True, like=folder / "pca.zarr")
    with pytest.raises(InputError, match=r"gone does not exist"):
        made_by(tmp_path / "gone")
    assert not list(tmp_path.iterdir())


def test_files_may_lack_genes_of_the_projection_where_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    import anndata as ad

    cells = ad.read_h5ad(folder / "b.h5ad")
    cells[:, 2:].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(InputError, match=r"few\.h5ad lacks 2 of the .* genes of the PCA of .*pca\.zarr"):
        sest.embed(tmp_path / "few.h5ad", tmp_path / "c.zarr", like=folder / "pca.zarr")
    cache = sest.embed(tmp_path / "few.h5ad", tmp_path / "c.zarr", like=folder / "pca.zarr", missing_genes="mean")
    assert cache.groups["few"].n_genes == cells.n_vars - 2
