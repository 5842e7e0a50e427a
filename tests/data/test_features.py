"""Perturbation features: a vector a perturbation, whatever they are from; what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from helpers.caches import small_screen
from helpers.datasets import opened
from helpers.notes import Notes
from sest.config import TrainConfig
from sest.data.features import Features, equal_vectors, with_sources
from sest.data.features import make_features as features_of
from sest.data.vectors import ONE_HOT, read_sources
from sest.errors import InputError
from sest.progress import reporting

NAMES = ("ctrl", "STAT1", "JAK2", "MYC")
VECTORS = {
    "STAT1": np.array([1, 2, 3], np.float32),
    "JAK2": np.array([4, 5, 6], np.float32),
    "GATA1": np.array([7, 8, 9], np.float32),
}


def make_features(source: str, names: tuple[str, ...], missing: str, needed: set[str] | None = None) -> Features:
    return features_of(read_sources(source, names[1:]), names, missing, needed=needed)


def saved(folder: Path, vectors: dict[str, np.ndarray], suffix: str = ".npz") -> str:
    path = folder / f"features{suffix}"
    if suffix == ".npz":
        np.savez(path, allow_pickle=False, **vectors)
    elif suffix == ".pt":
        torch.save({name: torch.from_numpy(v) for name, v in vectors.items()}, path)
    else:
        save_file(vectors, path)
    return str(path)


def test_one_hot_gives_every_perturbation_its_own_column_and_the_control_none() -> None:
    features = make_features(ONE_HOT, NAMES, "error")
    np.testing.assert_array_equal(features.matrix, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert features.matrix.dtype == np.float32 and features.width == 3
    assert features.source == ONE_HOT and features.missing == ()
    np.testing.assert_array_equal(features.as_mapping()["JAK2"], [0, 1, 0])
    assert "ctrl" not in features.as_mapping()


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_file_gives_vectors_by_name_in_the_order_of_the_data(tmp_path: Path, suffix: str) -> None:
    features = make_features(saved(tmp_path, VECTORS, suffix), NAMES[:3], "error")
    np.testing.assert_array_equal(features.matrix, [[0, 0, 0], [1, 2, 3], [4, 5, 6]])
    assert features.source == f"features{suffix}" and features.names == NAMES[:3]
    assert features.sha256 == make_features(saved(tmp_path, VECTORS), NAMES[:3], "error").sha256


def test_the_control_may_have_a_vector_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, {**VECTORS, "ctrl": np.array([9, 9, 9], np.float32)})
    np.testing.assert_array_equal(make_features(path, NAMES[:2], "error").matrix[0], [9, 9, 9])


def test_missing_vectors_are_listed_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        make_features(saved(tmp_path, VECTORS), (*NAMES, "STAT"), "error")
    assert "no features for 2 of 4 perturbations: MYC, STAT" in str(error.value)
    assert "--missing-perturbations drop" in str(error.value)
    with pytest.raises(InputError, match=r"Did you mean 'STAT1'"):
        make_features(saved(tmp_path, VECTORS), ("ctrl", "JAK2", "STAT"), "error")


@pytest.mark.parametrize("missing", ["drop", "zero"])
def test_drop_and_zero_name_what_is_missing_and_stand_in_zeros(tmp_path: Path, missing: str) -> None:
    features = make_features(saved(tmp_path, VECTORS), NAMES, missing)
    assert features.missing == ("MYC",)
    assert not features.matrix[3].any() and features.matrix[1].any()


def test_perturbations_that_no_split_uses_need_no_vector(tmp_path: Path) -> None:
    features = make_features(saved(tmp_path, VECTORS), NAMES, "error", needed={"STAT1", "JAK2"})
    assert features.missing == () and not features.matrix[3].any()
    assert make_features(saved(tmp_path, VECTORS), NAMES, "error", needed=set()).missing == ()


def test_a_file_that_has_none_of_the_perturbations_is_refused_whatever_was_asked(tmp_path: Path) -> None:
    for missing in ("drop", "zero"):
        with pytest.raises(InputError, match=r"features for none of the 2.*for example: STAT1, JAK2.*data has: A, B"):
            make_features(saved(tmp_path, VECTORS), ("ctrl", "A", "B"), missing)


def test_the_hash_tells_names_and_vectors_apart(tmp_path: Path) -> None:
    other = {**VECTORS, "STAT1": np.array([1, 2, 4], np.float32)}
    hashes = {
        make_features(saved(tmp_path, VECTORS), NAMES[:3], "error").sha256,
        make_features(saved(tmp_path, other), NAMES[:3], "error").sha256,
        make_features(saved(tmp_path, VECTORS), ("ctrl", "JAK2", "STAT1"), "error").sha256,
    }
    assert len(hashes) == 3


def test_equal_vectors_are_found() -> None:
    vectors = [np.array(v, np.float32) for v in ([0, 1], [2, 3], [-0.0, 1], [2, 3], [4, 5])]
    assert equal_vectors("ABCDE", vectors) == [["A", "C"], ["B", "D"]]


def test_combinations_get_the_sum_of_their_targets_which_is_said(tmp_path: Path) -> None:
    names, notes = (*NAMES[:3], "STAT1+JAK2", "JAK2+GATA1"), Notes()
    with reporting(notes):
        features = make_features(saved(tmp_path, VECTORS), names, "error")
    np.testing.assert_array_equal(features.matrix[3:], [[5, 7, 9], [11, 13, 15]])
    assert notes.notes == [
        "2 combinations get the sum of their targets' vectors in features.npz: STAT1+JAK2, JAK2+GATA1."
    ]
    own = {**VECTORS, "STAT1+JAK2": np.array([0, 0, 1], np.float32)}
    np.testing.assert_array_equal(make_features(saved(tmp_path, own), names, "error").matrix[3], [0, 0, 1])
    with pytest.raises(InputError, match=r"1 of 2 .* STAT1\+JAK. Of STAT1\+JAK it lacks JAK. Did you mean 'J"):
        make_features(saved(tmp_path, VECTORS), ("ctrl", "STAT1", "STAT1+JAK"), "error")


def test_one_hot_columns_stand_for_targets_so_that_unseen_combinations_of_seen_ones_are_learned() -> None:
    names = ("ctrl", "A", "B", "A+B", "A+C")
    features = make_features(ONE_HOT, names, "error")
    np.testing.assert_array_equal(features.matrix, [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1]])
    assert features.never_learned(["A", "B"]) == ["A+C"]
    assert features.never_learned(["A+B"]) == ["A+C"] and features.never_learned(["B"]) == ["A", "A+B", "A+C"]


def test_what_one_source_lacks_is_zero_there_and_missing_only_where_no_other_has_it(tmp_path: Path) -> None:
    notes = Notes()
    with reporting(notes):
        features = make_features(f"{ONE_HOT}+{saved(tmp_path, VECTORS)}", NAMES, "error")
    assert features.source == "onehot+features.npz" and features.missing == ()
    np.testing.assert_array_equal(features.matrix[:, :3], np.eye(4, 3, -1))
    size = np.sqrt(np.mean(np.square(np.arange(1, 10))))  # of all numbers in the file
    np.testing.assert_allclose(features.matrix[1, 3:], np.array([1, 2, 3]) / size, rtol=1e-3)  # four digits of it
    assert not features.matrix[3, 3:].any()
    assert notes.notes == ["features.npz has no vector for 1 perturbations, zeros there: MYC."]
    assert features.never_learned(["JAK2"]) == ["MYC"]  # STAT1 has a vector, MYC only a column


def test_what_nobody_named_is_the_genes_vectors_where_all_targets_are_measured_and_columns_elsewhere(
    tmp_path: Path,
) -> None:
    sizes = {"g1": 4, "g2": 4, "g1+g3": 4}
    measured = opened(tmp_path / "a", small_screen("a", sizes=sizes), small_screen("b", sizes={"g4": 5}))
    with reporting(notes := Notes()):
        assert with_sources(TrainConfig(), measured).perturbations == "genes"
    assert notes.notes == [
        "Perturbation features: genes, their loadings in the control cells, as all 4 targets are measured genes. "
        "--perturbations onehot has a column of each instead."
    ]
    assert with_sources(TrainConfig(gene_axis="union"), measured).perturbations == ONE_HOT
    assert with_sources(TrainConfig(perturbations="onehot"), measured).perturbations == ONE_HOT
    one_is_not = opened(tmp_path / "b", small_screen("a", sizes=sizes | {"P": 4}))
    assert with_sources(TrainConfig(), one_is_not).perturbations == ONE_HOT
    in_one_file = opened(
        tmp_path / "c", small_screen("a", sizes={"g1": 9}), small_screen("b", genes=[f"g{i}" for i in range(2, 22)])
    )
    assert with_sources(TrainConfig(), in_one_file).perturbations == ONE_HOT
    with pytest.raises(InputError, match=r"auto chooses the sources"):
        with_sources(TrainConfig(perturbations="auto+genes"), measured)
    for word, near in (("gene", "genes"), ("one-hot", "onehot"), ("gene+onehot", "genes")):
        with pytest.raises(InputError, match=rf"No perturbation features .*, drugs, encoder\. Did you mean '{near}'\?"):
            with_sources(TrainConfig(perturbations=word), measured)


def test_the_encoder_is_where_the_cache_says(tmp_path: Path) -> None:
    cache, config = opened(tmp_path, small_screen("a")), TrainConfig(perturbations="encoder+onehot")
    with pytest.raises(InputError, match=r"does not say where an SE encoder is"):
        with_sources(config, cache)
    cache.attributes["encoder_folder"] = str(tmp_path)
    assert with_sources(config, cache).perturbations == f"{tmp_path}+onehot"
    cache.attributes["encoder_folder"] = str(tmp_path / "gone")
    with pytest.raises(InputError, match=r"was in .*gone, which is not there"):
        with_sources(config, cache)
