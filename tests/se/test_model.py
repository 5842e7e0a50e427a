"""sest/se/model.py against upstream's numbers, and against docs/design.md written out plainly in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import scipy.special
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sest.se.model
from helpers.h5ad_files import counts, gene_names
from helpers.plain_tokenizer import plain_counts, plain_sentence
from helpers.se_model import HEADS, OUT, write_se
from sest.errors import InputError
from sest.files.cell_file import CellFile
from sest.machine.transfer import Sender
from sest.se.attention import attention
from sest.se.model import SparseRows, StateEncoder, densify, sizes
from sest.se.tokenize import cell_keys
from sest.se.weights import EncoderWeights, load_encoder

CPU = torch.device("cpu")
SEED = 5


def encoder_of(weights: EncoderWeights, dtype: torch.dtype = torch.float32, seed: int = SEED) -> StateEncoder:
    return StateEncoder(weights, CPU, dtype, seed)


def plain_encoder(weights: EncoderWeights, values: np.ndarray, tokens: np.ndarray, cell: int) -> np.ndarray:
    """Steps 3 to 7 of docs/design.md for one cell's (K,) log1p values: no table, no shortcut in the last layer."""
    w: Mapping[str, np.ndarray] = {name: t.double().numpy() for name, t in weights.tensors.items()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return (x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    sentence = plain_sentence(values, tokens, SEED, cell, weights.pad_length)
    features = plain_counts(values, sentence)[:, None]
    vectors = weights.gene_vectors.double().numpy()[tokens[sentence]]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    x = norm("encoder.1", linear("encoder.0", np.concatenate([w["cls_token"], vectors, w["dataset_token"]])))
    x = x * scipy.special.expit(x) * np.sqrt(x.shape[1])
    hidden = linear("count_encoder.0", features)
    bins = scipy.special.softmax(linear("count_encoder.2", np.where(hidden > 0, hidden, 0.01 * hidden)), axis=1)
    x[:-1] += bins @ w["bin_encoder.weight"]
    n_layers = sum(name.endswith("qkv_proj.weight") for name in w)
    for layer in (f"transformer_encoder.layers.{i}." for i in range(n_layers)):
        heads = []
        for q, k, v in zip(
            *(np.split(part, weights.n_heads, axis=1) for part in np.split(linear(layer + "qkv_proj", x), 3, axis=1)),
            strict=True,
        ):
            heads.append(scipy.special.softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v)
        x = norm(layer + "norm1", x + linear(layer + "out_proj", np.concatenate(heads, axis=1)))
        hidden = linear(layer + "linear1", x)
        hidden = hidden * 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2)))
        x = norm(layer + "norm2", x + linear(layer + "linear2", hidden))
    hidden = np.maximum(linear("decoder.0.intermediate_dense", x), 0)
    out = linear("decoder.1", norm("decoder.0.layer_norm", x + linear("decoder.0.dense", hidden)))
    return np.concatenate([out[0] / np.linalg.norm(out[0]), linear("dataset_embedder", out[-1])])


