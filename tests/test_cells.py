"""What training reads from a store: labels, targets over the common genes, and the controls' embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from tiny import GENES, Notes, TinyGroup, tiny_group, write_store

from sest.cache import Cache, open_cache
from sest.cells import CONTROL, log1p_rows, read_embeddings, read_labels, read_targets
from sest.errors import InputError
from sest.progress import Silent

Opened = tuple[Cache, list[TinyGroup]]


def opened(folder: Path, *groups: TinyGroup) -> Cache:
    return open_cache(write_store(folder / "s.zarr", groups))


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Files with other genes, orders of genes, control labels and scales."""
    groups = [
        tiny_group("a", genes=GENES, cell_types=("x", "y")),
        tiny_group("b/one", genes=GENES[4:][::-1], control="nt", sizes={"Q": 3, "Z": 2}, seed=1),
        tiny_group("b/two", genes=(*GENES[2:8], "only", *GENES[8:]), scale="log1p", cell_types=("y",), seed=2),
    ]
    return opened(tmp_path_factory.mktemp("three"), *groups), groups


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
    bare = tiny_group("a")
    bare = replace(bare, obs=bare.obs.drop(columns="perturbation"))
    with pytest.raises(InputError, match=r"group a has no perturbation labels or no controls.*--pert-col"):
        read_labels(opened(tmp_path, bare))
    (tmp_path / "2").mkdir()
    with pytest.raises(InputError, match=r"group b has no perturbation labels or no controls"):
        read_labels(opened(tmp_path / "2", tiny_group("a"), tiny_group("b", n_controls=0)))


def test_a_label_that_is_control_in_one_file_and_perturbation_in_another_is_refused(tmp_path: Path) -> None:
    groups = tiny_group("a"), tiny_group("b", control="nt", sizes={"P": 3, "ctrl": 2})
    with pytest.raises(InputError, match=r"'ctrl' is the control of one file and a perturbation of another"):
        read_labels(opened(tmp_path, *groups))


def test_targets_are_the_genes_all_files_have_in_the_first_files_order(three_files: Opened) -> None:
    cache, groups = three_files
    notes = Notes()
    targets = read_targets(cache, "10000", notes)
    assert targets.genes == GENES[4:] and targets.scale == "mixed" and targets.target_sum == 10_000.0
    assert "Training on the 16 genes that all groups have (of up to 20)." in notes.texts
    expected = []
    for group in groups:
        place = [group.genes.index(name) for name in targets.genes]
        values = group.matrix.toarray().astype(np.float64)
        if group.scale == "counts":  # normalised by all counts of the cell, also those of genes that are left out
            values = np.log1p(1e4 * values / np.maximum(values.sum(1, keepdims=True), 1))
        expected.append(values[:, place])
    rows = np.random.default_rng(0).permutation(len(targets.factor))
    # float32 values of up to 9
    np.testing.assert_allclose(targets.log1p(rows).toarray(), np.concatenate(expected)[rows], rtol=1e-5, atol=1e-6)
    assert (targets.factor[-len(groups[2].obs) :] == 0).all()


def test_one_file_keeps_all_its_genes_and_its_integers(tmp_path: Path) -> None:
    group = tiny_group("a")
    notes = Notes()
    targets = read_targets(opened(tmp_path, group), "10000", notes)
    assert targets.genes == group.genes and targets.scale == "counts" and not notes.texts
    assert targets.data.dtype == np.int16 and targets.indices.dtype == np.int32 and targets.indptr.dtype == np.int64
    assert (targets.matrix != group.matrix).nnz == 0


def test_the_target_sum_is_a_number_or_the_median_of_the_count_files_cells(tmp_path: Path) -> None:
    empty = tiny_group("a")
    values = empty.matrix.toarray()
    values[3] = 0  # an empty cell counts in no median and gets no factor
    groups = [replace(empty, matrix=scipy.sparse.csr_matrix(values)), tiny_group("b", scale="log1p", seed=1)]
    cache = opened(tmp_path, *groups)
    totals = values.sum(1)
    median = read_targets(cache, "median", Silent())
    assert median.target_sum == np.median(totals[totals > 0])
    assert median.factor[3] == 0
    np.testing.assert_allclose(median.factor[: len(totals)] * totals, np.where(totals > 0, median.target_sum, 0))
    np.testing.assert_allclose(read_targets(cache, "1e3", Silent()).factor[0], 1000 / totals[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [("many", "takes a number or 'median'"), ("0", "above 0"), ("-1", "above 0"), ("inf", "above 0")],
)
def test_an_unusable_target_sum_is_refused(three_files: Opened, asked: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_targets(three_files[0], asked, Silent())


def test_the_median_of_a_log1p_file_is_the_default(tmp_path: Path) -> None:
    targets = read_targets(opened(tmp_path, tiny_group("a", scale="log1p")), "median", Silent())
    assert targets.scale == "log1p" and targets.target_sum == 10_000.0


def test_files_without_a_gene_in_common_are_refused(tmp_path: Path) -> None:
    other = tiny_group("b", genes=[f"h{i}" for i in range(20)])
    with pytest.raises(InputError, match=r"no gene in common \(a, b\)"):
        read_targets(opened(tmp_path, tiny_group("a"), other), "10000", Silent())


def test_reading_in_blocks_changes_nothing(three_files: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = three_files
    labels, _ = read_labels(cache)
    whole, (embeddings, row) = read_targets(cache, "10000", Silent()), read_embeddings(cache, labels)
    monkeypatch.setattr("sest.cells.ROWS_PER_READ", 7)
    parts, (embeddings_of_parts, row_of_parts) = read_targets(cache, "10000", Silent()), read_embeddings(cache, labels)
    assert (parts.matrix != whole.matrix).nnz == 0 and (parts.factor == whole.factor).all()
    np.testing.assert_array_equal(embeddings_of_parts, embeddings)
    np.testing.assert_array_equal(row_of_parts, row)


def test_log1p_rows_normalises_counts_and_leaves_rows_of_factor_0() -> None:
    values = scipy.sparse.csr_matrix(np.array([[1, 0, 3], [2, 5, 0]], np.int16))
    got = log1p_rows(values, np.array([2.0, 0.0], np.float32))
    np.testing.assert_allclose(got.toarray(), [[np.log(3), 0, np.log(7)], [2, 5, 0]], rtol=1e-6)
    assert got.dtype == np.float32


def test_embeddings_are_those_of_the_controls_alone(three_files: Opened) -> None:
    cache, groups = three_files
    labels, _ = read_labels(cache)
    embeddings, row = read_embeddings(cache, labels)
    stored = np.concatenate([g.embeddings for g in groups]).astype(np.float16)
    assert embeddings.dtype == np.float16 and len(embeddings) == labels.is_control.sum()
    assert (row[~labels.is_control] == -1).all()
    controls = np.flatnonzero(labels.is_control)
    np.testing.assert_array_equal(embeddings[row[controls]], stored[controls])


def test_a_control_that_was_not_embedded_is_an_error_and_other_cells_need_no_embedding(tmp_path: Path) -> None:
    group = tiny_group("a")
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
