"""The notebooks of the documentation, run by a real kernel: on simulated cells, and on real ones where they are."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STEPS = "max_steps = 300"
REAL = {  # notebook -> its line about the cells, the same for a file of real ones, which
    "own_screen": ("source = None", "source = {!r}", "papalexi_eccite.h5ad"),
    "zero_shot": (
        'source, columns, held_out = None, {}, "gamma"',
        'source, columns, held_out = {!r}, {{}}, "A172"',
        "perturbench_devel.h5ad",
    ),
}


def execute(folder: Path, changes: dict[str, dict[str, str]]) -> None:
    """Run notebooks one after another in one kernel, which imports torch once; each in a folder of its own.

    Nothing may be printed beside what cells show, and every table of scores must name the controls.

    Args:
        changes: by notebook, texts of its first cell to replace.
    """
    cells = []
    for name, texts in changes.items():
        book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        codes = [cell for cell in book.cells if cell.cell_type == "code"]
        for before, after in texts.items():
            assert before in codes[0].source
            codes[0].source = codes[0].source.replace(before, after, 1)
        (folder / name).mkdir()
        start = f"%reset -f\nimport os\nos.chdir({str(folder / name)!r})"
        cells += [nbformat.v4.new_code_cell(start), *codes]
    whole = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in cells:
        assert [output for output in cell.outputs if output.output_type in ("stream", "error")] == [], cell.source
    tables = [o.data.get("text/plain", "") for cell in cells for o in cell.outputs if o.output_type == "execute_result"]
    scored = [table for table in tables if re.search(r"^controls +0\.0.* 0\.\d", table, re.MULTILINE)]
    assert len(scored) == len(changes)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_named_on_the_page(path: Path) -> None:
    book: Any = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
    title = book.cells[0].source.splitlines()[0].removeprefix("# ")
    assert f"[{title}](notebooks/{path.name})" in (ROOT / "docs" / "tutorials.md").read_text()


@pytest.mark.slow
def test_the_notebooks_run_from_their_first_to_their_last_cell(tmp_path: Path) -> None:
    execute(tmp_path, {path.stem: {STEPS: "max_steps = 12"} for path in NOTEBOOKS})


@pytest.mark.full
@pytest.mark.parametrize("name", REAL)
def test_a_notebook_runs_on_real_cells(name: str, tmp_path: Path) -> None:
    before, after, file = REAL[name]
    real = Path(os.environ.get("SEST_DATA", ROOT.parent / "shared" / "data")) / file
    if not real.is_file():
        pytest.skip(f"no {real}")
    execute(tmp_path, {name: {STEPS: "max_steps = 100", before: after.format(str(real))}})
