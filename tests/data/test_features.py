"""Perturbation features: one-hot, or from a file; what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sest.data.features import ONE_HOT, absent_hint, equal_vectors, load_features, make_features
from sest.errors import InputError

NAMES = ("ctrl", "STAT1", "JAK2", "MYC")
VECTORS = {
    "STAT1": np.array([1, 2, 3], np.float32),
    "JAK2": np.array([4, 5, 6], np.float32),
    "GATA1": np.array([7, 8, 9], np.float32),
}


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


def test_features_in_three_formats_are_the_same_float32_vectors(tmp_path: Path) -> None:
    vectors: dict[str, Any] = {
        name: np.arange(4) + i + 0.5 for i, name in enumerate(["TP53", "non-targeting"])
    }  # float64
    torch.save({name: torch.from_numpy(v) for name, v in vectors.items()}, tmp_path / "a.pt")
    torch.save({np.str_(name): v.astype(np.float32) for name, v in vectors.items()}, tmp_path / "b.pt")
    np.savez(tmp_path / "c.npz", **vectors)
    save_file({name: v.astype(np.float16) for name, v in vectors.items()}, tmp_path / "d.safetensors")
    for path in tmp_path.iterdir():
        read = load_features(path)
        assert set(read) == set(vectors)
        assert all(type(name) is str for name in read)
        for name, vector in read.items():
            assert vector.dtype == np.float32 and vector.shape == (4,)
            np.testing.assert_array_equal(vector, vectors[name])  # exact: halves of small integers fit float16


def test_combinations_of_known_perturbations_could_be_built_and_equal_vectors_are_found(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"2 of them are combinations .* STAT1\+JAK2 could be built from STAT1 and JAK2"
    ):
        make_features(saved(tmp_path, VECTORS), (*NAMES[:3], "STAT1+JAK2", "GATA1+JAK2", "STAT1+NO"), "error")
    assert "STAT1" in absent_hint(["STAT"], VECTORS) and "built" not in absent_hint(["STAT2+JAK2"], VECTORS)
    vectors = [np.array(v, np.float32) for v in ([0, 1], [2, 3], [-0.0, 1], [2, 3], [4, 5])]
    assert equal_vectors("ABCDE", vectors) == [["A", "C"], ["B", "D"]]
