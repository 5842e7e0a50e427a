"""encoder/base.py: what every encoder promises to `sest embed`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.h5ad_files import counts, gene_names, write_cells
from helpers.se_model import OUT
from sest.cells.inputs import Cells
from sest.config import EmbedConfig
from sest.encoder.base import CellEncoder
from sest.encoder.choose import make_encoder


@pytest.fixture
def cells(tmp_path: Path, opened: Callable[..., list[Cells]]) -> list[Cells]:
    return opened(write_cells(tmp_path / "a.h5ad", counts()), write_cells(tmp_path / "b.h5ad", counts(12, seed=1)))


@pytest.fixture(params=["se", "pca"])
def encoder(request: pytest.FixtureRequest, model: Path, cells: list[Cells]) -> CellEncoder:
    name = str(model) if request.param == "se" else "pca"
    made = make_encoder(EmbedConfig(encoder=name, device="cpu"), cells)
    made.prepare(cells, [np.arange(c.file.n_cells) for c in cells], 4, 4)
    return made


def test_widths_and_names_are_what_the_encoder_says(encoder: CellEncoder, cells: list[Cells]) -> None:
    is_pca = encoder.always_projected
    assert (encoder.name, encoder.native_dim, encoder.n_extra) == (
        ("pca", 30, 0) if is_pca else ("model.safetensors", OUT, 10)
    )
    assert (encoder.precision, encoder.max_tokens) == ("fp32", None)
    assert (encoder.fitted is not None) == is_pca
    for c in cells:
        assert encoder.gene_names(c) == gene_names(30)
        numbers = np.arange(3, 9)
        rows = encoder.encode(c, c.read(numbers), numbers)
        assert rows.shape == (6, encoder.native_dim + encoder.n_extra) and rows.dtype == np.float32
        assert encoder.fidelity(c, c.read(numbers), numbers) is None  # exact
    assert [len(text) for text in (encoder.sha256, encoder.gene_table_sha256())] == [64, 64]
    assert encoder.projection_attributes() == ({"genes": gene_names(30)} if is_pca else {})


def test_encoding_is_staging_in_any_thread_then_starting(encoder: CellEncoder, cells: list[Cells]) -> None:
    numbers = np.arange(40)
    block = cells[0].read(numbers)
    whole = encoder.encode(cells[0], block, numbers)
    with ThreadPoolExecutor(1) as thread:
        staged = [
            thread.submit(encoder.stage, cells[0], block[start : start + 16], numbers[start : start + 16])
            for start in range(0, 40, 16)
        ]
        parts = np.concatenate([encoder.start(cells[0], part.result())() for part in staged])
    # matrix products of other shapes add up in another order: float32 rounding
    np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_a_batch_is_of_the_size_that_was_asked_for(encoder: CellEncoder) -> None:
    assert encoder.batch_size(7) == 7 and encoder.batch_size(0) >= 1
