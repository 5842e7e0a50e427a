"""What a run's cache adds: held-out pairs as its checkpoint predicts them, and why a part is missing where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.caches import GENES, small_screen, write_cache
from helpers.pages import CELL_TYPE, SIZES, Trained
from sest.facts.cache import CacheFacts, read_cache
from sest.facts.run import read_runs


def facts_of(run: Path, n_sets: int = 0, **places: Any) -> CacheFacts:
    """What the cache of a run adds; n_sets 0: every cell is predicted."""
    facts = read_runs([run], **places)[0]
    return read_cache(facts, n_sets=n_sets, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> CacheFacts:
    return facts_of(trained.run)


def test_a_whole_cache_gives_its_splits_pairs_cells_and_embeddings(whole: CacheFacts) -> None:
    assert whole.notes == {} and whole.genes == GENES and whole.table is not None
    assert whole.pairs is not None and [result.split for result in whole.pairs] == ["val", "test"]
    assert whole.cells is not None and whole.map is not None and list(whole.map.places) == ["PCA"]


# --- what is missing


def test_without_a_cache_every_part_says_why(trained: Trained, tmp_path: Path) -> None:
    found = facts_of(trained.run, cache=str(tmp_path / "gone.zarr"))
    assert set(found.notes) == {"table", "pairs", "map"} and found.attributes == {} and found.genes == ()
    assert (found.table, found.pairs, found.map) == (None, None, None)
    assert "The run's cache cannot be opened" in found.notes["map"] and "gone.zarr does not exist" in found.notes["map"]
    assert "does not say where its cache is. Pass --cache." in facts_of(trained.run, cache="").notes["pairs"]


def test_without_its_features_the_map_is_still_made(trained: Trained, tmp_path: Path) -> None:
    found = facts_of(trained.run, perturbations=str(tmp_path / "gone.npz"))
    assert found.table is None and found.pairs is None and found.map is not None
    assert found.notes["table"] == found.notes["pairs"] and "Pass --perturbations with it." in found.notes["pairs"]


def test_a_cache_with_other_cells_is_counted_and_not_predicted_with(trained: Trained, tmp_path: Path) -> None:
    other = write_cache(tmp_path / "o.zarr", [small_screen(sizes=SIZES, cell_types=("x", CELL_TYPE), seed=1)])
    found = facts_of(trained.run, cache=str(other))
    assert found.pairs is None and "was trained on. Pass --cache with that one." in found.notes["pairs"]
    assert found.table is not None and found.map is not None and set(found.notes) == {"pairs"}