@pytest.fixture(scope="module", params=[16, 64], ids=["more genes than slots", "fewer genes than slots"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncoderWeights:
    """A model of 40 genes with 15 or 63 gene slots."""
    folder = tmp_path_factory.mktemp("se") / "model"
    return load_encoder(write_se(folder, gene_names(40), pad_length=request.param))


KEPT = np.array([1, 2, 4, 5, 6, 8, 9, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 25, 26, 29])  # columns of a file of 30
TOKENS = np.random.default_rng(4).permutation(40)[:20]  # their places in the model's gene table


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_embeddings_equal_the_plain_float64_implementation(small: EncoderWeights, scale: str) -> None:
    values = counts(12, 30)
    if scale == "log1p":
        values = np.where(values > 0, values - 1.3, 0).astype(np.float32)  # some are negative and count as 0
    encoder = encoder_of(small)
    cells = np.array([0, 1, 2, 7, 8, 9, 10, 11, 12, 2**33, 2**33 + 1, 2**40])
    kept = encoder.keep(KEPT, TOKENS, 30)
    found = encoder.encode(scipy.sparse.csr_matrix(values), cells, scale, kept).numpy()
    logged = np.maximum(values[:, KEPT], 0)
    logged = np.log1p(logged) if scale == "counts" else logged
    expected = np.stack([plain_encoder(small, row, TOKENS, int(c)) for row, c in zip(logged, cells, strict=True)])
    # float32 rounding (6e-8) through 2 layers of width 16; the dataset columns are not normalised and reach 3
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert found.shape == (12, OUT + 10)
    np.testing.assert_allclose(np.linalg.norm(found[:, :OUT], axis=1), 1, atol=1e-6)


def test_a_zero_that_a_file_stores_is_no_expression(small: EncoderWeights) -> None:
    values, cells = counts(12, 30), np.arange(12)
    indptr, genes = np.arange(13) * 30, np.tile(np.arange(30, dtype=np.int32), 12)
    stored = scipy.sparse.csr_matrix((values.ravel(), genes, indptr), shape=values.shape)
    rows = scipy.sparse.csr_matrix(values)
    assert stored.nnz > rows.nnz
    encoder = encoder_of(small)
    kept = encoder.keep(KEPT, TOKENS, 30)
    assert torch.equal(encoder.encode(stored, cells, "counts", kept), encoder.encode(rows, cells, "counts", kept))


def test_embeddings_do_not_depend_on_the_batch(small: EncoderWeights) -> None:
    encoder, rows = encoder_of(small), scipy.sparse.csr_matrix(counts(11, 30))
    kept = encoder.keep(KEPT, TOKENS, 30)
    whole = encoder.encode(rows, np.arange(11), "counts", kept).numpy()
    for size in (1, 4):
        for start in range(0, 11, size):
            cells = np.arange(start, min(start + size, 11))
            part = encoder.encode(rows[cells], cells, "counts", kept).numpy()
            # matrix products of other shapes add up in another order: float32 rounding
            np.testing.assert_allclose(part, whole[cells], atol=1e-6, err_msg=f"{size} {start}")


def test_embeddings_depend_on_the_cell_index_and_seed_only_through_ties(small: EncoderWeights) -> None:
    tied = scipy.sparse.csr_matrix(np.ones((1, 30), np.float32))
    distinct = scipy.sparse.csr_matrix(np.arange(1, 31, dtype=np.float32)[None])
    encoder, other_seed = encoder_of(small), encoder_of(small, seed=SEED + 1)
    kept = encoder.keep(KEPT, TOKENS, 30)

    def first(e: StateEncoder, rows: scipy.sparse.csr_matrix, cell: int) -> np.ndarray:
        return e.encode(rows, np.array([cell]), "counts", kept).numpy()

    if small.pad_length < len(KEPT):  # every slot is decided by values: no hash
        np.testing.assert_array_equal(first(encoder, distinct, 0), first(encoder, distinct, 9))
        np.testing.assert_array_equal(first(encoder, distinct, 0), first(other_seed, distinct, 0))
    assert not np.allclose(first(encoder, tied, 0), first(encoder, tied, 9), atol=1e-4)
    assert not np.allclose(first(encoder, tied, 0), first(other_seed, tied, 0), atol=1e-4)


def test_embeddings_equal_upstreams_in_float32_and_point_the_same_way_in_bf16(shared_reference: Path) -> None:
    folder = shared_reference / "se" / "log1p"
    weights, expected = load_encoder(folder / "model"), np.load(folder / "expected.npy")
    place = {name: i for i, name in enumerate(weights.genes)}
    with CellFile(folder / "cells.h5ad") as file:
        rows, names = file.rows(0, file.n_cells), file.var.index
    positions = np.array([i for i, name in enumerate(names) if name in place])
    tokens = np.array([place[names[i]] for i in positions])

    def embeddings(dtype: torch.dtype, n: int) -> np.ndarray:
        encoder = encoder_of(weights, dtype, seed=0)  # cell 96 has a tie at the cut; 0 breaks it as upstream did
        return encoder.encode(rows[:n], np.arange(n), "log1p", encoder.keep(positions, tokens, len(names))).numpy()

    found = embeddings(torch.float32, rows.shape[0])
    assert np.abs(found - expected).max() < 1e-5  # measured: 5e-7, float32 rounding
    width = encoder_of(weights).native_dim
    cosine = (embeddings(torch.bfloat16, 20)[:, :width] * expected[:20, :width]).sum(1)
    assert cosine.min() > 0.999


def test_staging_in_threads_while_another_batch_runs_changes_nothing(small: EncoderWeights) -> None:
    encoder, rows = encoder_of(small), scipy.sparse.csr_matrix(counts(24, 30))
    kept = encoder.keep(KEPT, TOKENS, 30)
    expected = [encoder.encode(rows[i : i + 3], np.arange(i, i + 3), "counts", kept) for i in range(0, 24, 3)]
    with ThreadPoolExecutor(3) as pool:
        staged = pool.map(
            lambda i: encoder.stage(rows[i : i + 3], np.arange(i, i + 3), "counts", kept), range(0, 24, 3)
        )
        for batch, out in zip(staged, expected, strict=True):
            assert torch.equal(encoder.run(batch, kept), out)


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_a_batch_that_is_tokenised_where_it_runs_gives_the_same_embeddings(small: EncoderWeights, scale: str) -> None:
    encoder, cells = encoder_of(small), np.arange(12) * 2**31
    rows = scipy.sparse.csr_matrix(counts(12, 30) - np.float32(0.5))  # some are negative
    kept = encoder.keep(KEPT, TOKENS, 30)
    expected = encoder.encode(rows, cells, scale, kept)
    arrays = {"genes": rows.indices, "values": rows.data, "lengths": np.diff(rows.indptr).astype(np.int64)}
    arrays["keys"] = cell_keys(SEED, torch.as_tensor(cells)).numpy()
    staged = SparseRows(Sender(torch.device("cpu")).send(arrays), scale, rows.indptr.astype(np.int64))  # as on a GPU
    whole = encoder.run(staged, kept)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-6)  # NumPy and torch round log1p apart
    parts = torch.cat([encoder.run(staged.part(start, start + 5), kept) for start in (0, 5, 10)])
    # matrix products of other shapes add up in another order: float32 rounding
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


def test_all_attention_is_computed_in_the_context_in_which_its_kernel_was_found_to_work(
    small: EncoderWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()

    def noted(*given: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return attention(*given)

    monkeypatch.setattr(sest.se.model, "attention", noted)
    encoder, rows = encoder_of(small), scipy.sparse.csr_matrix(counts(3, 30))
    kept = encoder.keep(KEPT, TOKENS, 30)
    expected = encoder.encode(rows, np.arange(3), "counts", kept)
    encoder._attending = lambda: sdpa_kernel(SDPBackend.MATH)  # as `working_kernel` gives it
    found = encoder.encode(rows, np.arange(3), "counts", kept)
    assert seen == [True, True, False, False] and torch.backends.cuda.flash_sdp_enabled()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # sums in another order


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_embeddings_of_a_cpu_and_stages_in_a_thread(small: EncoderWeights) -> None:
    rows, cells = scipy.sparse.csr_matrix(counts(12, 30)), np.arange(12)
    gpu, cpu = StateEncoder(small, torch.device("cuda"), torch.float32, SEED), encoder_of(small)
    kept = gpu.keep(KEPT, TOKENS, 30)
    expected = cpu.encode(rows, cells, "counts", cpu.keep(KEPT, TOKENS, 30))
    with ThreadPoolExecutor(1) as pool:
        batches = [pool.submit(gpu.stage, rows[i : i + 4], cells[i : i + 4], "counts", kept) for i in (0, 4, 8)]
        found = torch.cat([gpu.run(batch.result(), kept).cpu() for batch in batches])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # float32 products, added up in another order


def test_fewer_tokens_are_a_model_with_a_shorter_pad_length(small: EncoderWeights) -> None:
    rows, cells = scipy.sparse.csr_matrix(counts(12, 30)), np.arange(12)
    short = encoder_of(dataclasses.replace(small, pad_length=9))
    cut = StateEncoder(small, CPU, torch.float32, SEED, max_tokens=9)
    expected = short.encode(rows, cells, "counts", short.keep(KEPT, TOKENS, 30))
    kept = cut.keep(KEPT, TOKENS, 30)
    assert torch.equal(cut.encode(rows, cells, "counts", kept), expected)
    whole = cut.with_slots(small.pad_length)
    assert (cut.pad_length, whole.pad_length) == (9, small.pad_length)
    assert torch.equal(whole.encode(rows, cells, "counts", kept), encoder_of(small).encode(rows, cells, "counts", kept))
    assert StateEncoder(small, CPU, torch.float32, SEED, max_tokens=5000).pad_length == small.pad_length


def test_too_few_known_genes_are_refused(small: EncoderWeights) -> None:
    with pytest.raises(InputError, match="Only 3 genes are known"):
        encoder_of(small).keep(KEPT[:3], TOKENS[:3], 30)


def test_the_description_names_the_sizes_of_the_weights(small: EncoderWeights) -> None:
    assert encoder_of(small).describe() == f"2 layers, width 16, {small.pad_length} slots, 40 genes"
    assert sizes(small.tensors) == {"token_dim": 8, "d_model": 16, "d_hid": 24, "n_layers": 2, "output_dim": OUT}
    assert encoder_of(small).n_heads == HEADS


def test_densify_puts_every_value_of_a_kept_gene_in_its_place() -> None:
    values = counts(9, 13)
    values[[0, 4, 8]] = 0
    columns = np.array([7, 0, 12, 3])
    place = torch.full((13,), -1, dtype=torch.int32)
    place[torch.as_tensor(columns)] = torch.arange(4, dtype=torch.int32)
    for cells in (values, np.zeros((3, 13), np.float32)):
        rows = scipy.sparse.csr_matrix(cells)
        lengths = torch.as_tensor(np.diff(rows.indptr).astype(np.int64))
        dense = densify(lengths, torch.as_tensor(rows.indices), torch.as_tensor(rows.data), place, 4)
        assert dense.dtype == torch.float32
        np.testing.assert_array_equal(dense.numpy(), cells[:, columns])


def test_no_tensor_of_a_pass_has_numbers_beyond_32_bits(small: EncoderWeights) -> None:
    encoder = encoder_of(small)
    most = encoder.largest_pass()
    # the widest of a cell are the count embedding's 512 numbers a row here; a slot more, and the dataset token
    row = max(3 * encoder.width, 24, len(small.tensors["count_encoder.0.bias"]))
    assert most * (small.pad_length + 1) * row < 2**31 <= (most + 1) * (small.pad_length + 1) * row
    large = encoder.with_slots(2048)
    large.width = 2048  # SE-600M's: 2,049 rows of 3 x 2,048
    assert large.largest_pass() == 170
