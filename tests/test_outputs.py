"""Where a command may write, and what its tables are like."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sest.outputs
from sest.errors import InputError
from sest.outputs import check_output, is_same, to_csv


def refused(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as error:
        check_output(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    path.write_text("cells")
    return path


def test_a_new_file_may_be_written_and_an_older_one_only_when_it_is_to_be_replaced(cells: Path) -> None:
    check_output(cells.with_name("new.h5ad"))
    assert refused(cells) == f"{cells} exists. Pass --force to replace it, or give another name."
    check_output(cells, force=True)


def test_a_link_that_leads_nowhere_exists(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "exists. Pass --force" in refused(tmp_path / "link")
    check_output(tmp_path / "link", force=True)


def test_an_input_is_never_replaced_whatever_name_it_goes_by(
    cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soft").symlink_to(cells)
    os.link(cells, tmp_path / "hard")
    (tmp_path / "folder").mkdir()
    (tmp_path / "around").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "folder")
    names = ["soft", "hard", "around/cells.h5ad", "folder/../cells.h5ad"]
    for name in [*(tmp_path / name for name in names), Path("../cells.h5ad"), cells]:
        assert "is used by this command already" in refused(name, force=True, inputs=[None, tmp_path / "gone", cells])
    assert refused(Path("../cells.h5ad"), force=True, inputs=[str(cells)]) == (
        f"../cells.h5ad is used by this command already as {cells}, and never replaced. Give another name."
    )
    assert is_same(tmp_path / "x", tmp_path / "around" / "x")  # neither is there yet
    assert not is_same(tmp_path / "x", tmp_path / "y") and not is_same(cells, tmp_path / "y")


def test_two_outputs_of_a_command_are_two_files(tmp_path: Path) -> None:
    assert "is used by this command already" in refused(tmp_path / "x", inputs=[tmp_path / "folder" / ".." / "x"])


def test_what_lies_in_an_input_or_around_one_is_never_replaced(tmp_path: Path, cells: Path) -> None:
    cache = tmp_path / "c.zarr"
    cache.mkdir()
    (cache / "zarr.json").write_text("{}")
    assert f"is a part of {cache}" in refused(cache / "zarr.json", force=True, inputs=[cache])
    assert f"holds {cells}" in refused(tmp_path, force=True, inputs=[cells], made=os.listdir(tmp_path))
    (tmp_path / "cells").mkdir()
    check_output(tmp_path / "cells" / "new", inputs=[tmp_path / "cells"])  # beside what is there, as always


def test_a_folder_is_new_or_empty_or_holds_nothing_but_what_is_made(tmp_path: Path) -> None:
    out, made = tmp_path / "out", ("a", "b")
    check_output(out / "deep", made=made)
    out.mkdir()
    check_output(out, made=made)
    (out / "a").write_text("")
    assert "is not an empty folder. Pass --force to replace what is in it" in refused(out, made=made)
    check_output(out, made=made, force=True)
    (out / "thesis").mkdir()
    for force in (False, True):
        assert "it holds thesis, which is never replaced" in refused(out, made=made, force=force)
        assert "exists and is not an empty folder" in refused(out / "a", made=made, force=force)
        assert "is a folder; give the name of a file" in refused(out, force=force)


def test_a_device_is_never_replaced() -> None:
    assert "/dev/null is no regular file" in refused(Path("/dev/null"), force=True)


def test_a_name_ends_as_it_must(tmp_path: Path) -> None:
    assert "does not end in .npz, .pt" in refused(tmp_path / "x.csv", suffixes=(".npz", ".pt"))
    check_output(tmp_path / "x.pt", suffixes=(".npz", ".pt"))


def test_a_place_in_a_zarr_store_is_refused_whatever_the_command_reads(tmp_path: Path) -> None:
    store = tmp_path / "c.zarr"
    store.mkdir()
    (store / "zarr.json").touch()
    for place, made in ((store / "p.h5ad", None), (store / "new" / "run", ())):
        with pytest.raises(InputError, match=r"would lie in .*c\.zarr, a Zarr store"):
            check_output(place, made=made)
    check_output(tmp_path / "p.h5ad")


def test_places_where_nothing_can_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "Create it first" in refused(tmp_path / "no" / "x.h5ad")
    assert "Create it first" in refused(tmp_path / "file" / "x.h5ad")
    assert f"Cannot write to {tmp_path}/file" in refused(tmp_path / "file" / "x", made=())
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))  # root may all
    assert f"Cannot write to {tmp_path}. Choose another place for x." in refused(tmp_path / "x")
    assert f"Cannot write to {tmp_path}. Choose another place for x." in refused(tmp_path / "x", made=())


def test_no_cell_of_a_csv_starts_a_formula_and_numbers_and_other_names_stay(tmp_path: Path) -> None:
    names = ["=HYPERLINK(1)", "+A", "-1", "@x", "\tx", "A+B", "null", "NA", "", 'x,"y"\n=1']
    table = pd.DataFrame({"perturbation": names, "kind": pd.Categorical(names), "delta": np.arange(10.0) - 5})
    before = table.copy()
    to_csv(table, tmp_path / "t.csv")
    assert table.equals(before) and to_csv(table) == (tmp_path / "t.csv").read_text()
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["perturbation"] for row in rows] == [f"'{name}" for name in names[:5]] + names[5:]
    assert [row["kind"] for row in rows] == [row["perturbation"] for row in rows]
    assert [float(row["delta"]) for row in rows] == table["delta"].tolist()
    back = pd.read_csv(tmp_path / "t.csv", keep_default_na=False)
    assert back["perturbation"].tolist() == [row["perturbation"] for row in rows]


def test_one_place_writes_csv() -> None:
    root = Path(sest.outputs.__file__).parent
    found = [file for file in root.rglob("*.py") if re.search(r"\w\.to_csv\(|csv\.(Dict)?[wW]riter", file.read_text())]
    assert [file.relative_to(root).as_posix() for file in found] == ["outputs.py"]
