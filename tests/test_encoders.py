"""sest/encoders.py: what `--encoder` may name, which genes a file shares with it, and the PCA that needs no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import Notes, counts, gene_names, write_cells, write_se

import sest.encoders
from sest.config import EmbedConfig, TrainConfig
from sest.devices import choose_precision, faster_precision
from sest.encoder import KeptGenes, Staged, StateEncoder
from sest.encoders import PcaEncoder, check_encoder, common_genes, make_encoder
from sest.errors import InputError
from sest.inputs import Cells, Source, open_cells


@contextmanager
def opened(paths: Sequence[Path], **options: str) -> Iterator[list[Cells]]:
    config = EmbedConfig(encoder="pca", **options)
    with ExitStack() as stack:
        yield open_cells([Source(path.stem, path.stem, path) for path in paths], config, Notes(), stack)


def everything(cells: Sequence[Cells]) -> list[np.ndarray]:
    return [np.arange(c.file.n_cells) for c in cells]


def encoded(encoder: PcaEncoder, cells: Cells) -> np.ndarray:
    """The projected rows of a whole file."""
    numbers = np.arange(cells.file.n_cells)
    assert encoder.fitted is not None
    return encoder.fitted.apply(encoder.encode(cells, cells.read(numbers), numbers))


def normalised(values: np.ndarray) -> np.ndarray:
    """Counts (n, G) as log1p of counts per 10,000; an empty cell stays empty."""
    total = values.sum(1, keepdims=True, dtype=np.float64)
    return np.log1p(values * np.divide(1e4, total, out=np.zeros_like(total), where=total > 0))


def svd_scores(x: np.ndarray, dim: int) -> np.ndarray:
    """PCA by NumPy's SVD, every component pointing to its largest entry."""
    centred = x - x.mean(0)
    vt = np.linalg.svd(centred, full_matrices=False)[2][:dim]
    return centred @ (vt * np.sign(vt[np.arange(dim), np.abs(vt).argmax(1)])[:, None]).T


@pytest.mark.parametrize("scale", ["counts", "log1p"])
def test_pca_of_counts_normalises_them_and_that_of_log1p_uses_them_as_they_are(tmp_path: Path, scale: str) -> None:
    values = counts() if scale == "counts" else normalised(counts()).astype(np.float32)
    with opened([write_cells(tmp_path / "a.h5ad", values)]) as cells:
        assert cells[0].scale == scale
        encoder = make_encoder(EmbedConfig(encoder="pca"), cells, Notes())
        encoder.prepare(cells, everything(cells), 4, 4)
        expected = svd_scores(normalised(values) if scale == "counts" else values.astype(np.float64), 4)
        # values up to 8 in float32, scores up to 15
        np.testing.assert_allclose(encoded(encoder, cells[0]), expected, atol=2e-5)


def test_pca_keeps_the_most_variable_genes_where_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sest.encoders, "PCA_GENES", 12)  # instead of 4096
    values = normalised(counts()).astype(np.float32)
    with opened([write_cells(tmp_path / "a.h5ad", values)]) as cells:
        encoder = make_encoder(EmbedConfig(encoder="pca"), cells, Notes())
        assert encoder.native_dim == 12
        encoder.prepare(cells, everything(cells), 3, 3)
        kept = np.sort(np.argsort(-values.var(0, dtype=np.float64), kind="stable")[:12])
        assert encoder.projection_attributes() == {"genes": [f"G{i}" for i in kept]}
        np.testing.assert_allclose(encoded(encoder, cells[0]), svd_scores(values[:, kept].astype(float), 3), atol=2e-5)


