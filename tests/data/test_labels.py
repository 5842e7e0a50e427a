"""What training reads from a cache: labels and the controls' embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sest
from helpers.caches import small_screen
from helpers.configs import small_config
from helpers.datasets import Opened, open_three_files, opened
from sest.cache import open_cache
from sest.data.dataset import read_dataset
from sest.data.labels import (
    CONTROL,
    NOTHING,
    Labels,
    code_type,
    pair_counts,
    read_embeddings,
    read_labels,
    rows_of_pairs,
)
from sest.errors import InputError


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return open_three_files(tmp_path_factory.mktemp("three"))


def test_labels_name_what_every_cell_is_over_all_files(three_files: Opened) -> None:
    cache, groups = three_files
    labels, tables = read_labels(cache)
    assert labels.groups == ("a", "b/one", "b/two") and len(labels) == cache.n_cells
    assert labels.perturbations == ("ctrl", "P", "Q", "R", "S", "T", "Z")
    assert [t.control for t in tables] == ["ctrl", "nt", "ctrl"]
    assert labels.contexts == (("a", "x"), ("a", "y"), ("b/one", "x"), ("b/one", "y"), ("b/two", "y"))
    for group, first in zip(groups, labels.first, strict=False):
        mine = slice(first, first + len(group.obs))
        names = [labels.perturbations[i] for i in labels.perturbation[mine]]
        assert names == ["ctrl" if name == group.control else name for name in group.obs["perturbation"]]
        assert (labels.is_control[mine] == (group.obs["perturbation"] == group.control).to_numpy()).all()
        contexts = [labels.contexts[i] for i in labels.context[mine]]
        assert contexts == [(group.path, name) for name in group.obs["cell_type"]]


def test_batches_of_two_files_are_never_the_same_batch(three_files: Opened) -> None:
    cache, groups = three_files
    labels, _ = read_labels(cache)
    per_file = [set(labels.batch[a:b].tolist()) for a, b in zip(labels.first, labels.first[1:], strict=False)]
    assert not (per_file[0] & per_file[1] or per_file[0] & per_file[2] or per_file[1] & per_file[2])
    for group, a, b in zip(groups, labels.first, labels.first[1:], strict=False):
        codes, names = labels.batch[a:b], group.obs["batch"].to_numpy()
        assert len(set(codes.tolist())) == len(set(names)) == len(set(zip(codes.tolist(), names, strict=True)))


def test_a_file_without_perturbations_or_controls_cannot_be_trained_on(tmp_path: Path) -> None:
    bare = small_screen("a")
    bare = replace(bare, obs=bare.obs.drop(columns="perturbation"))
    with pytest.raises(InputError, match=r"group a has no perturbation labels or no controls.*--pert-col"):
        read_labels(opened(tmp_path, bare))
    (tmp_path / "2").mkdir()
    with pytest.raises(InputError, match=r"group b has no perturbation labels or no controls"):
        read_labels(opened(tmp_path / "2", small_screen("a"), small_screen("b", n_controls=0)))


def test_a_label_that_is_control_in_one_file_and_perturbation_in_another_is_refused(tmp_path: Path) -> None:
    groups = small_screen("a"), small_screen("b", control="nt", sizes={"P": 3, "ctrl": 2})
    with pytest.raises(InputError, match=r"'ctrl' is the control of one file and a perturbation of another"):
        read_labels(opened(tmp_path, *groups))


def test_reading_in_blocks_changes_nothing(three_files: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = three_files
    labels, _ = read_labels(cache)
    embeddings, row = read_embeddings(cache, labels)
    monkeypatch.setattr("sest.data.labels.ROWS_PER_READ", 7)
    of_parts, row_of_parts = read_embeddings(cache, labels)
    np.testing.assert_array_equal(of_parts, embeddings)
    np.testing.assert_array_equal(row_of_parts, row)


def test_embeddings_are_those_of_the_controls_alone(three_files: Opened) -> None:
    cache, groups = three_files
    labels, _ = read_labels(cache)
    embeddings, row = read_embeddings(cache, labels)
    stored = np.concatenate([g.embeddings for g in groups]).astype(np.float16)
    assert embeddings.dtype == np.float16 and len(embeddings) == labels.is_control.sum()
    np.testing.assert_array_equal(row, np.flatnonzero(labels.is_control))
    np.testing.assert_array_equal(embeddings, stored[row])


@pytest.mark.usefixtures("loops")
def test_cells_of_pairs_are_those_that_a_sort_finds(three_files: Opened) -> None:
    labels, _ = read_labels(three_files[0])
    rng = np.random.default_rng(0)
    wanted = (labels.perturbation >= 0) & (rng.random(len(labels)) < 0.7)
    context, perturbation, rows = rows_of_pairs(labels, wanted)
    table = pd.DataFrame({"context": labels.context, "perturbation": labels.perturbation})[wanted]
    expected = {key: part.index.tolist() for key, part in table.groupby(["context", "perturbation"])}
    pairs = zip(context.tolist(), perturbation.tolist(), strict=True)
    assert dict(zip(pairs, [of.tolist() for of in rows], strict=True)) == expected
    assert list(expected) == sorted(expected) and all(of.dtype == np.int32 for of in rows)
    counts = pair_counts(labels, wanted)
    assert counts.sum() == wanted.sum() and counts[context[0], perturbation[0]] == len(rows[0])


def test_codes_take_two_bytes_where_they_can(three_files: Opened) -> None:
    labels, _ = read_labels(three_files[0])
    assert {labels.perturbation.dtype, labels.context.dtype, labels.batch.dtype} == {np.dtype(np.int16)}
    assert code_type(2**15) == np.int16 and code_type(2**15 + 1) == np.int32


def test_a_control_that_was_not_embedded_is_an_error_and_other_cells_need_no_embedding(tmp_path: Path) -> None:
    group = small_screen("a")
    is_control = (group.obs["perturbation"] == "ctrl").to_numpy()
    partial = np.where(is_control[:, None], group.embeddings, np.nan)
    cache = opened(tmp_path, replace(group, embeddings=partial))
    labels, _ = read_labels(cache)
    assert np.isfinite(read_embeddings(cache, labels)[0]).all()
    partial[np.flatnonzero(is_control)[2]] = np.nan
    (tmp_path / "2").mkdir()
    cache = opened(tmp_path / "2", replace(group, embeddings=partial))
    with pytest.raises(InputError, match=r"some control cells have no finite embedding.*--cells all"):
        read_embeddings(cache, labels)


def test_code_0_is_the_control() -> None:
    assert CONTROL == 0


def of_case(shared_cases: Path, folder: Path, case: str, **options: Any) -> tuple[Labels, np.ndarray]:
    """The labels of a case's cells in a cache, and their split masks."""
    (path,) = (shared_cases / "labels_scales_genes" / case).glob("*.h5ad")
    sest.embed(path, folder / "c.zarr", encoder="pca", dim=8, **options)
    data = read_dataset(folder / "c.zarr", small_config())
    return data.labels, data.mask


