"""Files that are open, and a small model to encode them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from helpers.h5ad_files import gene_names
from helpers.se_model import write_se
from sest.cells.inputs import Cells, Source, open_cells
from sest.config import EmbedConfig


@pytest.fixture
def opened() -> Iterator[Callable[..., list[Cells]]]:
    """Opens .h5ad files, and closes them at the end of the test."""
    with ExitStack() as stack:

        def open_files(*paths: Path) -> list[Cells]:
            return open_cells([Source(path.stem, path.stem, path) for path in paths], EmbedConfig(), stack)

        yield open_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An SE folder that knows G0 to G39: 12 native columns, sentences of 16."""
    return write_se(tmp_path / "se", gene_names(40))


@pytest.fixture(autouse=True)
def _no_bf16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said must not depend on the processor the tests run on."""
    monkeypatch.setattr("sest.machine.devices._cpu_has_bf16_units", lambda: False)
