"""Files become groups of the cache, each understood once, and what cannot be is refused in one line."""

from __future__ import annotations

import re
import shutil
import unicodedata
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import sest.cells.inputs
from helpers.h5ad_files import FORMS, counts, write_cells
from helpers.notes import Notes
from helpers.web import serve
from helpers.zarr_cells import KINDS, as_zarr
from sest.cells.inputs import Cells, Source, group_name, open_cells, resolve_inputs
from sest.config import EmbedConfig
from sest.errors import InputError
from sest.files.remote import located
from sest.progress import reporting


def opened(stack: ExitStack, path: Path, **options: Any) -> Cells:
    """One file, read; `stack` closes it."""
    source = Source(path.stem, path.stem, path)
    return open_cells([source], EmbedConfig(encoder="pca", **options), stack)[0]


def identity(path: Path, **options: str) -> dict[str, object]:
    with ExitStack() as stack:
        return opened(stack, path, **options).identity()


def toml(folder: Path, datasets: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "splits.toml"
    names = [line.split(" =")[0] for line in datasets.splitlines()]
    path.write_text(f"[datasets]\n{datasets}\n[training]\n" + "".join(f'{name} = "train"\n' for name in names))
    return path


# --- which files


def test_files_become_groups_named_after_them(tmp_path: Path) -> None:
    paths = [tmp_path / "replogle rpe1.h5ad", tmp_path / "k562+drug=1.h5"]
    for path in paths:
        path.touch()
    sources, splits = resolve_inputs(paths)
    assert splits is None
    assert [(s.group, s.dataset, s.path) for s in sources] == [(p.stem, p.stem, p) for p in paths]


def test_datasets_of_a_toml_with_nested_braces_become_groups_of_their_files(tmp_path: Path) -> None:
    for name in ("a/rpe1.h5ad", "a/k562_1.h5ad", "a/k562_2.h5ad", "one.h5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    path = toml(tmp_path, 'many = "a/{rpe1,k562_{1,2}}.h5ad"\nsingle = "one.h5"')
    sources, splits = resolve_inputs([path])
    assert [s.group for s in sources] == ["many/k562_1", "many/k562_2", "many/rpe1", "single"]
    assert [s.dataset for s in sources] == ["many", "many", "many", "single"]
    assert splits is not None and splits.training == {"many", "single"}


def test_unusable_lists_of_inputs_are_refused(tmp_path: Path) -> None:
    for name in ("x.h5ad", "a/x.h5ad", "b/x.h5ad", "notes.txt", "zarr.json.h5ad"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    x = tmp_path / "x.h5ad"
    same_stems = toml(tmp_path / "t", f'd = "{tmp_path}/{{a,b}}/x.h5ad"')
    (tmp_path / "t" / "a").mkdir()
    for inputs, message in (
        ([], "No input"),
        ([tmp_path / "y.h5ad"], "No such file: .*y.h5ad"),
        ([x / "below.h5ad"], "No such file: .*below.h5ad"),
        ([tmp_path / "notes.txt"], "notes.txt is not an .h5ad file .*it is empty"),
        ([x, tmp_path / "a" / "x.h5ad"], "Several input files are named x. Rename them"),
        ([x, x], "Several input files are named x"),
        ([same_stems, x], r"Give one .toml or several files of cells, not both \(.*splits.toml, .*x.h5ad\)"),
        ([same_stems], "outside the permitted folders"),
        ([tmp_path / "zarr.json.h5ad"], "'zarr.json' .* cannot name a group"),
        ([tmp_path / "no.toml"], "no.toml"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            resolve_inputs(inputs)
        assert "\n" not in str(refused.value)


def test_two_files_of_one_name_in_a_dataset_are_refused(tmp_path: Path) -> None:
    for name in ("a/x.h5ad", "b/x.h5ad"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"Several input files are named d/x. Rename them, or make each a dataset"):
        resolve_inputs([toml(tmp_path, 'd = "{a,b}/x.h5ad"')])


# --- what is in them


@pytest.mark.parametrize("form", FORMS)
def test_any_sorted_rows_are_read_in_short_stretches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(sest.cells.inputs, "ROWS_PER_READ", 5)
    values = counts()
    with ExitStack() as stack:
        cells = opened(stack, write_cells(tmp_path / "a.h5ad", values, form))
        longest = 0
        read = cells.file.rows

        def rows(start: int, stop: int) -> object:
            nonlocal longest
            longest = max(longest, stop - start)
            return read(start, stop)

        monkeypatch.setattr(cells.file, "rows", rows)
        rng = np.random.default_rng(0)
        for n in (1, 2, 7, 23, 40):
            numbers = np.sort(rng.choice(40, n, replace=False))
            np.testing.assert_array_equal(cells.read(numbers).toarray(), values[numbers])
        np.testing.assert_array_equal(cells.read(np.array([0, 39])).toarray(), values[[0, 39]])
        assert longest == 5


def test_identity_is_of_the_content_and_not_of_the_storage_or_the_folder(tmp_path: Path) -> None:
    first = identity(write_cells(tmp_path / "1" / "a.h5ad", counts()))
    for i, form in enumerate(FORMS):
        assert identity(write_cells(tmp_path / f"form{i}" / "a.h5ad", counts(), form)) == first


def test_identity_knows_values_labels_names_and_how_they_were_read(tmp_path: Path) -> None:
    values = counts()
    path = write_cells(tmp_path / "0" / "a.h5ad", values)
    with ExitStack() as stack:
        obs, var = opened(stack, path).file.obs.frame(), opened(stack, path).file.var
    other_values = values.copy()
    other_values[5, 5] += 1
    relabelled, renamed, other_genes = obs.copy(), obs.copy(), var.copy()
    relabelled["batch"] = relabelled["batch"].to_numpy()[::-1]
    renamed.index = ["other", *obs.index[1:]]
    other_genes.index = ["other", *var.index[1:]]
    made = [
        identity(path),
        identity(path, counts="log1p"),
        identity(path, control="STAT1"),
        identity(write_cells(tmp_path / "1" / "b.h5ad", values)),
        identity(write_cells(tmp_path / "2" / "a.h5ad", other_values)),
        identity(write_cells(tmp_path / "3" / "a.h5ad", values, obs=relabelled)),
        identity(write_cells(tmp_path / "4" / "a.h5ad", values, obs=renamed)),
        identity(write_cells(tmp_path / "5" / "a.h5ad", values, var=other_genes)),
    ]
    for i, one in enumerate(made):
        assert all(one != other for other in made[i + 1 :]), i


def test_labels_of_any_type_become_categories_of_text(tmp_path: Path) -> None:
    n = 6
    obs = pd.DataFrame(
        {
            "perturbation": ["ctrl", "A", "B"] * 2,  # plain text
            "cell_type": pd.Categorical(["x", "y"] * 3, categories=["z", "y", "x"]),  # an unused category
            "gem_group": [2, 1, 2, 1, 2, 1],  # numbers
        },
        index=pd.Index([f"c{i}" for i in range(n)], name="batch"),  # also the name of a column of the cache
    )
    with ExitStack() as stack:
        cells = opened(stack, write_cells(tmp_path / "a.h5ad", counts(n), obs=obs))
        assert list(cells.obs.columns) == ["perturbation", "cell_type", "batch"]
        assert cells.obs.index.name is None and list(cells.obs.index) == [f"c{i}" for i in range(n)]
        assert cells.obs["perturbation"].tolist() == ["ctrl", "A", "B"] * 2
        assert list(cells.obs["cell_type"].cat.categories) == ["x", "y"]
        assert cells.obs["batch"].tolist() == ["2", "1"] * 3
        np.testing.assert_array_equal(cells.is_control, [True, False, False] * 2)
        labels = cells.as_group()
        assert (labels.path, labels.dataset, labels.control) == ("a", "a", "ctrl")
        assert [labels.perturbations[i] for i in labels.perturbation] == ["ctrl", "A", "B"] * 2


def test_a_file_without_labels_has_no_controls_and_says_so(tmp_path: Path) -> None:
    notes = Notes()
    with ExitStack() as stack:
        obs = pd.DataFrame({"n_counts": np.arange(40.0)}, index=[f"c{i}" for i in range(40)])
        with reporting(notes):
            cells = opened(stack, write_cells(tmp_path / "a.h5ad", counts(), obs=obs))
        assert not cells.is_control.any()
        assert set(cells.obs["cell_type"]) == set(cells.obs["batch"]) == {"unknown"}
    assert "a.h5ad: no perturbation column: its embeddings are stored, but nothing can be trained on it." in notes.notes


def test_odd_values_are_said(tmp_path: Path) -> None:
    values = counts() / 2
    values[3, 3] = -0.5
    notes = Notes()
    with ExitStack() as stack:
        path = write_cells(tmp_path / "a.h5ad", values, layers={"counts": counts()})
        with pytest.raises(InputError, match=r"1 values below zero: .*--counts log1p .*--layer: X, counts"):
            opened(stack, path)
        with reporting(notes):
            cells = opened(stack, path, counts="log1p")
        assert cells.scale == "log1p"
        assert opened(stack, cells.source.path, layer="counts").scale == "counts"
    assert any("40 cells x 30 genes, log1p of values whose sums differ" in note for note in notes.notes)
    assert "a.h5ad: 1 cells have no counts at all; they are embedded with uniform gene shares." in notes.notes
    assert "a.h5ad: 1 negative values are read as 0 by the encoder, and stay targets." in notes.notes


def test_every_file_is_refused_before_any_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = pd.DataFrame({"target_gene": ["STAT1", "JAK2"] * 20}, index=[f"c{i}" for i in range(40)])
    paths = [write_cells(tmp_path / "a.h5ad", counts()), write_cells(tmp_path / "b.h5ad", counts(), obs=obs)]
    notes = Notes()
    with ExitStack() as stack, pytest.raises(InputError, match="No control cells"), reporting(notes):
        open_cells([Source(p.stem, p.stem, p) for p in paths], EmbedConfig(encoder="pca"), stack)
    assert notes.steps == []


def test_a_toml_leads_out_of_its_folder_only_where_a_root_permits_it(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = write_cells(tmp_path / "elsewhere" / "a.h5ad", counts())
    listing = tmp_path / "here" / "starter.toml"
    listing.parent.mkdir()
    listing.write_text(f'[datasets]\nd = "{path}"\n[training]\nd = "train"\n')
    with pytest.raises(InputError, match="--data-root"):
        resolve_inputs([listing])
    assert resolve_inputs([listing], [path.parent])[0] == [Source("d", "d", path)]


# --- containers


def test_the_same_cells_are_the_same_in_every_container(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    path = write_cells(tmp_path / "a.h5ad", counts())
    adata = ad.read_h5ad(path)
    places: list[Path] = [as_zarr(tmp_path / f"{kind}.zarr", adata, kind) for kind in KINDS]
    places += [path, tmp_path / "a.data"]
    shutil.copy(path, tmp_path / "a.data")
    with serve(tmp_path) as url:
        found = [identity(place) for place in (*places, located(f"{url}/a.h5ad"))]
    assert {(one["sha256"], one["labels_sha256"]) for one in found} == {(found[0]["sha256"], found[0]["labels_sha256"])}
    assert found[-1]["file"] == "a.h5ad"


def test_a_folder_is_the_files_in_it_and_a_store_is_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("b", "a"):
        write_cells(tmp_path / "cells" / f"{name}.h5ad", counts())
    store = as_zarr(tmp_path / "cells" / "c.zarr", ad.read_h5ad(tmp_path / "cells" / "a.h5ad"), "zarr3")
    (tmp_path / "cells" / "notes.txt").touch()
    assert [source.group for source in resolve_inputs([tmp_path / "cells"])[0]] == ["a", "b", "c"]
    assert "cells: 3 files of cells, a.h5ad, b.h5ad, c.zarr." in caplog.text
    assert [source.group for source in resolve_inputs([store])[0]] == ["c"]
    assert [s.group for s in resolve_inputs([toml(tmp_path, 'all = "cells"')])[0]] == ["all/a", "all/b", "all/c"]
    assert [s.group for s in resolve_inputs([toml(tmp_path, 'one = "cells/*.zarr"')])[0]] == ["one"]


def test_a_file_of_any_name_has_a_group_by_rule_and_two_names_stay_two(tmp_path: Path) -> None:
    names = {
        "k562 rep-1, day 2": "k562 rep-1, day 2",
        "Ünïcode café": "Unicode cafe",
        "(1)": "1-",
        "__x": "x-",
        "x*?": "x-",
        "cells (1)": "cells _1-",
        "細胞": "cells-",
        "細胞2": "2-",
        "α-tubulin": "tubulin-",
    }
    found = {name: group_name(name) for name in names}
    assert len(set(found.values())) == len(found)
    for name, beginning in names.items():
        group = found[name]
        assert group == group_name(group)  # is one itself
        assert group == beginning or re.fullmatch(re.escape(beginning) + "[0-9a-f]{6}", group), group
    decomposed = unicodedata.normalize("NFD", "Ünïcode café")  # as macOS names files
    assert group_name(decomposed) == "Unicode cafe"
    (tmp_path / "細胞 (1).h5ad").touch()
    sources, _ = resolve_inputs([tmp_path / "細胞 (1).h5ad"])
    assert sources[0].group == sources[0].dataset == group_name("細胞 (1)")


def test_perturbations_that_differ_in_case_between_files_are_refused_unless_labels_stay(tmp_path: Path) -> None:
    one, two = (write_cells(tmp_path / f"{name}.h5ad", counts(9, seed=seed)) for seed, name in enumerate("ab"))
    table = ad.read_h5ad(two)
    table.obs["target_gene"] = table.obs["target_gene"].astype(str).replace({"STAT1": "Stat1"})
    table.write_h5ad(two)
    sources, _ = resolve_inputs([one, two])
    with ExitStack() as stack, pytest.raises(InputError, match=r"'STAT1' \(.*a\.h5ad\) and 'Stat1' \(.*b\.h5ad\)"):
        open_cells(sources, EmbedConfig(encoder="pca"), stack)
    with ExitStack() as stack:
        assert len(open_cells(sources, EmbedConfig(encoder="pca", labels="as-is"), stack)) == 2
