"""The map of the embeddings: a seeded sample, its labels, and its principal components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.caches import DIM, small_screen, write_cache
from helpers.pages import Trained
from sest.cache import open_cache
from sest.errors import InputError
from sest.facts import embeddings
from sest.facts.embeddings import map_embeddings, principal_components


def test_principal_components_are_those_of_the_covariance() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 7)) @ np.diag([5, 3, 2, 1, 1, 1, 1])
    places, explained = principal_components(vectors.astype(np.float32))
    values, basis = np.linalg.eigh(np.cov(vectors.T))
    expected = (vectors - vectors.mean(0)) @ basis[:, ::-1][:, :2]
    assert np.abs(places) == pytest.approx(np.abs(expected), abs=1e-4)  # float32 vectors; signs are free
    assert explained == pytest.approx(values[::-1][:2] / values.sum(), rel=1e-5)
    flat, shares = principal_components(np.ones((1, 3), np.float32))
    assert flat.shape == (1, 2) and shares == (0.0, 0.0)


def test_the_map_is_a_seeded_sample_with_the_labels_of_its_cells(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MOST_CELLS", 30)
    group, cache = trained.group, open_cache(trained.cache)
    cells, again = (map_embeddings(cache, seed=3) for _ in range(2))
    assert cells.n_cells == len(group.obs) and len(cells.is_control) == 30
    assert cells.labels == again.labels and (cells.places["PCA"] == again.places["PCA"]).all()
    rows = np.sort(np.random.default_rng(3).choice(len(group.obs), 30, replace=False))
    obs = group.obs.iloc[rows]
    assert cells.labels["cell type"] == obs["cell_type"].tolist() and cells.labels["batch"] == obs["batch"].tolist()
    assert cells.is_control.tolist() == (obs["perturbation"] == "ctrl").tolist()
    assert cells.places["PCA"] == pytest.approx(principal_components(group.embeddings[rows])[0], abs=0.05)  # float16
    assert group.embeddings.shape[1] == DIM


def test_batches_of_several_files_never_have_one_name(tmp_path: Path) -> None:
    groups = [small_screen(path, sizes={"P": 3}, n_controls=2, batches=("b",), seed=i) for i, path in enumerate("ab")]
    cells = map_embeddings(open_cache(write_cache(tmp_path / "s.zarr", groups)))
    assert set(cells.labels["batch"]) == {"a/b", "b/b"} and cells.n_cells == 2 * 2 * (2 + 3)
    assert set(cells.labels["perturbation"]) == {"P", "control"}


def test_cells_without_an_embedding_are_left_out_and_none_at_all_is_said(tmp_path: Path) -> None:
    group = small_screen(sizes={"P": 3}, n_controls=2)
    group.embeddings[2:] = np.nan
    assert len(map_embeddings(open_cache(write_cache(tmp_path / "s.zarr", [group]))).is_control) == 2
    group.embeddings[:] = np.nan
    with pytest.raises(InputError, match=r"No cell of .*t\.zarr has a finite embedding"):
        map_embeddings(open_cache(write_cache(tmp_path / "t.zarr", [group])))


def test_a_umap_is_drawn_only_if_it_is_asked_for(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_umap", lambda vectors, seed: vectors[:, :2])
    cache = open_cache(trained.cache)
    assert list(map_embeddings(cache).places) == ["PCA"]
    assert list(map_embeddings(cache, umap=True).places) == ["PCA", "UMAP"]
