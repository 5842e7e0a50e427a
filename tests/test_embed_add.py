"""`sest embed --add`: files join a store; what it has is not touched, and nothing else about it may differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small import Notes, counts, gene_names, hashes, small_shards, write_cells, write_se

import sest.embed_plan
from sest.cache import StoreError, StoreWriter, journal, open_cache, schema
from sest.cache.storage import storage_at
from sest.config import EmbedConfig
from sest.embed import embed
from sest.errors import InputError


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)
    monkeypatch.setattr(sest.embed_plan, "SAMPLE_CELLS", 14)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_cells(tmp_path / f"{name}.h5ad", counts(n, seed=n)) for name, n in {"a": 21, "b": 13}.items()}


@pytest.fixture(params=["se", "pca"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> EmbedConfig:
    encoder = str(write_se(tmp_path / "se", gene_names(35))) if request.param == "se" else "pca"
    return EmbedConfig(encoder=encoder, dim="4", batch_size=3, device="cpu")


def test_new_files_are_embedded_with_the_stores_projection_and_old_ones_stay(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    embed([files["a"]], cache, config, Notes())
    before = hashes(cache)
    notes = Notes()
    assert embed([files["b"]], cache, config, notes, add=True).complete
    assert "The new cells are projected with the PCA of the store, which they had no part in." in notes.notes
    after = hashes(cache)
    besides = (schema.ROOT, schema.JOURNAL, schema.COMPLETE)
    assert all(after[name] == sha256 for name, sha256 in before.items() if name not in besides)
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"b"}
    store = open_cache(cache)
    assert list(store.groups) == ["a", "b"] and store.verify() == [] and list(store.attributes["inputs"]) == ["a", "b"]
    native = EmbedConfig.from_values({**config.to_values(), "dim": "native", "dtype": "float32"}, "test")
    assert store.projection is not None
    if config.encoder == "pca":
        values = np.log1p(counts(13, seed=13) / np.maximum(counts(13, seed=13).sum(1, keepdims=True), 1) * 10_000)
        genes = [gene_names(30).index(name) for name in store.projection_attributes["genes"]]
        values = values[:, genes]
    else:
        embed([files["b"]], tmp_path / "native.zarr", native, Notes())
        values = open_cache(tmp_path / "native.zarr").groups["b"].embeddings()
    expected = (values - store.projection["mean"]) @ store.projection["basis"]
    np.testing.assert_allclose(store.groups["b"].embeddings(), expected, atol=3e-3 * np.abs(expected).max())  # float16


def test_naming_old_files_again_is_fine_and_changed_ones_are_refused(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    embed([files["a"]], cache, config, Notes())
    assert embed(list(files.values()), cache, config, Notes(), add=True).complete
    once = hashes(cache)
    for inputs in ([files["b"]], list(files.values())):
        assert embed(inputs, cache, config, Notes(), add=True).complete
        assert hashes(cache) == once
    changed = write_cells(tmp_path / "other" / "b.h5ad", counts(13, seed=99))
    with pytest.raises(StoreError, match=r"made differently \(inputs.b.sha256"):
        embed([changed], cache, config, Notes(), add=True)
    for option, value in (("seed", 3), ("dtype", "float32"), ("dim", "3")):
        other = EmbedConfig.from_values({**config.to_values(), option: value}, "test")
        with pytest.raises(StoreError, match=f"made differently .{option}: "):
            embed([write_cells(tmp_path / "c.h5ad", counts(9))], cache, other, Notes(), add=True)
    assert hashes(cache) == once


def test_a_stopped_addition_is_continued(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (tmp_path / "whole.zarr", tmp_path / "s.zarr"):
        embed([files["a"]], cache, config, Notes())
    embed([files["b"]], tmp_path / "whole.zarr", config, Notes(), add=True)
    with monkeypatch.context() as killed:
        killed.setattr(StoreWriter, "write_embedding_shard", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            embed([files["b"]], cache, config, Notes(), add=True)
    with pytest.raises(StoreError, match="unfinished"):
        open_cache(cache)
    assert embed([files["b"]], cache, config, Notes(), add=True).complete
    assert hashes(cache) == hashes(tmp_path / "whole.zarr")


def test_nothing_is_added_to_what_is_not_there_or_not_finished(
    files: dict[str, Path], config: EmbedConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "s.zarr"
    with pytest.raises(InputError, match=r"there is none at .*s.zarr. Leave --add out to make one"):
        embed([files["a"]], cache, config, Notes(), add=True)
    embed([files["a"]], cache, config, Notes())
    (cache / schema.COMPLETE).unlink()
    storage = storage_at(cache)
    entries, _ = journal.read_journal(storage, schema.JOURNAL)
    lost = "a/obsm/X_sest/c/1/0"
    storage.write({schema.JOURNAL: journal.merged({k: v for k, v in entries.items() if k != lost})})
    before = hashes(cache)
    with pytest.raises(StoreError, match=r"is unfinished: a. Run the command that began it before adding files"):
        embed([files["b"]], cache, config, Notes(), add=True)
    assert hashes(cache) == before
    assert embed(list(files.values()), cache, config, Notes(), add=True).complete  # both named: both are finished


def test_a_file_without_the_genes_of_the_stores_pca_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    cache, config = tmp_path / "s.zarr", EmbedConfig(encoder="pca", dim="4")
    embed([files["a"]], cache, config, Notes())
    var = pd.DataFrame(index=[*gene_names(28), "X1", "X2"])
    other = write_cells(tmp_path / "c.h5ad", counts(9), var=var)
    with pytest.raises(InputError, match=r"lacks 2 of the 30 genes of the PCA of .*: G28, G29. Make a store of all"):
        embed([other], cache, config, Notes(), add=True)
