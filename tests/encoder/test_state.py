"""encoder/state.py: the genes a file shares with the model, batches that fit the memory, how exact a short cut is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import sest.encoder.state
from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.notes import Notes
from sest.cells.inputs import Cells
from sest.encoder.state import SeEncoder
from sest.errors import InputError
from sest.progress import reporting
from sest.se.model import KeptGenes, Staged, StateEncoder
from sest.se.weights import load_encoder

Opened = Callable[..., list[Cells]]


def encoder_of(model: Path, cells: list[Cells], precision: str = "fp32", max_tokens: int | None = None) -> SeEncoder:
    """The model on the CPU."""
    return SeEncoder(load_encoder(model), cells, torch.device("cpu"), precision, seed=0, max_tokens=max_tokens)


def embeddings(encoder: SeEncoder, cells: Cells) -> np.ndarray:
    numbers = np.arange(cells.file.n_cells)
    return encoder.encode(cells, cells.read(numbers), numbers)


def test_symbols_are_found_in_a_var_column_and_become_the_stored_gene_names(
    tmp_path: Path, model: Path, opened: Opened
) -> None:
    ids = [f"ENSG{i:011d}" for i in range(30)]
    symbols = [*gene_names(28), "", "novel"]
    one = write_cells(tmp_path / "a.h5ad", counts(), var=pd.DataFrame({"symbol": symbols}, index=ids))
    plain = write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[*gene_names(28), ids[28], "novel"]))
    cells = opened(one, plain)
    notes = Notes()
    with reporting(notes):
        encoder = encoder_of(model, cells)
    assert notes.notes[0] == "a.h5ad: 28 of 30 genes are known to the encoder (symbol)."
    assert "1 genes without a name of their own keep their var index" in notes.notes[2]
    assert encoder.gene_names(cells[0]) == [*gene_names(28), ids[28], "novel"]
    np.testing.assert_array_equal(embeddings(encoder, cells[0]), embeddings(encoder, cells[1]))


def test_embeddings_do_not_depend_on_genes_the_encoder_does_not_know(
    tmp_path: Path, model: Path, opened: Opened
) -> None:
    values = counts(12, 30)
    more = np.insert(values, [0, 3, 17, 30], 9, axis=1)
    names = np.insert(np.array(gene_names(30), dtype=object), [0, 3, 17, 30], ["x0", "x1", "x2", "x3"])
    one = write_cells(tmp_path / "a.h5ad", values)
    other = write_cells(tmp_path / "b.h5ad", more, var=pd.DataFrame(index=names))
    cells = opened(one, other)
    encoder = encoder_of(model, cells)
    np.testing.assert_array_equal(embeddings(encoder, cells[0]), embeddings(encoder, cells[1]))


def test_files_whose_genes_the_encoder_cannot_tell_apart_are_refused(
    tmp_path: Path, model: Path, opened: Opened
) -> None:
    ensembl = pd.DataFrame(
        {"gene_name": [f"ENST{i:011d}" for i in range(30)]}, index=[f"ENSG{i:011d}" for i in range(30)]
    )
    clash = pd.DataFrame({"symbol": [*gene_names(28), "", ""]}, index=[*(f"E{i}" for i in range(28)), "G5", "E29"])
    for name, var, message in (
        (
            "ensembl",
            ensembl,
            r"a.h5ad: Too few of the file's 30 genes .* var index 0 \(these look like ENSEMBL ids\), gene_name 0",
        ),
        ("clash", clash, "a.h5ad names 1 genes twice: G5"),
    ):
        cells = opened(write_cells(tmp_path / name / "a.h5ad", counts(), var=var))
        with pytest.raises(InputError, match=message) as refused:
            encoder_of(model, cells)
        assert "\n" not in str(refused.value)


def test_what_is_said_of_the_encoder_names_the_kernel_for_attention_on_a_gpu(
    tmp_path: Path, model: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, begin = opened(write_cells(tmp_path / "a.h5ad", counts())), StateEncoder.__init__

    def as_on_a_gpu(self: StateEncoder, *given: Any, **options: Any) -> None:
        begin(self, *given, **options)
        self.attention_kernel = "cuDNN"

    said = Notes()
    with reporting(said):
        encoder_of(model, cells)
        monkeypatch.setattr(StateEncoder, "__init__", as_on_a_gpu)
        encoder_of(model, cells)
    lines = [note for note in said.notes if note.startswith("Encoder ")]
    assert [line.rpartition(" on ")[2] for line in lines] == ["cpu, fp32.", "cpu, fp32, attention by cuDNN."]


def test_all_that_is_encoded_in_tf32_multiplies_so_and_nothing_after_it_does(
    tmp_path: Path, model: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the numbers stay those of float32, which has the same tensors."""
    products, run = torch.backends.cuda.matmul, StateEncoder.run
    before, seen = products.fp32_precision, list[str]()

    def noted(self: StateEncoder, staged: Staged, kept: KeptGenes) -> torch.Tensor:
        seen.append(products.fp32_precision)
        return run(self, staged, kept)

    monkeypatch.setattr(StateEncoder, "run", noted)
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))[0]
    encoders = [encoder_of(model, [cells], precision, max_tokens=6) for precision in ("fp32", "tf32")]
    numbers = np.arange(cells.file.n_cells)
    found = [(embeddings(e, cells), e.fidelity(cells, cells.read(numbers), numbers)) for e in encoders]
    assert seen == 3 * [before] + 3 * ["tf32"] and products.fp32_precision == before != "tf32"
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_batch_size_is_what_was_asked_or_fits_the_budget(
    tmp_path: Path, model: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    se = encoder_of(model, cells)
    assert (se.batch_size(7), se.batch_size(0)) == (7, 256)
    a_cell = se._model.activation_bytes()
    for budget, expected in ((0, 1), (a_cell * 3.5, 3)):
        monkeypatch.setattr(sest.encoder.state, "ACTIVATION_BUDGET", int(budget))
        assert se.batch_size(0) == expected


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make forward passes of more than `most` cells fail as a full GPU does; returns the sizes of all."""
    sizes, run = [], StateEncoder.run

    def limited(self: StateEncoder, staged: Staged, kept: KeptGenes) -> torch.Tensor:
        sizes.append(len(staged))
        if len(staged) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, staged, kept)

    monkeypatch.setattr(StateEncoder, "run", limited)
    return sizes


def test_a_batch_that_does_not_fit_the_memory_is_halved_and_following_ones_stay_small(
    tmp_path: Path, model: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    with reporting(notes):
        encoder = encoder_of(model, cells)
    expected = embeddings(encoder, cells[0])
    before = len(notes.notes)
    sizes = out_of_memory_above(monkeypatch, 12)
    with reporting(notes):
        for _ in range(2):
            # matrix products of other shapes add up in another order: float32 rounding
            np.testing.assert_allclose(embeddings(encoder, cells[0]), expected, atol=1e-6)
    assert sizes == [40, 20, 10, 10, 10, 10, 10, 10, 10, 10]
    assert notes.notes[before:] == ["40 cells at once do not fit the memory: going on with 10."]


def test_a_cell_that_does_not_fit_the_memory_alone_is_an_error_that_says_what_to_do(
    tmp_path: Path, model: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    encoder = encoder_of(model, cells)
    out_of_memory_above(monkeypatch, 0)
    with pytest.raises(InputError, match=r"A single cell does not fit the memory of cpu: its 16 tokens .*--max-tok"):
        embeddings(encoder, cells[0])


def test_fidelity_is_the_cosine_with_whole_sentences_where_they_are_cut_and_nothing_elsewhere(
    tmp_path: Path, model: Path, opened: Opened
) -> None:
    notes = Notes()
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    with reporting(notes):
        whole, long, cut = (encoder_of(model, cells, max_tokens=most) for most in (None, 16, 6))
    numbers = np.arange(20)
    rows = cells[0].read(numbers)
    assert [e.fidelity(cells[0], rows, numbers) for e in (whole, long)] == [None, None]
    assert [e.max_tokens for e in (whole, long, cut)] == [None, None, 6]
    a, b = (e.encode(cells[0], rows, numbers)[:, : e.native_dim].astype(np.float64) for e in (whole, cut))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = cut.fidelity(cells[0], rows, numbers)
    assert found == {"n_cells": 20, "cosine_mean": round(cosine.mean(), 5), "cosine_min": round(cosine.min(), 5)}
    assert found is not None and found["cosine_min"] < 0.9999
    assert notes.notes[-1] == "Sentences are cut to 6 of 16 tokens: embeddings are approximate."
