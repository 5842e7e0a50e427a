"""The whole of what a run reads: splits, features and cells that fit each other, and pseudobulks of splits."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import SIZES, Notes, tiny_config, tiny_group, write_store

from sest.cells import Labels
from sest.dataset import Dataset, pseudobulks, read_dataset, split_pairs, training_means
from sest.errors import InputError
from sest.progress import Silent
from sest.splits import TEST, TRAIN, VAL

SPLITS = """
[datasets]
screen = "screen.h5ad"
other = "other.h5ad"
[training]
screen = "train"
other = "train"
[zeroshot]
"other.y" = "test"
[fewshot."screen.x"]
val = ["P"]
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two count files with the cell types x and y each."""
    groups = [tiny_group("screen"), tiny_group("other", control="nt", seed=1)]
    return write_store(tmp_path_factory.mktemp("store") / "s.zarr", groups)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("splits") / "splits.toml"
    path.write_text(SPLITS)
    return str(path)


def features(folder: Path, names: str) -> str:
    """A file with a vector of width 3 for every letter of `names`."""
    np.savez(folder / "f.npz", allow_pickle=False, **{n: np.full(3, ord(n), np.float32) for n in names})
    return str(folder / "f.npz")


def names_in(data: Dataset, bit: int, labels: Labels) -> set[tuple[str, str, str]]:
    rows = np.flatnonzero(data.in_split(bit))
    return {(*labels.contexts[labels.context[i]], labels.perturbations[labels.perturbation[i]]) for i in rows}


def test_a_splits_file_decides_which_cells_train_validate_and_test(store: Path, splits: str) -> None:
    data = read_dataset(store, tiny_config(splits=splits), Silent())
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


def test_a_cell_type_held_out_whole_is_named(store: Path, splits: str) -> None:
    assert read_dataset(store, tiny_config(splits=splits), Silent()).held_out_whole() == ["other / y"]
    assert read_dataset(store, tiny_config(), Silent()).held_out_whole() == []


def test_missing_features_are_an_error_drop_leaves_their_cells_out_and_zero_keeps_them(
    store: Path, splits: str, tmp_path: Path
) -> None:
    path = features(tmp_path, "PQRT")  # S is missing

    def read(how: str) -> tuple[Dataset, list[str]]:
        notes = Notes()
        config = tiny_config(splits=splits, perturbations=path, missing_perturbations=how)
        return read_dataset(store, config, notes), notes.texts

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


def test_a_split_that_dropping_empties_is_refused_by_its_name(store: Path, splits: str, tmp_path: Path) -> None:
    config = tiny_config(splits=splits, perturbations=features(tmp_path, "QRST"), missing_perturbations="drop")
    with pytest.raises(InputError, match=r"None of the perturbations of the val split has features \(P\)"):
        read_dataset(store, config, Silent())


def test_perturbations_outside_all_splits_need_no_features(store: Path, tmp_path: Path) -> None:
    lines = '[datasets]\nscreen = "a.h5ad"\n[training]\nscreen = "train"\n'
    (tmp_path / "splits.toml").write_text(lines)
    config = tiny_config(splits=str(tmp_path / "splits.toml"), perturbations=features(tmp_path, "PQRST"))
    notes = Notes()
    data = read_dataset(store, config, notes)
    assert not data.mask[data.labels.first[1] :].any() and any(
        "'other' is not in splits.toml" in n for n in notes.texts
    )


def test_one_hot_names_of_another_store_are_refused(store: Path) -> None:
    names = ("ctrl", "P", "Q", "R", "S", "T")
    assert read_dataset(store, tiny_config(), Silent(), feature_names=names).features.names == names
    with pytest.raises(InputError, match=r"one-hot features of other perturbations"):
        read_dataset(store, tiny_config(), Silent(), feature_names=("ctrl", "P", "Q", "R", "S", "U"))


def test_pseudobulks_are_means_of_log1p_cells(store: Path) -> None:
    data = read_dataset(store, tiny_config(), Silent())
    code = np.where(data.labels.perturbation == 2, -1, data.labels.perturbation % 2)
    got = pseudobulks(data.targets, code, 2)
    dense = data.targets.log1p(np.arange(len(code))).toarray().astype(np.float64)
    np.testing.assert_allclose(got, [dense[code == 0].mean(0), dense[code == 1].mean(0)], rtol=1e-12)


def test_pseudobulks_in_blocks_are_the_same(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_dataset(store, tiny_config(), Silent())
    whole = pseudobulks(data.targets, data.labels.context, 4)
    monkeypatch.setattr("sest.dataset.ROWS_PER_BLOCK", 9)
    np.testing.assert_allclose(pseudobulks(data.targets, data.labels.context, 4), whole, rtol=1e-12)


def test_the_pairs_of_a_split_stand_beside_the_controls_of_their_context(store: Path, splits: str) -> None:
    data = read_dataset(store, tiny_config(splits=splits), Silent())
    labels = data.labels
    pairs = split_pairs(data, TEST)
    assert [labels.contexts[c] for c in pairs.context] == [("other", "y")] * 5
    assert [labels.perturbations[p] for p in pairs.perturbation] == list(SIZES)
    assert pairs.n_cells.tolist() == list(SIZES.values())
    dense = data.targets.log1p(np.arange(len(labels))).toarray().astype(np.float64)
    for k, (c, p) in enumerate(zip(pairs.context, pairs.perturbation, strict=True)):
        mine = (labels.context == c) & (labels.perturbation == p)
        np.testing.assert_allclose(pairs.observed[k], dense[mine].mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            pairs.control[k], dense[(labels.context == c) & labels.is_control].mean(0), rtol=1e-12
        )


def test_training_means_are_effects_against_the_context_s_own_controls(store: Path, splits: str) -> None:
    data = read_dataset(store, tiny_config(splits=splits), Silent())
    means, pairs = training_means(data), split_pairs(data, TRAIN)
    assert len(means.delta) == 4 + 5 + 5  # P of screen/x validates, other/y is for the test
    np.testing.assert_allclose(means.delta, pairs.observed - pairs.control)
    assert means.contexts == ("screen/x", "screen/y", "other/x") and means.perturbations == tuple(SIZES)
    first = means.pair_context.tolist().index(1)
    assert means.perturbations[means.pair_perturbation[first]] == "P"


def test_the_hash_of_a_store_is_that_of_how_it_was_made(store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(store, moved)
    other = write_store(tmp_path / "other.zarr", [tiny_group("screen", seed=5)])
    first, second, third = (read_dataset(p, tiny_config(), Silent()).cache_sha256 for p in (store, moved, other))
    assert first == second != third
