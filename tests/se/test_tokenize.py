"""se/tokenize.py: sentences follow from (seed, cell index, values, tokens) as in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.plain_tokenizer import plain_counts, plain_key, plain_sentence
from sest.se.tokenize import cell_keys, sentences, tokenize

SEED = 11


def positions_of(
    values: np.ndarray, pad_length: int, *, cells: list[int] | None = None, seed: int = SEED
) -> np.ndarray:
    """Sentences of (B, K) values whose tokens are 100, 101, ... -> (B, pad_length - 1) positions."""
    numbers = list(range(len(values))) if cells is None else cells
    keys = cell_keys(seed, torch.tensor(numbers))
    tokens = torch.arange(100, 100 + values.shape[1], dtype=torch.int32)
    return sentences(torch.as_tensor(values), tokens, keys, pad_length).numpy()


def tokenized(
    values: np.ndarray, tokens: np.ndarray, cells: np.ndarray, pad_length: int, scale: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and count features of (B, K) values."""
    keys = cell_keys(SEED, torch.as_tensor(cells))
    found = tokenize(torch.as_tensor(values), torch.as_tensor(tokens).to(torch.int32), keys, pad_length, 3, scale=scale)
    return found[0].numpy(), found[1].numpy()


def unsigned(x: torch.Tensor) -> list[int]:
    """The bits of int32 numbers read without a sign."""
    return x.numpy().view(np.uint32).tolist()


def tied(n_cells: int, n_genes: int, seed: int = 0) -> np.ndarray:
    """Values 0, 1 and 2 only, so that nearly every place in a sentence is decided by a tie."""
    return np.random.default_rng(seed).integers(0, 3, (n_cells, n_genes)).astype(np.float32)


def test_cell_keys_use_all_bits_of_the_cell_index_and_the_seed() -> None:
    cells = [0, 1, 5, 2**31, 2**32, 2**32 + 5, 2**40 + 5]
    assert unsigned(cell_keys(SEED, torch.tensor(cells))) == [plain_key(SEED, cell) for cell in cells]
    assert unsigned(cell_keys(2**63 - 1, torch.tensor(cells))) == [plain_key(2**63 - 1, cell) for cell in cells]
    assert len({plain_key(seed, cell) for seed in range(4) for cell in cells}) == 4 * len(cells)


def test_genes_without_ties_come_in_descending_order_of_value() -> None:
    values = np.array([[0.5, 3.0, 1.0, 0.25, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0]], np.float32)
    assert positions_of(values, 4).tolist() == [[1, 4, 2], [0, 2, 4]]


def test_counts_are_a_hundred_times_the_share_and_slot_0_has_that_of_kept_gene_3() -> None:
    values = np.array([[1.0, 4.0, 0.0, 2.0, 3.0]], np.float32)  # sum 10
    positions, shares = tokenized(values, np.arange(5), np.array([0]), 4, "log1p")
    assert positions.tolist() == [[1, 4, 3]]
    np.testing.assert_allclose(shares, [[20.0, 40.0, 30.0, 20.0]], rtol=1e-6)  # float32 rounding


def test_counts_are_ordered_as_they_are_and_shared_by_their_log1p() -> None:
    values = np.array([[1.0, np.e - 1, 0.0, np.e**3 - 1, 0.0]], np.float32)  # log1p: ln 2, 1, 0, 3, 0
    positions, shares = tokenized(values, np.arange(5), np.array([0]), 4, "counts")
    assert positions.tolist() == [[3, 1, 0]]
    np.testing.assert_allclose(shares, 100 / (np.log(2) + 4) * np.array([[3, 3, 1, np.log(2)]]), rtol=1e-6)


def test_an_empty_cell_has_uniform_shares_and_a_sentence_of_any_genes() -> None:
    for pad_length in (4, 9):  # more genes than slots; fewer
        positions, shares = tokenized(np.zeros((1, 5), np.float32), np.arange(5), np.array([0]), pad_length, "counts")
        np.testing.assert_allclose(shares, np.full((1, pad_length), 20.0), rtol=1e-6)
        assert set(positions[0].tolist()) <= set(range(5))


def test_with_fewer_genes_than_slots_the_expressed_come_first_and_unexpressed_ones_fill_up() -> None:
    values = np.array([[0.0, 2.0, 0.0, 1.0, 0.0]] * 200, np.float32)
    found = positions_of(values, 12)  # 11 slots, 5 genes, 2 of them expressed
    assert (found[:, :2] == [1, 3]).all()
    drawn = found[:, 2:]
    assert set(drawn.ravel().tolist()) == {0, 2, 4}
    assert any(len(set(row)) < 3 for row in drawn[:, :3].tolist())  # with replacement: not just all three in turn
    share = np.bincount(drawn.ravel(), minlength=5)[[0, 2, 4]] / drawn.size
    np.testing.assert_allclose(share, 1 / 3, atol=0.05)  # 1,800 draws: 4.5 standard deviations of 0.011


