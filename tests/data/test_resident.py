"""Cells ready for batches: gathered from host memory or within a device's memory, the same either way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from sest.data.dataset import read_dataset
from sest.data.resident import ResidentCells, place_of, resident_cells
from sest.data.sampler import SetSampler
from sest.data.targets import Targets

CPU = torch.device("cpu")


def make_targets(values: np.ndarray, factor: np.ndarray, scale: str = "mixed") -> Targets:
    matrix = scipy.sparse.csr_matrix(values)
    return Targets(
        genes=tuple(f"g{i}" for i in range(values.shape[1])),
        indptr=matrix.indptr.astype(np.int64),
        indices=matrix.indices.astype(np.uint16),
        data=matrix.data,
        factor=factor.astype(np.float32),
        target_sum=1e4,
        scale=scale,
    )


def make_cells(targets: Targets, on_device: bool = False) -> ResidentCells:
    n = len(targets.factor)
    embeddings = np.arange(n * 2, dtype=np.float16).reshape(n, 2)[::-1].copy()
    return resident_cells(targets, embeddings, np.arange(n), CPU, on_device=on_device)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_expression_is_scipys_normalise_and_log1p(dtype: type, on_device: bool) -> None:
    rng = np.random.default_rng(0)
    counts: np.ndarray = rng.poisson(0.8, (30, 17)).astype(dtype)
    counts[3, 5:9], counts[4] = (63, 64, 65, 3000), 0  # around and beyond the table of small counts; a cell without any
    totals = counts.sum(1, dtype=np.float64)
    factor = np.divide(1e4, totals, out=np.zeros(30), where=totals > 0)
    rows = np.array([[3, 4, 5], [29, 0, 3]])  # a row twice, any order
    expected = scipy.sparse.diags(factor) @ scipy.sparse.csr_matrix(counts)
    expected = np.log1p(expected.toarray())[rows]
    dense = make_cells(make_targets(counts, factor), on_device).expression(rows)
    assert dense.shape == (2, 3, 17) and dense.dtype == torch.float32
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-6)  # float32
    assert not dense[0, 1].any()


@pytest.mark.parametrize("on_device", [False, True])
def test_expression_leaves_log1p_sources_alone_and_mixes_both(on_device: bool) -> None:
    values = np.array([[1.5, 0, -0.25, 0], [0, 0, 0, 0], [2, 0, 1, 1], [0, 3.25, 0, 0]], np.float32)
    factor = np.array([0, 0, 10, 0])
    targets = make_targets(values, factor)
    dense = make_cells(targets, on_device).expression(np.arange(4)).numpy()
    np.testing.assert_array_equal(dense[[0, 1, 3]], values[[0, 1, 3]])
    np.testing.assert_allclose(dense[2], np.log1p(values[2] * 10), rtol=1e-6)
    np.testing.assert_allclose(targets.log1p(np.array([2, 0])).toarray(), dense[[2, 0]], rtol=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
def test_expression_of_cells_without_values_and_of_no_cells_is_zero_and_empty(on_device: bool) -> None:
    cells = make_cells(make_targets(np.zeros((3, 5), np.int16), np.zeros(3)), on_device)
    assert not cells.expression(np.array([[0, 2]])).any()
    assert cells.expression(np.zeros((0, 4), np.int64)).shape == (0, 4, 5)


def test_basal_gathers_the_rows_of_the_embeddings() -> None:
    cells = make_cells(make_targets(np.ones((4, 3), np.int16), np.ones(4)))
    basal = cells.basal(np.array([[0, 3], [1, 1]]))
    assert basal.dtype == torch.float32
    assert basal.tolist() == [[[6.0, 7.0], [0.0, 1.0]], [[4.0, 5.0], [4.0, 5.0]]]


def test_a_cell_without_an_embedding_is_never_gathered() -> None:
    cells = replace(make_cells(make_targets(np.ones((4, 3), np.int16), np.ones(4))), control_rows=np.array([1, 2]))
    with pytest.raises(AssertionError, match="no control"):
        cells.basal(np.array([[0]]))


def test_gathering_refuses_rows_that_are_not_there() -> None:
    targets = make_targets(np.ones((4, 3), np.int16), np.ones(4))
    for rows in ([4], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of 4 cells"):
            make_cells(targets).expression(np.array(rows))
        with pytest.raises(IndexError, match="of 4 cells"):
            targets.values(np.array(rows))


@pytest.mark.parametrize(("n_genes", "dtype"), [(40_000, np.uint16), (70_000, np.int32)])
def test_gene_numbers_of_two_bytes_have_no_sign_and_more_genes_need_wider_ones(n_genes: int, dtype: type) -> None:
    targets = Targets(
        genes=tuple(map(str, range(n_genes))),
        indptr=np.array([0, 2]),
        indices=np.array([1, n_genes - 1], dtype),
        data=np.array([5, 7], np.int16),
        factor=np.ones(1, np.float32),
        target_sum=1e4,
        scale="counts",
    )
    for on_device in (False, True):
        dense = make_cells(targets, on_device).expression(np.array([0]))
        assert dense.nonzero().tolist() == [[0, 1], [0, n_genes - 1]]
        np.testing.assert_allclose(dense[0, [1, n_genes - 1]].numpy(), np.log1p([5, 7]), rtol=1e-6)


def test_a_buffer_that_is_given_is_filled_and_returned() -> None:
    cells = make_cells(make_targets(np.array([[0, 5], [7, 0]], np.int16), np.ones(2)))
    out = torch.full((1, 2, 2), torch.nan)  # what it held before is overwritten
    filled = cells.expression(np.array([[1, 0]]), out)
    assert filled.data_ptr() == out.data_ptr()
    np.testing.assert_allclose(out.numpy(), [[[np.log(8), 0], [0, np.log(6)]]], rtol=1e-6)


def test_a_batch_holds_the_cells_its_set_rows_name(tmp_path: Path) -> None:
    """Of a count file and a log1p file: every path of the gathering is used."""
    groups = [small_screen("a"), small_screen("b", scale="log1p", seed=1)]
    data = read_dataset(write_cache(tmp_path / "s.zarr", groups), small_config())
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    cells = resident_cells(data.targets, data.embeddings, data.control_rows, CPU)
    sets = sampler.sets(np.arange(40))
    batch = cells.batch(sets)
    assert batch["number"].tolist() == list(range(40))
    for i in range(40):
        expected = data.targets.log1p(sets["targets"][i]).toarray()
        np.testing.assert_allclose(batch["target"][i].numpy(), expected, rtol=1e-6)
        np.testing.assert_array_equal(
            batch["basal"][i].numpy(),
            data.embeddings[place_of(data.control_rows, sets["controls"][i])].astype(np.float32),
        )
        assert (
            data.labels.perturbations[int(batch["perturbation"][i])]
            == data.labels.perturbations[data.labels.perturbation[sets["targets"][i, 0]]]
        )
    assert (data.labels.context[sets["targets"]] >= 2).any() and (data.labels.context[sets["targets"]] < 2).any()
