"""Cells gathered into batches: in host memory, in a device's memory, from mapped files; prepared ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import torch
from tiny import tiny_config, tiny_group, write_store

from sest.batches import batch_source
from sest.cell_store import Batch, CellStore, store_cells
from sest.dataset import Dataset, read_dataset
from sest.gather import dense_log1p
from sest.progress import Silent
from sest.ranks import SINGLE, Ranks
from sest.sampler import SetSampler
from sest.targets import Targets

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


def make_store(targets: Targets, on_device: bool = False) -> CellStore:
    n = len(targets.factor)
    embeddings = np.arange(n * 2, dtype=np.float16).reshape(n, 2)
    return store_cells(targets, embeddings, np.arange(n)[::-1].copy(), CPU, on_device=on_device)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_expression_is_scipys_normalise_and_log1p(dtype: type, on_device: bool) -> None:
    rng = np.random.default_rng(0)
    counts: np.ndarray = rng.poisson(0.8, (30, 17)).astype(dtype)
    counts[3, 5], counts[4] = 3000, 0  # beyond the table of small counts; a cell without any
    totals = counts.sum(1, dtype=np.float64)
    factor = np.divide(1e4, totals, out=np.zeros(30), where=totals > 0)
    rows = np.array([[3, 4, 5], [29, 0, 3]])  # a row twice, any order
    expected = scipy.sparse.diags(factor) @ scipy.sparse.csr_matrix(counts)
    expected = np.log1p(expected.toarray())[rows]
    dense = make_store(make_targets(counts, factor), on_device).expression(rows)
    assert dense.shape == (2, 3, 17) and dense.dtype == torch.float32
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-6)  # float32
    assert not dense[0, 1].any()


@pytest.mark.parametrize("on_device", [False, True])
def test_expression_leaves_log1p_sources_alone_and_mixes_both(on_device: bool) -> None:
    values = np.array([[1.5, 0, -0.25, 0], [0, 0, 0, 0], [2, 0, 1, 1], [0, 3.25, 0, 0]], np.float32)
    factor = np.array([0, 0, 10, 0])
    targets = make_targets(values, factor)
    dense = make_store(targets, on_device).expression(np.arange(4)).numpy()
    np.testing.assert_array_equal(dense[[0, 1, 3]], values[[0, 1, 3]])
    np.testing.assert_allclose(dense[2], np.log1p(values[2] * 10), rtol=1e-6)
    np.testing.assert_allclose(targets.log1p(np.array([2, 0])).toarray(), dense[[2, 0]], rtol=1e-6)


@pytest.mark.parametrize("on_device", [False, True])
def test_expression_of_cells_without_values_and_of_no_cells_is_zero_and_empty(on_device: bool) -> None:
    store = make_store(make_targets(np.zeros((3, 5), np.int16), np.zeros(3)), on_device)
    assert not store.expression(np.array([[0, 2]])).any()
    assert store.expression(np.zeros((0, 4), np.int64)).shape == (0, 4, 5)


def test_basal_gathers_the_rows_of_the_embeddings() -> None:
    store = make_store(make_targets(np.ones((4, 3), np.int16), np.ones(4)))
    basal = store.basal(np.array([[0, 3], [1, 1]]))
    assert basal.dtype == torch.float32
    assert basal.tolist() == [[[6.0, 7.0], [0.0, 1.0]], [[4.0, 5.0], [4.0, 5.0]]]


def test_a_cell_without_an_embedding_is_never_gathered() -> None:
    store = replace(make_store(make_targets(np.ones((4, 3), np.int16), np.ones(4))), embedding_row=np.full(4, -1))
    with pytest.raises(AssertionError, match=r"without an embedding"):
        store.basal(np.array([[0]]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A count file and a log1p file: every path of the gathering is used."""
    groups = [tiny_group("a"), tiny_group("b", scale="log1p", seed=1)]
    return read_dataset(write_store(tmp_path_factory.mktemp("s") / "s.zarr", groups), tiny_config(), Silent())