def test_where_every_gene_is_expressed_the_remaining_slots_repeat_any_of_them() -> None:
    values = np.array([[3.0, 1.0, 2.0]] * 100, np.float32)
    found = positions_of(values, 10)
    assert (found[:, :3] == [0, 2, 1]).all()
    assert set(found[:, 3:].ravel().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("n_genes", "pad_length"), [(40, 9), (40, 41), (40, 40), (7, 20), (5, 2), (12, 64)])
def test_sentences_equal_those_of_the_plain_implementation(n_genes: int, pad_length: int) -> None:
    rng = np.random.default_rng([n_genes, pad_length])
    values = np.where(rng.random((60, n_genes)) < 0.5, tied(60, n_genes), rng.random((60, n_genes), np.float32))
    values[0], values[1] = 0, 1  # nothing expressed, all tied; everything expressed
    values[2:] *= (rng.random((58, 1)) < 0.9) | (rng.random((58, n_genes)) < 0.1)  # some cells nearly empty
    values = values.astype(np.float32)
    tokens = rng.permutation(1000)[:n_genes]
    cells = rng.integers(0, 2**40, 60)
    positions, shares = tokenized(values, tokens, cells, pad_length, "log1p")
    for row, cell, found, share in zip(values, cells, positions.tolist(), shares, strict=True):
        assert found == plain_sentence(row, tokens, SEED, int(cell), pad_length)
        np.testing.assert_allclose(share, plain_counts(row, found), rtol=2e-6)  # float32 rounding


def test_counts_whose_log1p_is_the_same_float_keep_their_order() -> None:
    values = np.array([[2.0**24 - 3, 2.0**24 - 1, 2.0**24 - 2, 2.0**24 - 4]], np.float32)
    assert len(set(torch.log1p(torch.as_tensor(values))[0].tolist())) == 1
    positions, _ = tokenized(values, np.arange(4), np.array([0]), 5, "counts")
    assert positions.tolist() == [[1, 2, 0, 3]]


def test_float32_log1p_of_counts_rises_to_half_a_million_so_that_ordering_by_it_or_by_counts_is_the_same() -> None:
    assert (torch.log1p(torch.arange(2**19, dtype=torch.float32)).diff() > 0).all()


@pytest.mark.parametrize("pad_length", [9, 64])
def test_a_sentence_depends_on_neither_batch_nor_order_of_cells(pad_length: int) -> None:
    values = tied(30, 25)
    whole = positions_of(values, pad_length)
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_array_equal(positions_of(values[order], pad_length, cells=order.tolist()), whole[order])
    for i in range(30):
        np.testing.assert_array_equal(positions_of(values[i : i + 1], pad_length, cells=[i]), whole[i : i + 1])


@pytest.mark.parametrize("pad_length", [9, 64])
def test_a_sentence_does_not_depend_on_the_order_of_the_files_columns(pad_length: int) -> None:
    values, tokens = tied(30, 25), np.random.default_rng(2).permutation(500)[:25].astype(np.int32)
    keys = cell_keys(SEED, torch.arange(30))
    order = np.random.default_rng(3).permutation(25)
    one = sentences(torch.from_numpy(values), torch.from_numpy(tokens), keys, pad_length).numpy()
    other = sentences(torch.from_numpy(values[:, order]), torch.from_numpy(tokens[order]), keys, pad_length).numpy()
    np.testing.assert_array_equal(tokens[one], tokens[order][other])


def test_ties_are_broken_evenly_and_differently_for_every_cell_and_seed() -> None:
    values = np.ones((4000, 8), np.float32)
    first = positions_of(values, 3)[:, 0]
    np.testing.assert_allclose(np.bincount(first, minlength=8) / 4000, 1 / 8, atol=0.03)  # 5.7 standard deviations
    assert (first != positions_of(values, 3, seed=SEED + 1)[:, 0]).mean() > 0.8  # 7 in 8 expected


def test_the_smallest_positive_value_ranks_above_zero_and_the_largest_above_all() -> None:
    values = np.array([[0.0, np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max, 1.0]], np.float32)
    assert positions_of(values, 4)[0].tolist() == [2, 3, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sentences_are_the_same_on_a_gpu() -> None:
    values, tokens = torch.from_numpy(tied(200, 50)), torch.arange(50, dtype=torch.int32)
    for pad_length in (9, 80):
        on_cpu = sentences(values, tokens, cell_keys(SEED, torch.arange(200)), pad_length)
        keys = cell_keys(SEED, torch.arange(200, device="cuda"))
        on_gpu = sentences(values.cuda(), tokens.cuda(), keys, pad_length)
        assert torch.equal(on_cpu, on_gpu.cpu())
