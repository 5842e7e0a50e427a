"""`sest embed --add`: files join a cache; what it has is not touched, and nothing else about it may differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
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
from sest.data.targets import read_targets
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
    assert f"The new cells are projected with the PCA of {cache}, which they had no part in." in notes.notes
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
    with pytest.raises(CacheError, match=r"made differently \(b: what the file holds\)"):
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


def rows_of_numbers(path: Path, order: list[int]) -> Path:
    """The counts of one seed with its genes in an `order`, named by a column beside an index of row numbers."""
    var = pd.DataFrame({"gene_name": [f"G{i}" for i in order]}, index=list(map(str, range(len(order)))))
    return write_cells(path, counts(21)[:, order], var=var)


@pytest.mark.parametrize("add", [False, True])
def test_targets_and_embeddings_of_files_with_row_numbers_are_aligned_by_gene(tmp_path: Path, add: bool) -> None:
    """The same cells twice, their genes in opposite order: the first cell's counts of G0, G1, G2 are those of both."""
    a = rows_of_numbers(tmp_path / "a.h5ad", list(range(30)))
    b = rows_of_numbers(tmp_path / "b.h5ad", list(range(29, -1, -1)))
    path, config = tmp_path / "c.zarr", EmbedConfig(encoder="pca", dim="4", dtype="float32")
    if add:
        embed([a], path, config)
        embed([b], path, config, add=True)
    else:
        embed([a, b], path, config)
    cache = open_cache(path)
    assert cache.groups["a"].genes == cache.groups["b"].genes[::-1] == gene_names(30)
    targets = read_targets(cache, 10_000)
    values = targets.log1p(np.arange(42)).toarray()
    np.testing.assert_allclose(values[:21], values[21:], rtol=1e-6)
    first = counts(21)[0]
    np.testing.assert_allclose(values[21, :3], np.log1p(first[:3] * 1e4 / first.sum()), rtol=1e-5)
    one, other = (cache.groups[name].embeddings(0, 21) for name in "ab")
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_file_without_the_genes_of_the_caches_pca_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    cache, config = tmp_path / "s.zarr", EmbedConfig(encoder="pca", dim="4")
    embed([files["a"]], cache, config)
    var = pd.DataFrame(index=[*gene_names(28), "X1", "X2"])
    other = write_cells(tmp_path / "c.h5ad", counts(9), var=var)
    with pytest.raises(InputError, match=r"lacks 2 of the 30 genes of the PCA of .*: G28, G29. Make a cache of all"):
        embed([other], cache, config, add=True)


def test_a_perturbation_that_differs_in_case_from_one_of_the_cache_does_not_join(
    files: dict[str, Path], tmp_path: Path
) -> None:
    config, cache = EmbedConfig(encoder="pca", dim="4", device="cpu"), tmp_path / "s.zarr"
    embed([files["a"]], cache, config)
    table = ad.read_h5ad(files["b"])
    table.obs["target_gene"] = table.obs["target_gene"].astype(str).replace({"STAT1": "Stat1"})
    table.write_h5ad(files["b"])
    with pytest.raises(InputError, match=r"'STAT1' \(a\) and 'Stat1' \(b\)"):
        embed([files["b"]], cache, config, add=True)
    assert list(open_cache(cache).groups) == ["a"]


def test_a_copy_of_a_file_is_refused_beside_it_and_where_the_cache_has_it(
    files: dict[str, Path], tmp_path: Path
) -> None:
    config, cache = EmbedConfig(encoder="pca", dim="4", device="cpu"), tmp_path / "s.zarr"
    copy = tmp_path / "a (1).h5ad"
    shutil.copyfile(files["a"], copy)
    for dry_run in (False, True):
        with pytest.raises(
            InputError, match=r"a \(1\)\.h5ad has the same cells as .*a\.h5ad: values, names and labels"
        ):
            embed([files["a"], copy], cache, config, dry_run=dry_run)
    embed([files["a"]], cache, config)
    with pytest.raises(InputError, match=r"a \(1\)\.h5ad has the same cells as a\.h5ad, which the cache has"):
        embed([files["b"], copy], cache, config, add=True)
    assert embed([files["a"], files["b"]], cache, config, add=True).complete  # the same file is no copy
    table = ad.read_h5ad(copy)
    table.obs_names = [f"other{i}" for i in range(table.n_obs)]
    table.write_h5ad(copy)
    assert embed([copy], cache, config, add=True).complete  # other cells
