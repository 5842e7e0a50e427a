"""encoder/genes.py: log1p of the most variable genes, found by name in every file; missing ones only as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from helpers.h5ad_files import counts, gene_names, write_cells
from sest.cache import open_cache
from sest.cells.inputs import Cells
from sest.config import EmbedConfig
from sest.embedding.embed import embed
from sest.encoder.genes import GenesEncoder
from sest.errors import InputError

Opened = Callable[..., list[Cells]]


def normalised(values: np.ndarray) -> np.ndarray:
    """Counts (n, G) as log1p of counts per 10,000; an empty cell stays empty."""
    total = values.sum(1, keepdims=True, dtype=np.float64)
    return np.log1p(values * np.divide(1e4, total, out=np.zeros_like(total), where=total > 0))


def embedded(paths: list[Path], cache: Path, **options: object) -> dict[str, np.ndarray]:
    """Group -> its embeddings, as stored in float32."""
    embed(paths, cache, EmbedConfig(encoder="genes", dtype="float32"), **options)  # type: ignore[arg-type]
    return {name: group.embeddings(0, group.n_cells) for name, group in open_cache(cache).groups.items()}


def test_the_most_variable_genes_are_stored_as_they_are(tmp_path: Path) -> None:
    values = counts(40, 30) * np.arange(30)  # later genes vary more
    path = write_cells(tmp_path / "a.h5ad", values)
    embed([path], tmp_path / "c.zarr", EmbedConfig(encoder="genes", dim=7, dtype="float32"))
    cache = open_cache(tmp_path / "c.zarr")
    expected = normalised(values)
    kept = np.sort(np.argsort(-expected.var(0), kind="stable")[:7])
    np.testing.assert_allclose(cache.groups["a"].embeddings(0, 40), expected[:, kept], rtol=1e-6)  # float32
    assert cache.projection_attributes["genes"] == [f"G{i}" for i in kept]
    np.testing.assert_allclose(cache.projection_attributes["means"], expected[:, kept].mean(0), rtol=1e-6)
    assert (cache.attributes["projection"], cache.dim, cache.attributes["licence"]) == ("genes", 7, None)


def test_without_a_width_all_genes_up_to_2000_are_stored(tmp_path: Path) -> None:
    assert GenesEncoder(["A"]).default_dim == 2000
    values = counts(40, 30)
    stored = embedded([write_cells(tmp_path / "a.h5ad", values)], tmp_path / "c.zarr")
    np.testing.assert_allclose(stored["a"], normalised(values), rtol=1e-6)


def test_genes_of_a_file_that_joins_are_found_by_name_and_missing_ones_refused(tmp_path: Path) -> None:
    values = counts(40, 30)
    first = write_cells(tmp_path / "a.h5ad", values)
    order = np.random.default_rng(0).permutation(30)
    ad.read_h5ad(first)[:, order].write_h5ad(tmp_path / "b.h5ad")
    embedded([first], tmp_path / "c.zarr")
    stored = embedded([first, tmp_path / "b.h5ad"], tmp_path / "c.zarr", add=True)
    np.testing.assert_array_equal(stored["a"], stored["b"])
    ad.read_h5ad(first)[:, 4:].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(InputError, match=r"lacks 4 of the 30 genes .*G0.*Pass --missing-genes zero or mean"):
        embedded([first, tmp_path / "b.h5ad", tmp_path / "few.h5ad"], tmp_path / "c.zarr", add=True)


@pytest.mark.parametrize("encoder", ["genes", "pca"])
@pytest.mark.parametrize("rule", ["zero", "mean"])
def test_missing_genes_are_taken_for_what_was_asked_and_that_is_kept(tmp_path: Path, encoder: str, rule: str) -> None:
    values = counts(40, 30)
    first, few = write_cells(tmp_path / "a.h5ad", values), tmp_path / "few.h5ad"
    ad.read_h5ad(first)[:, 4:].write_h5ad(few)
    config = EmbedConfig(encoder=encoder, dim=6 if encoder == "pca" else None, dtype="float32")
    embed([first], tmp_path / "c.zarr", config)
    embed(
        [first, few],
        tmp_path / "c.zarr",
        EmbedConfig.from_values(config.to_values() | {"missing_genes": rule}, ""),
        add=True,
    )
    cache = open_cache(tmp_path / "c.zarr")
    expected = np.concatenate([np.zeros((40, 4)), normalised(values[:, 4:])], 1)
    if rule == "mean":
        expected[:, :4] = normalised(values)[:, :4].mean(0)
    if encoder == "pca":
        fitted = cache.projection or {}
        expected = (expected - fitted["mean"]) @ fitted["basis"]
    np.testing.assert_allclose(cache.groups["few"].embeddings(0, 40), expected, atol=2e-5)  # float32 scores up to 15
    assert cache.attributes["inputs"]["few"]["missing_genes"] == {"taken_for": rule, "n": 4}
    assert "missing_genes" not in cache.attributes["inputs"]["a"]


def test_missing_genes_are_for_files_that_join(tmp_path: Path) -> None:
    path = write_cells(tmp_path / "a.h5ad", counts())
    with pytest.raises(InputError, match=r"--missing-genes is for files that join a cache with --add"):
        embed([path], tmp_path / "c.zarr", EmbedConfig(encoder="pca", missing_genes="zero"))


def test_batches_do_not_matter(tmp_path: Path, opened: Opened) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    encoder = GenesEncoder(gene_names(30))
    encoder.prepare(cells, [np.arange(40)], None, 10)
    numbers = np.arange(40)
    whole = encoder.encode(cells[0], cells[0].read(numbers), numbers)
    parts = [encoder.encode(cells[0], cells[0].read(part), part) for part in np.array_split(numbers, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
