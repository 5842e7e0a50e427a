"""`sest embed --add`: files join a cache; what it has is not touched, and nothing else about it may differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sest.embedding.plan
from helpers.caches import hashes, small_shards
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from helpers.se_model import write_se
from sest.cache import CacheError, CacheWriter, journal, open_cache, schema
from sest.cache.storage import storage_at
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.errors import InputError
from sest.progress import reporting


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embedding.plan, "SAMPLE_CELLS", 14)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_cells(tmp_path / f"{name}.h5ad", counts(n, seed=n)) for name, n in {"a": 21, "b": 13}.items()}


@pytest.fixture(params=["se", "pca"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> EmbedConfig:
    encoder = str(write_se(tmp_path / "se", gene_names(35))) if request.param == "se" else "pca"
    return EmbedConfig(encoder=encoder, dim="4", batch_size=3, device="cpu")


def test_new_files_are_embedded_with_the_caches_projection_and_old_ones_stay(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    embed([files["a"]], cache, config)
    before = hashes(cache)
    notes = Notes()
    with reporting(notes):
        assert embed([files["b"]], cache, config, add=True).complete
    assert "The new cells are projected with the PCA of the cache, which they had no part in." in notes.notes
    after = hashes(cache)
    besides = (schema.ROOT, schema.JOURNAL, schema.COMPLETE)
    assert all(after[name] == sha256 for name, sha256 in before.items() if name not in besides)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"b"}
    joined = open_cache(cache)
    assert list(joined.groups) == list(joined.attributes["inputs"]) == ["a", "b"] and joined.verify() == []
    native = EmbedConfig.from_values({**config.to_values(), "dim": "native", "dtype": "float32"}, "test")
    assert joined.projection is not None
    if config.encoder == "pca":
        values = np.log1p(counts(13, seed=13) / np.maximum(counts(13, seed=13).sum(1, keepdims=True), 1) * 10_000)
        genes = [gene_names(30).index(name) for name in joined.projection_attributes["genes"]]
        values = values[:, genes]
    else:
        embed([files["b"]], tmp_path / "native.zarr", native)
        values = open_cache(tmp_path / "native.zarr").groups["b"].embeddings()
    expected = (values - joined.projection["mean"]) @ joined.projection["basis"]
    np.testing.assert_allclose(joined.groups["b"].embeddings(), expected, atol=3e-3 * np.abs(expected).max())  # float16


def test_naming_old_files_again_is_fine_and_changed_ones_are_refused(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    embed([files["a"]], cache, config)
    assert embed(list(files.values()), cache, config, add=True).complete
    once = hashes(cache)
    for inputs in ([files["b"]], list(files.values())):
        assert embed(inputs, cache, config, add=True).complete
        assert hashes(cache) == once
    changed = write_cells(tmp_path / "other" / "b.h5ad", counts(13, seed=99))
    with pytest.raises(CacheError, match=r"made differently \(inputs.b.sha256"):
        embed([changed], cache, config, add=True)
    for option, value in (("seed", 3), ("dtype", "float32"), ("dim", "3")):
        other = EmbedConfig.from_values({**config.to_values(), option: value}, "test")
        with pytest.raises(CacheError, match=f"made differently .{option}: "):
            embed([write_cells(tmp_path / "c.h5ad", counts(9))], cache, other, add=True)
    assert hashes(cache) == once


def test_a_stopped_addition_is_continued(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (tmp_path / "whole.zarr", tmp_path / "s.zarr"):
        embed([files["a"]], cache, config)
    embed([files["b"]], tmp_path / "whole.zarr", config, add=True)
    with monkeypatch.context() as killed:
        killed.setattr(CacheWriter, "write_embedding_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed([files["b"]], cache, config, add=True)
    with pytest.raises(CacheError, match="unfinished"):
        open_cache(cache)
    assert embed([files["b"]], cache, config, add=True).complete
    assert hashes(cache) == hashes(tmp_path / "whole.zarr")


def test_nothing_is_added_to_what_is_not_there_or_not_finished(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    with pytest.raises(InputError, match=r"there is none at .*s.zarr. Leave --add out to make one"):
        embed([files["a"]], cache, config, add=True)
    embed([files["a"]], cache, config)
    (cache / schema.COMPLETE).unlink()
    storage = storage_at(cache)
    entries, _ = journal.read_journal(storage, schema.JOURNAL)
    lost = "a/obsm/X_sest/c/1/0"
    storage.write({schema.JOURNAL: journal.merged({k: v for k, v in entries.items() if k != lost})})
    before = hashes(cache)
    with pytest.raises(CacheError, match=r"is unfinished: a. Run the command that began it before adding files"):
        embed([files["b"]], cache, config, add=True)
    assert hashes(cache) == before
    assert embed(list(files.values()), cache, config, add=True).complete  # both named: both are finished


def test_a_file_without_the_genes_of_the_caches_pca_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    cache, config = tmp_path / "s.zarr", EmbedConfig(encoder="pca", dim="4")
    embed([files["a"]], cache, config)
    var = pd.DataFrame(index=[*gene_names(28), "X1", "X2"])
    other = write_cells(tmp_path / "c.h5ad", counts(9), var=var)
    with pytest.raises(InputError, match=r"lacks 2 of the 30 genes of the PCA of .*: G28, G29. Make a cache of all"):
        embed([other], cache, config, add=True)