def test_pca_of_several_files_uses_the_genes_they_share_by_name(tmp_path: Path) -> None:
    names, values = gene_names(30), counts()
    order = np.random.default_rng(0).permutation(30)
    one = write_cells(tmp_path / "a.h5ad", values[:25])
    other = write_cells(tmp_path / "b.h5ad", values[25:][:, order], var=pd.DataFrame(index=np.array(names)[order]))
    with opened([one, other]) as both, opened([write_cells(tmp_path / "ab.h5ad", values)]) as whole:
        found, expected = (make_encoder(EmbedConfig(encoder="pca"), c, Notes()) for c in (both, whole))
        found.prepare(both, everything(both), 4, 4)
        expected.prepare(whole, everything(whole), 4, 4)
        parts = np.concatenate([encoded(found, c) for c in both])
        np.testing.assert_allclose(parts, encoded(expected, whole[0]), atol=2e-5)


def test_genes_that_not_all_files_have_are_left_out_and_said(tmp_path: Path) -> None:
    one = write_cells(tmp_path / "a.h5ad", counts())
    other = write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[f"G{i}" for i in range(10, 40)]))
    third = write_cells(tmp_path / "c.h5ad", counts(), var=pd.DataFrame(index=[f"H{i}" for i in range(30)]))
    with opened([one, other, third]) as cells:
        notes = Notes()
        assert common_genes(cells[:2], notes) == [f"G{i}" for i in range(10, 30)]
        assert notes.notes == ["The PCA uses the 20 genes that all files have."]
        with pytest.raises(InputError, match=r"no gene in common \(a.h5ad, c.h5ad\)"):
            common_genes([cells[0], cells[2]], notes)


