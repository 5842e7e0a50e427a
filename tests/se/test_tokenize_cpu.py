"""se/tokenize_cpu.py: the compiled tokenizer gives the sentences of the dense one and of plain Python."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse
import torch

from helpers.plain_tokenizer import plain_mix, plain_sentence
from sest.se import tokenize_cpu
from sest.se.tokenize import cell_keys, tokenize

SEED = 11


def both(
    values: np.ndarray, tokens: np.ndarray, cells: np.ndarray, pad_length: int, scale: str, n_parts: int = 2
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions and count features of (B, K) values from the dense form and from the compiled one.

    The compiled one reads a file whose columns are the kept genes in another order, with two more that are not kept.
    """
    keys = cell_keys(SEED, torch.as_tensor(cells))
    dense = tokenize(torch.as_tensor(values), torch.as_tensor(tokens).to(torch.int32), keys, pad_length, 3, scale=scale)
    n_genes = values.shape[1] + 2
    order = np.random.default_rng(9).permutation(n_genes)  # place in a file -> kept gene; the last two are none
    place = np.where(order < n_genes - 2, order, -1).astype(np.int32)
    rows = scipy.sparse.csr_matrix(np.pad(values, ((0, 0), (0, 2)), constant_values=7)[:, order])
    logs = np.log1p(np.maximum(rows.data, 0)) if scale == "counts" else rows.data
    with ThreadPoolExecutor(2) as pool:
        compiled = tokenize_cpu.tokenize(
            rows.indptr.astype(np.int64),
            rows.indices,
            rows.data,
            logs,
            place,
            tokens.astype(np.uint32),
            keys.numpy().view(np.uint32),
            pad_length,
            3,
            pool,
            n_parts,
        )
    return [(dense[0].numpy(), dense[1].numpy()), compiled]


def test_the_hash_of_one_number_is_lowbias32() -> None:
    for number in (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123_456_789):
        assert int(tokenize_cpu._mix32(np.uint32(number))) == plain_mix(number)


def test_expressed_genes_come_in_descending_order_with_their_shares() -> None:
    for values, scale, positions, shares in (
        ([1.0, 4.0, 0.0, 2.0, 3.0], "log1p", [1, 4, 3], [20.0, 40.0, 30.0, 20.0]),  # sum 10; slot 0 has kept gene 3
        (
            [1.0, np.e - 1, 0.0, np.e**3 - 1, 0.0],
            "counts",
            [3, 1, 0],
            100 / (np.log(2) + 4) * np.array([3, 3, 1, np.log(2)]),
        ),
        ([2.0**24 - 3, 2.0**24 - 1, 2.0**24 - 2, 2.0**24 - 4], "counts", [1, 2, 0], [25.0, 25.0, 25.0, 25.0]),
    ):
        _, found = both(np.array([values], np.float32), np.arange(len(values)), np.array([0]), 4, scale)
        assert found[0].tolist() == [positions]
        np.testing.assert_allclose(found[1], [shares], rtol=1e-6)  # float32 rounding


def awkward(kind: str, n_genes: int) -> np.ndarray:
    """Cells (50, n_genes) of one kind that a tokenizer could get wrong."""
    rng = np.random.default_rng([n_genes, len(kind)])
    values: np.ndarray = rng.poisson(np.exp(rng.normal(-1, 2, n_genes)), (50, n_genes)).astype(np.float32)
    if kind == "all tied":
        values = np.ones_like(values)
    elif kind == "empty":
        values[:] = 0
    elif kind == "all expressed":
        values += 1
    elif kind == "few expressed":
        values *= rng.random(values.shape) < np.linspace(0, 0.1, 50)[:, None]
    elif kind == "negative":
        values -= 1
        values[values == 0] = -0.0
    elif kind == "huge":  # 16,777,215 +- 8: float32 log1p of neighbours is one number
        values = 2.0**24 - 1 - rng.integers(0, 16, values.shape)
    elif kind == "extreme":
        values = rng.choice([0, 1e-45, 1e-38, 1, 65504, 3e38], values.shape)
    elif kind == "fractions":
        values = rng.random(values.shape) * (rng.random(values.shape) < 0.5)
    return values.astype(np.float32)


KINDS = ["counts", "all tied", "empty", "all expressed", "few expressed", "negative", "huge", "extreme", "fractions"]


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_genes", "pad_length"), [(3000, 128), (3000, 2), (3000, 2900), (60, 61), (40, 200)])
def test_the_compiled_tokenizer_equals_the_dense_one_and_both_the_plain_one(
    kind: str, n_genes: int, pad_length: int
) -> None:
    values = awkward(kind, n_genes)
    tokens = np.random.default_rng(n_genes).permutation(20_000)[:n_genes]
    cells = np.arange(50) * 2**30
    for scale in ("counts", "log1p"):
        (dense, dense_shares), (compiled, shares) = both(values, tokens, cells, pad_length, scale)
        np.testing.assert_array_equal(compiled, dense)
        np.testing.assert_allclose(shares, dense_shares, rtol=6e-7, atol=0)  # NumPy and torch round log1p apart
        for cell in (0, 25, 49):
            row = np.maximum(values[cell], 0)
            assert compiled[cell].tolist() == plain_sentence(row, tokens, SEED, int(cells[cell]), pad_length)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("n_cells", [0, 1, 31, 32, 33, 200])
def test_the_compiled_tokenizer_takes_any_number_of_cells_for_any_number_of_threads(n_cells: int) -> None:
    values = np.random.default_rng(0).integers(0, 3, (n_cells, 25)).astype(np.float32)
    (dense, shares), compiled = both(values, np.arange(25), np.arange(n_cells), 9, "counts", n_parts=8)
    np.testing.assert_array_equal(compiled[0], dense)
    np.testing.assert_allclose(compiled[1], shares, rtol=6e-7)


def test_numba_is_not_imported_by_the_command_line_or_the_encoder_before_it_is_needed() -> None:
    code = "import sys, sest.cli.main, sest.se.model; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
