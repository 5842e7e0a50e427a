"""encoder/choose.py: what `--encoder` may name, and what is refused before a file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.h5ad_files import counts, write_cells
from helpers.notes import Notes
from sest.cells.inputs import Cells
from sest.config import EmbedConfig
from sest.encoder.choose import check_encoder, make_encoder
from sest.encoder.pca import PcaEncoder
from sest.encoder.state import SeEncoder
from sest.errors import InputError
from sest.progress import reporting


def test_pca_needs_no_weights_and_anything_else_is_a_state_embedding_model(
    tmp_path: Path, model: Path, opened: Callable[..., list[Cells]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = opened(write_cells(tmp_path / "a.h5ad", counts()))
    assert isinstance(make_encoder(EmbedConfig(encoder="pca"), cells), PcaEncoder)
    notes = Notes()
    monkeypatch.setattr("sest.machine.devices._cpu_has_bf16_units", lambda: True)
    with reporting(notes):
        encoder = make_encoder(EmbedConfig(encoder=str(model), device="cpu", max_tokens=6), cells)
    assert isinstance(encoder, SeEncoder) and (encoder.max_tokens, encoder.precision) == (6, "fp32")
    assert notes.notes[0].startswith("This processor has bf16 units")
    numbers = np.arange(40)  # the seed breaks ties, which Poisson counts have many of
    first, same, other = (
        make_encoder(EmbedConfig(encoder=str(model), device="cpu", max_tokens=6, seed=seed), cells).encode(
            cells[0], cells[0].read(numbers), numbers
        )
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": ""}, r"No encoder\. Pass --encoder"),
        ({"encoder": "/nowhere/SE-600M"}, "at /nowhere/SE-600M"),
        ({"encoder": "PCA"}, r"No encoder 'PCA': .*there are pca, genes and obsm:KEY\. Did you mean 'pca'"),
        ({"encoder": "none"}, r"No encoder 'none': .*there are pca, genes and obsm:KEY"),
        ({"encoder": "MODEL", "weights": "other.ckpt"}, r"'other\.ckpt' in .* It holds: model\.safetensors"),
        ({"encoder": "MODEL", "device": "tpu"}, r"No device 'tpu'\. Use auto, cpu, cuda or cuda:N\."),
        ({"encoder": "MODEL", "device": "cpu", "precision": "fp16"}, "Precision fp16 needs a GPU"),
        (
            {"encoder": "MODEL", "device": "cpu", "precision": "tf32"},
            r"tf32 needs a GPU with TF32 units \(Ampere or newer",
        ),
        ({"encoder": "pca", "precision": "tf32"}, r"--precision tf32 is of an SE encoder; 'pca' is float32\. Leave it"),
        ({"encoder": "obsm:X", "precision": "bf16"}, r"--precision bf16 is of an SE encoder; 'obsm:X' is float32\."),
        ({"encoder": "MODEL", "precision": "fp8"}, "precision is 'fp8'; it takes one of: auto, fp32, tf32, bf16, fp16"),
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
    with pytest.raises(InputError, match=message):
        make_encoder(EmbedConfig(**options), [])
