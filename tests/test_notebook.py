"""Progress in a notebook: a real kernel runs real cells; what it shows is read from the saved notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from sest.notebook import MOST_NOTES, NotebookReporter, in_notebook, shown_in_notebooks
from sest.progress import Silent, is_listened_to, reporting

CELLS = (
    """
import sest
sest.simulate("screen.h5ad", features="screen.npz", n_perturbations=6, n_cells_per_perturbation=12, n_controls=24,
              n_genes=60, expressed_genes=30, umi_per_cell=200)
""",
    'cache = sest.embed("screen.h5ad", "screen.zarr", dim=4)',
    """
run = sest.train(cache, "run", perturbations="screen.npz", max_steps=4, batch_size=2, set_size=8, hidden=16,
                 n_layers=1, n_heads=2, device="cpu")
""",
    "sest.open_run('run').best_step",
)


def shown(cell: Any) -> tuple[str, list[Any]]:
    """The texts and HTML that a cell of a finished notebook shows, and its other outputs."""
    pages = [o["data"]["text/html"] for o in cell.outputs if o.output_type == "display_data"]
    return " ".join(pages), [o for o in cell.outputs if o.output_type not in ("display_data", "execute_result")]


@pytest.mark.slow
def test_a_notebook_shows_the_progress_of_its_steps_and_nothing_else(tmp_path: Path) -> None:
    """HTML in place of earlier HTML, one display a call, notes below; nothing on stdout or stderr."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    simulated, embedded, trained, opened = map(shown, book.cells)
    for page, others in (simulated, embedded, trained, opened):
        assert others == []
        assert "\x1b" not in page
    assert "Embedding: " in embedded[0] and "screen.h5ad: The control is" in embedded[0]
    assert "Predicting the validation pairs: " in trained[0]  # the last of its steps
    assert len(book.cells[1].outputs) == len(book.cells[2].outputs) == 1
    assert opened[0] == "" and book.cells[3].outputs[0]["data"]["text/plain"] == "4"


def test_outside_a_notebook_nothing_listens_by_itself() -> None:
    assert not in_notebook()
    with shown_in_notebooks():
        assert not is_listened_to()


def test_who_listens_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sest.notebook.in_notebook", lambda: True)
    mine = Silent()
    with reporting(mine), shown_in_notebooks():
        assert is_listened_to()


def test_what_is_shown_is_text_and_only_the_newest_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotebookReporter, "draw", lambda self: None)
    cell = NotebookReporter()
    for number in range(MOST_NOTES + 3):
        cell.note(f"<b>note {number}</b>")
    cell.begin("<i>Reading</i>", 10, "cells", 2)
    cell.advance(3)
    page = cell._html()
    assert "<b>" not in page and "<i>" not in page and "&lt;b&gt;note 22&lt;/b&gt;" in page
    assert "note 2&lt;" not in page and page.count("<small>") == MOST_NOTES
    assert "&lt;i&gt;Reading&lt;/i&gt;: 5/10 cells" in page and '<progress value="5" max="10">' in page
