"""The whole of what a run reads: splits, features and cells that fit each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.caches import SIZES, small_screen, write_cache
from helpers.configs import small_config
from helpers.datasets import TWO_SCREENS, two_screens
from helpers.notes import Notes
from sest.cache import open_cache
from sest.cells.split_file import TEST, TRAIN, VAL
from sest.data.dataset import Dataset, holds_out_in_one_context, read_dataset
from sest.data.features import StoredFeatures
from sest.data.labels import Labels
from sest.errors import InputError
from sest.progress import reporting


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "s.zarr", two_screens())


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("splits") / "splits.toml"
    path.write_text(TWO_SCREENS)
    return str(path)


def features(folder: Path, names: str) -> str:
    """A file with a vector of width 3 for every letter of `names`."""
    np.savez(folder / "f.npz", allow_pickle=False, **{n: np.full(3, ord(n), np.float32) for n in names})
    return str(folder / "f.npz")


def names_in(data: Dataset, bit: int, labels: Labels) -> set[tuple[str, str, str]]:
    rows = np.flatnonzero(data.in_split(bit))
    return {(*labels.contexts[labels.context[i]], labels.perturbations[labels.perturbation[i]]) for i in rows}


def test_a_splits_file_decides_which_cells_train_validate_and_test(cache: Path, splits: str) -> None:
    data = read_dataset(cache, small_config(splits=splits))
    labels = data.labels
    train, val, test = (names_in(data, bit, labels) for bit in (TRAIN, VAL, TEST))
    assert val == {("screen", "x", "P"), ("screen", "x", "ctrl")}
    assert test == {("other", "y", name) for name in ("ctrl", *SIZES)}
    assert ("screen", "y", "P") in train and ("screen", "x", "P") not in train
    assert {c for c in train if c[0] == "other" and c[1] == "y"} == {("other", "y", "ctrl")}
    assert [(r.dataset, r.cell_type, r.split, r.n_controls) for r in data.table if r.split != "train"] == [
        ("other", "y", "test", 7),
        ("screen", "x", "val", 7),
    ]


def test_a_cell_type_held_out_whole_is_named(cache: Path, splits: str) -> None:
    assert read_dataset(cache, small_config(splits=splits)).held_out_whole() == ["other / y"]
    assert read_dataset(cache, small_config()).held_out_whole() == []


def test_missing_features_are_an_error_drop_leaves_their_cells_out_and_zero_keeps_them(
    cache: Path, splits: str, tmp_path: Path
) -> None:
    path = features(tmp_path, "PQRT")  # S is missing

    def read(how: str) -> tuple[Dataset, list[str]]:
        notes = Notes()
        config = small_config(splits=splits, perturbations=path, missing_perturbations=how)
        with reporting(notes):
            return read_dataset(cache, config), notes.notes

    with pytest.raises(InputError, match=r"no features for 1 of 5 perturbations: S"):
        read("error")
    dropped, notes = read("drop")
    s = dropped.labels.perturbations.index("S")
    assert not dropped.mask[dropped.labels.perturbation == s].any()
    assert dropped.mask[dropped.labels.perturbation != s].all()
    assert sum(r.n_perturbed_cells for r in dropped.table) == 4 * (sum(SIZES.values()) - SIZES["S"])
    assert "No features for 1 perturbations, their cells are left out: S." in notes
    zero, notes = read("zero")
    assert zero.mask.all() and not zero.features.matrix[s].any()
    assert "No features for 1 perturbations, zero vectors stand in: S." in notes


def test_a_split_that_dropping_empties_is_refused_by_its_name(cache: Path, splits: str, tmp_path: Path) -> None:
    config = small_config(splits=splits, perturbations=features(tmp_path, "QRST"), missing_perturbations="drop")
    with pytest.raises(InputError, match=r"None of the perturbations of the val split has features \(P\)"):
        read_dataset(cache, config)


def test_perturbations_outside_all_splits_need_no_features(cache: Path, tmp_path: Path) -> None:
    lines = '[datasets]\nscreen = "a.h5ad"\n[training]\nscreen = "train"\n'
    (tmp_path / "splits.toml").write_text(lines)
    config = small_config(splits=str(tmp_path / "splits.toml"), perturbations=features(tmp_path, "PQRST"))
    notes = Notes()
    with reporting(notes):
        data = read_dataset(cache, config)
    assert not data.mask[data.labels.first[1] :].any() and any(
        "'other' is not in splits.toml" in n for n in notes.notes
    )


def test_one_hot_names_of_another_cache_are_refused(cache: Path) -> None:
    names = ("ctrl", "P", "Q", "R", "S", "T")
    assert read_dataset(cache, small_config(), stored=StoredFeatures(names, None, None)).features.names == names
    other = StoredFeatures((*names[:-1], "U"), None, None)
    with pytest.raises(InputError, match=r"one-hot features of other perturbations"):
        read_dataset(cache, small_config(), stored=other)


def test_the_hash_of_a_cache_is_that_of_how_it_was_made(cache: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(cache, moved)
    other = write_cache(tmp_path / "other.zarr", [small_screen("screen", seed=5)])
    first, second, third = (read_dataset(p, small_config()).cache.sha256 for p in (cache, moved, other))
    assert first == second != third


def test_a_cache_may_be_a_path_a_text_or_opened_already(cache: Path) -> None:
    hashes = {read_dataset(c, small_config()).cache.sha256 for c in (cache, str(cache), open_cache(cache))}
    assert len(hashes) == 1


def test_what_can_never_be_learned_has_no_training_cells_anywhere_or_no_vector(tmp_path: Path) -> None:
    cache, splits = write_cache(tmp_path / "s.zarr", [small_screen("screen")]), tmp_path / "s.toml"
    splits.write_text(
        '[datasets]\nscreen = "s.h5ad"\n[training]\nscreen = "train"\n[fewshot."screen.x"]\nval = ["P"]\n'
        '[fewshot."screen.y"]\ntest = ["P", "T"]\n'
    )
    data = read_dataset(cache, small_config(splits=str(splits)))
    assert data.perturbations_in(VAL) == ["P"] and data.perturbations_in(TEST) == ["P", "T"]
    assert data.never_learned() == ["P"]  # T trains in x
    assert data.contexts_with_one(VAL) == ["screen / x"] and data.contexts_with_one(TEST) == []
    given = features(tmp_path, "PQRT")
    config = small_config(splits=str(splits), perturbations=given, missing_perturbations="zero")
    assert read_dataset(cache, config).never_learned() == ["S"]


@pytest.mark.parametrize(
    ("contexts", "source", "one"),
    [("auto", "f.npz", False), ("one", "f.npz", True), ("auto", "onehot", True), ("all", "onehot", False)],
)
def test_one_hot_features_validate_in_one_context_unless_told_otherwise(contexts: str, source: str, one: bool) -> None:
    assert holds_out_in_one_context(contexts, source) == one


def test_the_automatic_validation_of_one_hot_features_is_of_what_trains(cache: Path) -> None:
    data = read_dataset(cache, small_config(val_fraction=0.9))
    assert data.perturbations_in(VAL) and data.never_learned() == []
    data = read_dataset(cache, small_config(val_fraction=0.6, val_contexts="all"))
    assert data.perturbations_in(VAL) == data.never_learned()
