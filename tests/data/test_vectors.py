"""The sources of feature vectors: how they are named, and the same vectors from every kind of file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sest.cells.labels import targets_of
from sest.data.vectors import (
    DECADE,
    PROTEINS,
    Drugs,
    Source,
    absent_hint,
    drugs_of,
    label_of,
    one_hot,
    read_source,
    read_sources,
    resolved,
    source_files,
    sources_of,
)
from sest.errors import InputError

VECTORS = {name: np.arange(4) + i + 0.5 for i, name in enumerate(["TP53", "non-targeting"])}  # float64


def write(folder: Path, vectors: dict[str, Any] = VECTORS) -> list[Path]:
    """The same vectors in every kind of file that is read."""
    torch.save({name: torch.from_numpy(v) for name, v in vectors.items()}, folder / "a.pt")
    torch.save({np.str_(name): v.astype(np.float32) for name, v in vectors.items()}, folder / "b.pt")
    np.savez(folder / "c.npz", allow_pickle=False, **vectors)
    save_file({name: v.astype(np.float16) for name, v in vectors.items()}, folder / "d.safetensors")
    table = pd.DataFrame(vectors).T
    table.to_csv(folder / "e.csv")  # its columns are called 0, 1, 2, 3
    table.to_csv(folder / "f.tsv", sep="\t", header=False)
    table.add_prefix("x").to_csv(folder / "g.csv", index_label="gene")
    for protocol, name in ((2, "h.pickle"), (5, "i.pkl")):  # as GenePT is published: a dict of lists
        (folder / name).write_bytes(pickle.dumps({n: v.tolist() for n, v in vectors.items()}, protocol))
    return sorted(folder.iterdir())


def test_all_kinds_of_files_are_the_same_float32_vectors(tmp_path: Path) -> None:
    files = write(tmp_path)
    assert len(files) == 9
    for path in files:
        read = read_source(path)
        assert set(read.rows) == set(VECTORS) and all(type(name) is str for name in read.rows), path
        assert read.matrix.dtype == np.float32 and read.width == 4
        for name, vector in VECTORS.items():
            np.testing.assert_array_equal(read.find(name), vector)  # exact: halves of small integers fit float16


def test_a_folder_of_an_encoder_is_its_protein_embeddings(tmp_path: Path) -> None:
    (tmp_path / "se").mkdir()
    torch.save({"TP53": torch.ones(3)}, tmp_path / "se" / PROTEINS)
    assert source_files(str(tmp_path / "se")) == [tmp_path / "se" / PROTEINS]
    np.testing.assert_array_equal(read_sources(str(tmp_path / "se"), ()).find("TP53"), [1, 1, 1])


def test_sources_are_joined_by_a_plus_that_a_path_may_have_as_well(tmp_path: Path) -> None:
    path = tmp_path / "a+b.npz"
    np.savez(path, allow_pickle=False, **VECTORS)
    assert sources_of("onehot+genes + x/y.pt") == ["onehot", "genes", "x/y.pt"]
    assert sources_of(str(path)) == [str(path)] and source_files("onehot+genes") == []
    assert label_of(f"genes+{tmp_path}/y.pt") == "genes+y.pt"
    assert Path(resolved("onehot+y.pt").removeprefix("onehot+")).is_absolute() and resolved("onehot") == "onehot"
    for bad in ("onehot+onehot", "genes+", ""):
        with pytest.raises(InputError, match="must name different sources"):
            sources_of(bad)


def test_one_hot_columns_are_the_first_of_their_sources_and_known_by_their_targets(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", allow_pickle=False, **VECTORS)
    vectors = read_sources(f"{tmp_path}/x.npz+onehot", ["A", "A+B"])
    assert vectors.width == 6 and vectors.one_hot == slice(4, 6) and vectors.columns_of("A+B") == ["A", "B"]
    np.testing.assert_array_equal(vectors.find("A+B"), [0, 0, 0, 0, 1, 1])
    assert vectors.has_only_a_column("A") and not vectors.has_only_a_column("TP53") and vectors.find("C") is None
    assert read_sources(f"{tmp_path}/x.npz", ()).one_hot is None
    before = one_hot(["A", "A+B"], ["A", "A+B"])  # a run from when each perturbation had a column of its own
    np.testing.assert_array_equal(before.find("A+B"), [0, 1])


@given(st.lists(st.sampled_from("ABCD"), min_size=1, unique=True), st.randoms())
def test_the_sum_of_targets_does_not_depend_on_their_order(parts: list[str], random: Any) -> None:
    other = parts.copy()
    random.shuffle(other)
    source = one_hot(list("ABCD"))
    np.testing.assert_array_equal(source.find("+".join(parts)), source.find(" + ".join(other)))
    assert sorted(targets_of("+".join(parts))) == sorted(other)


def test_the_hint_names_what_is_near() -> None:
    assert "STAT1" in absent_hint(["STAT"], ["STAT1", "JAK2"])
    assert absent_hint(["STAT+JAK2"], ["STAT1", "JAK2"]) == " Of STAT+JAK2 it lacks STAT. Did you mean 'STAT1'?"


def vector(source: Source, name: str) -> np.ndarray:
    found = source.find(name)
    assert found is not None, name
    return found


LABELS = ("[('Trametinib', 0.05, 'uM')]", "Nutlin-3a_500nM", "Nutlin-3a_5uM", "STAT1")


def test_a_drug_has_a_column_and_another_for_the_logarithm_of_its_dose() -> None:
    source = drugs_of(LABELS)
    assert list(source.rows) == ["Trametinib", "Nutlin-3a"] and source.width == 4
    for label, doses in ((LABELS[0], (0.05, None)), (LABELS[1], (None, 0.5)), (LABELS[2], (None, 5.0))):
        there = [float(dose is not None) for dose in doses]
        logarithms = [DECADE * np.log10(dose) if dose else 0.0 for dose in doses]
        np.testing.assert_allclose(vector(source, label), [*there, *logarithms], rtol=1e-6)
    assert source.find("STAT1") is None and source.find("Aspirin_1uM") is None


def test_a_dose_that_did_not_train_is_known_and_combinations_are_sums() -> None:
    source = drugs_of(LABELS)
    np.testing.assert_allclose(vector(source, "Nutlin-3a_50uM"), [0, 1, 0, DECADE * np.log10(50)], rtol=1e-6)
    both = vector(source, "[('Trametinib', 1.0, 'uM'), ('Nutlin-3a', 10.0, 'uM')]")
    np.testing.assert_allclose(both, [1, 1, 0, DECADE], rtol=1e-6)
    np.testing.assert_allclose(vector(source, "Trametinib_1uM+Nutlin-3a_10uM"), both)
    assert source.columns_of("Nutlin-3a_50uM") == ["Nutlin-3a"]


def test_times_have_columns_where_a_label_says_one() -> None:
    source = drugs_of(["A_1uM_6h", "B_10uM"])
    day, six = 0.0, DECADE * np.log10(6 / 24)
    np.testing.assert_allclose(vector(source, "A_1uM_6h"), [1, 0, 0, 0, six, day], rtol=1e-6)
    np.testing.assert_allclose(vector(source, "A_1uM_360min"), vector(source, "A_1uM_6h"))
    np.testing.assert_allclose(vector(source, "B_10uM"), [0, 1, 0, DECADE, day, day], rtol=1e-6)
    np.testing.assert_allclose(vector(source, "B_10uM@2days"), [0, 1, 0, DECADE, day, DECADE * np.log10(2)], rtol=1e-6)
    assert isinstance(source, Drugs) and source.parts == ("given", "dose", "time")
    assert drugs_of(["A_1uM", "B_10uM"]).find("A_1uM_6h") is None  # nothing says what time does


def test_labels_without_doses_and_units_that_are_not_known_are_refused() -> None:
    with pytest.raises(InputError, match=r"reads labels such as .*; the data has: STAT1, JAK2"):
        drugs_of(["STAT1", "JAK2"])
    with pytest.raises(InputError, match=r"Aspirin: 'mol' is no unit of a dose"):
        drugs_of(["[('Aspirin', 1.0, 'mol')]"])


def test_a_file_of_drugs_gives_its_vector_at_every_dose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "fingerprints.npz", **{"Nutlin-3a": np.ones(3), "Trametinib": np.full(3, 2.0)})  # type: ignore[arg-type]
    vectors = read_sources(f"drugs+{tmp_path / 'fingerprints.npz'}", LABELS)
    low, high = (vectors.find(label) for label in LABELS[1:3])
    assert low is not None and high is not None and vectors.width == 4 + 3
    np.testing.assert_array_equal(low[4:], high[4:])
    assert (low[:4] != high[:4]).any() and vectors.columns_of(LABELS[1]) == ["Nutlin-3a"]
    assert not vectors.has_only_a_column(LABELS[1]) and vectors.one_hot == slice(0, 4)
    with caplog.at_level("INFO"):
        vectors.say_what_is_made(LABELS[:3])
    assert "3 doses get the vector of their drug in fingerprints.npz" in caplog.text