def test_a_stored_pca_encodes_new_cells_as_it_did_the_first(tmp_path: Path) -> None:
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        encoder = make_encoder(EmbedConfig(encoder="pca"), cells, Notes())
        encoder.prepare(cells, everything(cells), 4, 4)
        again = PcaEncoder.from_projection(encoder.projection_attributes()["genes"], encoder.fitted)
        np.testing.assert_array_equal(encoded(again, cells[0]), encoded(encoder, cells[0]))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An SE folder that knows G0 to G39."""
    return write_se(tmp_path / "se", gene_names(40))


def embeddings(encoder: object, cells: Cells) -> np.ndarray:
    numbers = np.arange(cells.file.n_cells)
    return encoder.encode(cells, cells.read(numbers), numbers)  # type: ignore[attr-defined]


def test_symbols_are_found_in_a_var_column_and_become_the_stored_gene_names(tmp_path: Path, model: Path) -> None:
    ids = [f"ENSG{i:011d}" for i in range(30)]
    symbols = [*gene_names(28), "", "novel"]
    one = write_cells(tmp_path / "a.h5ad", counts(), var=pd.DataFrame({"symbol": symbols}, index=ids))
    plain = write_cells(tmp_path / "b.h5ad", counts(), var=pd.DataFrame(index=[*gene_names(28), ids[28], "novel"]))
    with opened([one, plain]) as cells:
        notes = Notes()
        encoder = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, notes)
        assert notes.notes[0] == "a.h5ad: 28 of 30 genes are known to the encoder (symbol)."
        assert "1 genes without a name of their own keep their var index" in notes.notes[2]
        assert encoder.gene_names(cells[0]) == [*gene_names(28), ids[28], "novel"]
        np.testing.assert_array_equal(embeddings(encoder, cells[0]), embeddings(encoder, cells[1]))


def test_embeddings_do_not_depend_on_genes_the_encoder_does_not_know(tmp_path: Path, model: Path) -> None:
    values = counts(12, 30)
    more = np.insert(values, [0, 3, 17, 30], 9, axis=1)
    names = np.insert(np.array(gene_names(30), dtype=object), [0, 3, 17, 30], ["x0", "x1", "x2", "x3"])
    one = write_cells(tmp_path / "a.h5ad", values)
    other = write_cells(tmp_path / "b.h5ad", more, var=pd.DataFrame(index=names))
    with opened([one, other]) as cells:
        encoder = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, Notes())
        np.testing.assert_array_equal(embeddings(encoder, cells[0]), embeddings(encoder, cells[1]))


def test_files_whose_genes_the_encoder_cannot_tell_apart_are_refused(tmp_path: Path, model: Path) -> None:
    ensembl = pd.DataFrame(
        {"gene_name": [f"ENST{i:011d}" for i in range(30)]}, index=[f"ENSG{i:011d}" for i in range(30)]
    )
    clash = pd.DataFrame({"symbol": [*gene_names(28), "", ""]}, index=[*(f"E{i}" for i in range(28)), "G5", "E29"])
    for var, message in (
        (
            ensembl,
            r"a.h5ad: Too few of the file's 30 genes .* var index 0 \(these look like ENSEMBL ids\), gene_name 0",
        ),
        (clash, "a.h5ad names 1 genes twice: G5"),
    ):
        path = write_cells(tmp_path / "a.h5ad", counts(), var=var)
        with opened([path]) as cells, pytest.raises(InputError, match=message) as refused:
            make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, Notes())
        assert "\n" not in str(refused.value)


def test_batch_size_is_what_was_asked_or_fits_the_budget(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        se = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, Notes())
        pca = make_encoder(EmbedConfig(encoder="pca"), cells, Notes())
    assert (se.batch_size(7), pca.batch_size(7)) == (7, 7)
    assert (se.batch_size(0), pca.batch_size(0)) == (256, 1024)
    a_cell = se._model.activation_bytes()  # type: ignore[attr-defined]
    for budget, expected in ((0, 1), (a_cell * 3.5, 3)):
        monkeypatch.setattr(sest.encoders, "ACTIVATION_BUDGET", int(budget))
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
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        encoder = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, notes)
        expected = embeddings(encoder, cells[0])
        before = len(notes.notes)
        sizes = out_of_memory_above(monkeypatch, 12)
        for _ in range(2):
            # matrix products of other shapes add up in another order: float32 rounding
            np.testing.assert_allclose(embeddings(encoder, cells[0]), expected, atol=1e-6)
    assert sizes == [40, 20, 10, 10, 10, 10, 10, 10, 10, 10]
    assert notes.notes[before:] == ["40 cells at once do not fit the memory: going on with 10."]


def test_a_cell_that_does_not_fit_the_memory_alone_is_an_error_that_says_what_to_do(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        encoder = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, Notes())
        out_of_memory_above(monkeypatch, 0)
        with pytest.raises(
            InputError, match=r"A single cell does not fit the memory of cpu: its 16 tokens .*--max-tok"
        ):
            embeddings(encoder, cells[0])


def test_fidelity_is_the_cosine_with_whole_sentences_where_they_are_cut_and_nothing_elsewhere(
    tmp_path: Path, model: Path
) -> None:
    notes = Notes()
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        whole = make_encoder(EmbedConfig(encoder=str(model), device="cpu"), cells, notes)
        long = make_encoder(EmbedConfig(encoder=str(model), device="cpu", max_tokens=16), cells, notes)
        pca = make_encoder(EmbedConfig(encoder="pca"), cells, notes)
        cut = make_encoder(EmbedConfig(encoder=str(model), device="cpu", max_tokens=6), cells, notes)
        numbers = np.arange(20)
        rows = cells[0].read(numbers)
        assert [e.fidelity(cells[0], rows, numbers) for e in (whole, long, pca)] == [None] * 3
        assert [e.max_tokens for e in (whole, long, pca, cut)] == [None, None, None, 6]
        a, b = (e.encode(cells[0], rows, numbers)[:, : e.native_dim].astype(np.float64) for e in (whole, cut))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        found = cut.fidelity(cells[0], rows, numbers)
    assert found == {"n_cells": 20, "cosine_mean": round(cosine.mean(), 5), "cosine_min": round(cosine.min(), 5)}
    assert found["cosine_min"] < 0.9999
    assert notes.notes[-1] == "Sentences are cut to 6 of 16 tokens: embeddings are approximate."


def test_fidelity_of_eight_bits_is_against_bf16(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sest.encoders, "choose_precision", lambda name, device, training: name)  # as on a GPU
    with opened([write_cells(tmp_path / "a.h5ad", counts())]) as cells:
        e8 = make_encoder(EmbedConfig(encoder=str(model), device="cpu", precision="fp8"), cells, Notes())
        e16 = make_encoder(EmbedConfig(encoder=str(model), device="cpu", precision="bf16"), cells, Notes())
        numbers = np.arange(20)
        rows = cells[0].read(numbers)
        a, b = (e.encode(cells[0], rows, numbers)[:, : e.native_dim].astype(np.float64) for e in (e8, e16))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        found = e8.fidelity(cells[0], rows, numbers)
    assert e16.fidelity(cells[0], rows, numbers) is None
    assert found == {"n_cells": 20, "cosine_mean": round(cosine.mean(), 5), "cosine_min": round(cosine.min(), 5)}
    assert 0.98 < found["cosine_min"] < 0.99999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": ""}, "No encoder. Pass --encoder"),
        ({"encoder": "/nowhere/SE-600M"}, "No SE folder or checkpoint at /nowhere/SE-600M"),
        (
            {"encoder": "MODEL", "checkpoint": "other.ckpt"},
            r"No checkpoint 'other.ckpt' in .* It holds: model.safetensors",
        ),
        ({"encoder": "MODEL", "device": "tpu"}, "No device 'tpu'. Use auto, cpu, cuda or cuda:N."),
        ({"encoder": "MODEL", "device": "meta"}, "Device 'meta' is not supported"),
        ({"encoder": "MODEL", "device": "cuda:99"}, "No device 'cuda:99': this machine has [0-9]+ CUDA GPUs"),
        ({"encoder": "MODEL", "device": "cpu", "precision": "fp16"}, "Precision fp16 needs a GPU"),
        (
            {"encoder": "MODEL", "device": "cpu", "precision": "fp8"},
            "Precision fp8 needs a GPU .* Use --precision bf16",
        ),
        ({"encoder": "MODEL", "max_tokens": 1}, "max-tokens is 1; it must be at least 2"),
        ({"encoder": "pca", "max_tokens": 512}, "--max-tokens shortens the sentences of an SE encoder; 'pca' has none"),
    ],
)
def test_an_unusable_encoder_is_refused_before_the_cells_are_read(
    model: Path, options: dict[str, Any], message: str
) -> None:
    options = {name: str(model) if value == "MODEL" else value for name, value in options.items()}
    with pytest.raises(InputError, match=message):
        check_encoder(EmbedConfig(**options))


def test_fp8_is_for_embedding_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, usable in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        if usable:
            assert choose_precision("fp8", torch.device("cuda"), training=False) == "fp8"
        else:
            with pytest.raises(InputError, match=r"capability 8.9 or more. Use --precision bf16 or fp32"):
                choose_precision("fp8", torch.device("cuda"), training=False)
    with pytest.raises(InputError, match="precision is 'fp8'; it takes one of: auto, fp32, bf16, fp16"):
        TrainConfig(precision="fp8")


def test_a_processor_with_bf16_units_is_told_of_but_auto_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for units in (True, False):
        monkeypatch.setattr("sest.devices._cpu_has_bf16_units", lambda units=units: units)
        assert choose_precision("auto", cpu, training=True) == choose_precision("auto", cpu, training=False) == "fp32"
        hint = faster_precision("fp32", cpu)
        assert (hint is not None and "--precision bf16" in hint) if units else hint is None
        assert faster_precision("bf16", cpu) is None
    monkeypatch.undo()
    assert isinstance(faster_precision("fp32", cpu), str | None)


def test_pca_reads_counts_per_ten_thousand_and_an_empty_cell_as_zero(tmp_path: Path) -> None:
    values = counts()
    with opened([write_cells(tmp_path / "a.h5ad", values)]) as cells:
        encoder = PcaEncoder(gene_names(30))
        rows = encoder.encode(cells[0], cells[0].read(np.arange(40)), np.arange(40))
    np.testing.assert_allclose(rows, normalised(values), rtol=1e-6)  # float32
    assert (rows[1] == 0).all()