def batches(data: Dataset, n_workers: int, ranks: Ranks = SINGLE, on_device: bool = False) -> Iterator[Batch]:
    """Copies of batches 0 .. 19, then of 19 and 3 again, as after running out of memory."""
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    store = store_cells(data.targets, data.embeddings, data.embedding_row, CPU, on_device=on_device)
    with batch_source(sampler, store, 4, n_workers, ranks) as source:
        for number in (*range(20), 19, 3):
            yield Batch(**{key: tensor.clone() for key, tensor in source.get(number).items()})  # type: ignore


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("basal", "perturbation", "target", "number"))  # type: ignore


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("n_workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(data: Dataset, n_workers: int, on_device: bool) -> None:
    for alone, ahead in zip(batches(data, 0), batches(data, n_workers, on_device=on_device), strict=True):
        assert alone["basal"].shape == (4, 4, 6) and alone["target"].shape == (4, 4, 20)
        assert alone["perturbation"].shape == alone["number"].shape == (4,)
        if on_device:  # log1p of torch, not of numba: float32 rounding
            torch.testing.assert_close(alone["target"], ahead["target"], rtol=3e-7, atol=0)
            ahead["target"] = alone["target"]
        assert same(alone, ahead)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_divide_every_batch_without_changing_it(data: Dataset, world_size: int) -> None:
    parts = [batches(data, 1, Ranks(rank, world_size)) for rank in range(world_size)]
    for whole, *mine in zip(batches(data, 0), *parts, strict=True):
        for rank, part in enumerate(mine):
            assert same(part, Batch(**{key: t[rank::world_size] for key, t in whole.items()}))  # type: ignore


def test_a_batch_is_good_until_the_next_is_asked_for_and_its_memory_is_used_again(data: Dataset) -> None:
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    store = store_cells(data.targets, data.embeddings, data.embedding_row, CPU)
    with batch_source(sampler, store, 3, 2) as source:
        places = set()
        for number in range(30):
            batch = source.get(number)
            places.add(batch["target"].data_ptr())
            rows = sampler.sets(np.arange(3 * number, 3 * number + 3))["targets"]
            assert torch.equal(batch["target"], store.expression(rows))
        assert len(places) <= 4  # one in use, two ahead, one between
        assert source.waited > 0


def test_gathering_refuses_rows_that_are_not_there() -> None:
    targets = make_targets(np.ones((4, 3), np.int16), np.ones(4))
    for rows in ([4], [-1], [0, 99]):
        with pytest.raises(IndexError, match="of 4 cells"):
            make_store(targets).expression(np.array(rows))
        with pytest.raises(IndexError, match="of 4 cells"):
            targets.values(np.array(rows))


def test_many_genes_need_wider_numbers() -> None:
    n_genes = 70_000
    targets = Targets(
        genes=tuple(map(str, range(n_genes))),
        indptr=np.array([0, 2]),
        indices=np.array([1, n_genes - 1], np.int32),
        data=np.array([5, 7], np.int16),
        factor=np.ones(1, np.float32),
        target_sum=1e4,
        scale="counts",
    )
    for on_device in (False, True):
        dense = make_store(targets, on_device).expression(np.array([0]))
        assert dense.nonzero().tolist() == [[0, 1], [0, n_genes - 1]]
        np.testing.assert_allclose(dense[0, [1, n_genes - 1]].numpy(), np.log1p([5, 7]), rtol=1e-6)
    out = np.full((1, n_genes), np.nan, np.float32)  # what a buffer held before is overwritten
    dense_log1p(np.array([0]), targets.indptr, targets.indices, targets.data, targets.factor, out)
    assert np.isfinite(out).all()


def test_an_error_while_a_batch_is_prepared_reaches_the_caller(data: Dataset) -> None:
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    store = store_cells(data.targets, data.embeddings, np.full(len(data.labels), -1), CPU)
    with batch_source(sampler, store, 3, 2) as source, pytest.raises(AssertionError, match=r"embedding"):
        source.get(0)


def test_a_batch_holds_the_cells_its_set_rows_name(data: Dataset) -> None:
    sampler = SetSampler(data.labels, np.ones(len(data.labels), bool), 4, 0)
    store = store_cells(data.targets, data.embeddings, data.embedding_row, CPU)
    sets = sampler.sets(np.arange(40))
    batch = store.batch(sets)
    assert batch["number"].tolist() == list(range(40))
    for i in range(40):
        expected = data.targets.log1p(sets["targets"][i]).toarray()
        np.testing.assert_allclose(batch["target"][i].numpy(), expected, rtol=1e-6)
        np.testing.assert_array_equal(
            batch["basal"][i].numpy(), data.embeddings[data.embedding_row[sets["controls"][i]]].astype(np.float32)
        )
        assert (
            data.labels.perturbations[int(batch["perturbation"][i])]
            == data.labels.perturbations[data.labels.perturbation[sets["targets"][i, 0]]]
        )
    assert (data.labels.context[sets["targets"]] >= 2).any() and (data.labels.context[sets["targets"]] < 2).any()
