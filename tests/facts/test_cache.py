"""What a run's cache adds: held-out pairs as its checkpoint predicts them, and why a part is missing where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.caches import GENES, small_screen, write_cache
from helpers.configs import small_config
from helpers.pages import CELL_TYPE, HOSTILE, SIZES, Trained
from sest.report.cache_facts import CacheFacts, read_cache
from sest.report.run_facts import read_runs
from sest.runs.checkpoint import Checkpoint
from sest.training.train import train


def facts_of(run: Path, n_sets: int = 0, **places: Any) -> CacheFacts:
    """What the cache of a run adds; n_sets 0: every cell is predicted."""
    facts = read_runs([run], **places)[0]
    return read_cache(facts, n_sets=n_sets, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> CacheFacts:
    return facts_of(trained.run)


def test_pairs_of_both_splits_are_predicted(whole: CacheFacts) -> None:
    assert whole.notes == {} and whole.genes == GENES and whole.pairs is not None
    val, test = whole.pairs
    assert (val.split, test.split) == ("val", "test")
    assert sorted(zip(val.perturbations, val.cell_types, strict=True)) == [
        (HOSTILE, "x"),
        ("P", "x"),
        ("S", CELL_TYPE),
        ("T", "x"),
    ]
    assert (test.perturbations, test.cell_types, test.n_cells.tolist()) == (["Q"], ["x"], [SIZES["Q"]])


def test_scores_average_to_the_validation_of_that_checkpoint(
    trained: Trained, whole: CacheFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert whole.pairs is not None
    scores = whole.pairs[0].scores
    assert scores["stack"].mean() == pytest.approx(trained.best["pearson_delta_stack"], rel=1e-5)
    run = read_runs([trained.run])[0]
    assert run.checkpoint is not None and run.checkpoint.has_blend
    for part in ("head", "stack"):  # of what is blended, each alone; batches of another size
        blend = run.checkpoint.blend()
        means = {name: float(name == part) for name in blend.weights.means}
        alone = replace(blend, weights=replace(blend.weights, means=means))
        monkeypatch.setattr(Checkpoint, "blend", lambda _, alone=alone: alone)
        facts = read_cache(run, n_sets=0, device=torch.device("cpu"))
        assert facts.pairs is not None
        of = "" if part == "head" else "_stack"
        for name in ("pearson_delta", "mae", "pds"):
            values = facts.pairs[0].scores[name]
            values = values[~np.isnan(values)] if name == "pds" else values  # one pair has no pds
            assert values.mean() == pytest.approx(trained.best[f"{name}{of}"], rel=1e-5), (part, name)


def test_effects_are_those_of_the_raw_counts(trained: Trained, whole: CacheFacts) -> None:
    assert whole.pairs is not None
    counts = trained.group.matrix.toarray().astype(float)
    log1p = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    obs = trained.group.obs
    for result in whole.pairs:
        for k, (name, cell_type) in enumerate(zip(result.perturbations, result.cell_types, strict=True)):
            of = (obs["cell_type"] == cell_type).to_numpy()
            mine, control = (of & (obs["perturbation"] == label).to_numpy() for label in (name, "ctrl"))
            change = log1p[mine].mean(0) - log1p[control].mean(0)
            assert result.observed[k] == pytest.approx(change, rel=1e-5, abs=1e-6)  # float32 log1p
            assert result.effect[k] == pytest.approx(np.linalg.norm(change), rel=1e-5)


def test_a_limit_on_sets_is_kept_for_each_split(trained: Trained, tmp_path: Path) -> None:
    pairs = facts_of(trained.run, n_sets=5).pairs
    # val: 8, 7, 9 and 6 cells in sets of 4; 2 + 2 + 3 + 2 sets; test: 5 cells, 2 sets
    assert pairs is not None and [(r.n_sets, r.of_sets) for r in pairs] == [(5, 9), (2, 2)]


def test_cell_types_of_several_datasets_are_named_with_theirs(tmp_path: Path) -> None:
    groups = [small_screen(path, sizes={"P": 4, "Q": 4}, cell_types=("x",), seed=i) for i, path in enumerate("ab")]
    train(write_cache(tmp_path / "s.zarr", groups), tmp_path / "run", small_config(max_steps=4, val_fraction=0.5))
    pairs = facts_of(tmp_path / "run").pairs
    assert pairs is not None and set(pairs[0].cell_types) <= {"a/x", "b/x"}


def test_pairs_of_which_nothing_can_be_learned_are_counted(trained: Trained, whole: CacheFacts, tmp_path: Path) -> None:
    train(trained.cache, tmp_path / "run", small_config(max_steps=1, val_contexts="all"))
    pairs = facts_of(tmp_path / "run").pairs
    assert pairs is not None and pairs[0].n_not_learned == len(pairs[0].perturbations) > 0
    assert whole.pairs is not None and whole.pairs[0].n_not_learned == 0


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