def test_guides_of_the_control_are_controls_in_a_cache(shared_cases: Path, tmp_path: Path) -> None:
    labels, _ = of_case(shared_cases, tmp_path, "02-nt-guides")
    assert labels.perturbations == ("non-targeting", *(f"GENE{i}" for i in range(8)))
    assert labels.is_control.sum() == 240


def test_the_same_targets_are_one_perturbation_which_is_in_one_split(shared_cases: Path, tmp_path: Path) -> None:
    labels, mask = of_case(shared_cases, tmp_path, "03-gears-labels")
    assert labels.perturbations == ("ctrl", *(f"GENE{i}" for i in range(8)))
    for context in range(2):
        for code in range(1, 9):
            mine = (labels.perturbation == code) & (labels.context == context)
            assert mine.sum() > 0 and len(set(mask[mine].tolist())) == 1


def test_cells_of_no_known_perturbation_are_in_no_split(shared_cases: Path, tmp_path: Path) -> None:
    labels, mask = of_case(shared_cases, tmp_path, "05-unassigned")
    left_out = labels.perturbation == NOTHING
    assert left_out.sum() == 162 and not mask[left_out].any() and mask[~left_out].all()
    assert labels.perturbations == ("non-targeting", *(f"GENE{i}" for i in range(8)))


def test_labels_as_they_are_stay_and_the_cache_says_so(shared_cases: Path, tmp_path: Path) -> None:
    labels, _ = of_case(shared_cases, tmp_path, "03-gears-labels", labels="as-is")
    assert len(labels.perturbations) == 17
    group = next(iter(open_cache(tmp_path / "c.zarr").groups.values()))
    assert group.attributes["columns"]["labels"] == "as-is"


def test_a_set_of_targets_has_one_spelling_over_all_files(tmp_path: Path) -> None:
    sizes = {"A+B": 3, "C": 4}
    cache = opened(tmp_path, small_screen("a", sizes=sizes), small_screen("b", sizes={"B+A": 2, "C": 4}, seed=1))
    labels, tables = read_labels(cache)
    assert labels.perturbations == ("ctrl", "A+B", "C")
    assert all("B+A" not in table.perturbations for table in tables)


def test_names_of_two_files_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    cache = opened(tmp_path, small_screen("a", sizes={"STAT1": 3}), small_screen("b", sizes={"Stat1": 2}, seed=1))
    with pytest.raises(InputError, match=r"differ in case or spaces alone \(1\): 'STAT1' \(a\) and 'Stat1' \(b\)"):
        read_labels(cache)
