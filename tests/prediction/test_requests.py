"""What can be asked of a prediction: the test split, templates, tables and lists, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import Demo

from helpers.caches import small_screen, write_cache
from helpers.configs import small_config
from helpers.demo_cells import CONTROL, Predict, rows_of
from sest.cells.columns import Columns
from sest.config import EvaluateConfig, PredictConfig
from sest.data.dataset import Dataset
from sest.errors import InputError
from sest.evaluation.evaluate import evaluate
from sest.prediction.controls import CachedPools
from sest.prediction.predict import predict
from sest.prediction.requests import Request, make_requests, named, read_wanted
from sest.runs.checkpoint import Checkpoint
from sest.runs.known import Known, known_with_cells
from sest.training.train import train


def test_the_test_split_can_be_that_of_one_cell_type(predicted: Predict, tmp_path: Path) -> None:
    """Both cell types of a small cache have a test perturbation."""
    cache = write_cache(tmp_path / "cache.zarr", [small_screen("d")])
    splits, text = tmp_path / "splits.toml", '[datasets]\nd = "x.h5ad"\n[training]\nd = "train"\n'
    splits.write_text(text + '[fewshot."d.x"]\nval = ["Q"]\ntest = ["P"]\n[fewshot."d.y"]\ntest = ["S", "T"]\n')
    train(cache, tmp_path / "run", small_config(splits=str(splits), max_steps=1))
    both, one = predicted(tmp_path / "run"), predicted(tmp_path / "run", cell_type="y")
    assert dict(both.obs["cell_type"].value_counts()) == {"x": 8 + 7, "y": 6 + 9 + 7}
    assert set(one.obs["cell_type"]) == {"y"}
    np.testing.assert_array_equal(one.X.toarray(), both[both.obs["cell_type"] == "y"].X.toarray())


def test_a_template_keeps_its_rows_and_gets_real_controls(
    predicted: Predict, template: ad.AnnData, real: ad.AnnData, values: np.ndarray, tmp_path: Path
) -> None:
    cells = predicted(template=str(tmp_path / "template.h5ad"))
    assert sorted(cells.obs_names) == sorted(template.obs_names)
    expected = template.obs.loc[cells.obs_names]
    for column in expected:
        np.testing.assert_array_equal(cells.obs[column].to_numpy(), expected[column].to_numpy())
    assert list(cells.obs["cell_type"].cat.categories) == ["beta", "alpha"]  # the used ones, in the template's order
    keys = cells.obs[["cell_type", "gene"]].astype(str).agg("/".join, axis=1)
    assert (keys != keys.shift()).sum() == keys.nunique() == 6  # rows are grouped
    assert cells.uns["sest"]["columns"] == {"perturbation": "gene", "cell_type": "cell_type", "control": "ctrl"}
    for cell_type in ("alpha", "beta"):
        of_type = (cells.obs["gene"] == "ctrl") & (cells.obs["cell_type"] == cell_type)
        pool = values[rows_of(real, CONTROL, cell_type)]
        distance = np.abs(cells[of_type].X.toarray()[:, None] - pool[None]).max(2)
        assert (distance.min(1) < 1e-5).all() and len(set(distance.argmin(1))) == 12  # different real cells


def test_a_template_without_cell_types_takes_the_named_one(
    demo: Demo, predicted: Predict, refusal: Callable[..., str], names: list[str], tmp_path: Path
) -> None:
    obs = pd.DataFrame({"gene": [names[0], "control", names[0]]}, index=list("abc"))
    ad.AnnData(sp.csr_matrix((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "t.h5ad")
    path = str(tmp_path / "t.h5ad")
    assert "several cell types: alpha, beta. Pass --cell-type" in refusal(template=path)
    cells = predicted(template=path, cell_type="alpha")
    assert cells.obs["cell_type"].tolist() == ["alpha"] * 3
    assert dict(zip(cells.obs_names, cells.obs["gene"], strict=True)) == dict(zip("abc", obs["gene"], strict=True))
    assert evaluate(tmp_path / "out.h5ad", demo.cells, EvaluateConfig(cell_eval=False)).provenance["n_pairs"] == 1


def test_a_template_may_have_any_columns_and_repeated_names(
    predicted: Predict, names: list[str], tmp_path: Path
) -> None:
    obs = pd.DataFrame({"guide": ["NT-9", names[0], "NT-9"], "plate": ["p1", None, "p2"]}, index=["x", "x", "y"])
    with pytest.warns(UserWarning, match="not unique"):
        ad.AnnData(sp.csr_matrix((3, 1), dtype=np.float32), obs=obs).write_h5ad(tmp_path / "t.h5ad")
    cells = predicted(template=str(tmp_path / "t.h5ad"), pert_col="guide", control="NT-9", cell_type="beta")
    assert sorted(cells.obs_names) == ["x", "x-1", "y"]
    assert sorted(cells.obs["guide"]) == sorted(obs["guide"]) and cells.obs["plate"].isna().sum() == 1
    assert cells.uns["sest"]["columns"]["control"] == "NT-9"


def test_a_table_of_counts_says_what_and_how_many(demo: Demo, names: list[str], tmp_path: Path) -> None:
    """Written as a spreadsheet does it: with a mark at the beginning, CR LF, an empty line and a column more."""
    table, lines = tmp_path / "counts.csv", [f"{names[0]},40,9000", "", f"{names[3]},7,9000", ""]
    table.write_bytes("\r\n".join(["\ufefftarget_gene,n_cells,median_umi_per_cell", *lines]).encode())
    result = predict(demo.run, tmp_path / "out.h5ad", PredictConfig(list=str(table), cell_type="alpha"))
    sizes = ad.read_h5ad(tmp_path / "out.h5ad").obs["target_gene"].value_counts()
    assert dict(sizes) == {names[0]: 40, names[3]: 7, CONTROL: 80}
    assert (result.n_predicted, result.n_controls, result.n_perturbations, result.n_genes) == (47, 80, 2, 300)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target_gene,n_cells\nA,5\n\nB,many\n", "line 4: 'B,many' is not"),
        ("target_gene,n_cells\nA,5\nA,5\n", "line 3: 'A,5' is not a new perturbation"),
        ("target_gene,n_cells\nA,0\n", "line 2: 'A,0' is not"),
        ("target_gene,n_cells\nA\n", "line 2: 'A,' is not"),
        ("gene,cells\nA,5\n", "needs the column target_gene; its first line has: gene, cells"),
        ("", "its first line has: (none)"),
        ("target_gene,n_cells\n", "lists no perturbations"),
        (
            "target_gene,ncells\nA,5\n",
            "no column n_cells, but 'ncells': rename it to n_cells if it is the number of cells",
        ),
        ("target_gene,Number of cells\nA,5\n", "no column n_cells, but 'Number of cells'"),
        ("target_gene, count\nA,5\n", "no column n_cells, but ' count'"),
        ("target_gene,n_cells,N_cells\nA,5,6\n", "the column n_cells 2 times: 'n_cells', 'N_cells'. Keep one."),
    ],
)
def test_a_bad_table_of_counts_is_refused_with_the_line(
    refusal: Callable[..., str], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "counts.csv").write_text(text)
    assert message in refusal(list=str(tmp_path / "counts.csv"))


@pytest.mark.parametrize(
    "first", ["target_gene, n_cells", "Target_Gene,N_cells,umi_per_cell", " n_cells ,target_gene "]
)
def test_columns_of_a_table_are_found_whatever_their_case_and_spaces(first: str, tmp_path: Path) -> None:
    lines = ["20, A", "30, B"] if first.startswith(" n") else ["A, 20", "B, 30"]
    (tmp_path / "counts.csv").write_text("\n".join([first, *lines]) + "\n")
    assert read_wanted(None, PredictConfig(list=str(tmp_path / "counts.csv"))) == {"A": 20, "B": 30}


def test_bad_requests_are_refused_in_one_line_and_nothing_is_written(
    refusal: Callable[..., str], names: list[str], template: ad.AnnData, tmp_path: Path
) -> None:
    assert "several cell types: alpha, beta. Pass --cell-type." in refusal(only=names[0])
    assert "Did you mean 'beta'?" in refusal(only=names[0], cell_type="betta")
    assert "No test cells of cell type 'alpha'. There are: beta." in refusal(cell_type="alpha")
    near = refusal(only=names[0] + "x", cell_type="beta")
    assert "no features for 1 of 1 perturbations" in near and f"'{names[0]}'" in near
    assert f"'{CONTROL}' is the control" in refusal(only=CONTROL, cell_type="beta")
    assert "each once" in refusal(only=f"{names[0]},{names[0]}", cell_type="beta")
    assert "each once" in refusal(only=" , ", cell_type="beta")
    assert "Pass one of" in refusal(only=names[0], list="x.csv")
    assert "It has: last, checkpoint-step-20, best, checkpoint-step-10" in refusal(checkpoint="step-10")
    assert "does not exist" in refusal(run=tmp_path / "no-run")
    path = tmp_path / "template.h5ad"
    assert "is used by this command already" in refusal(out=path, template=str(path))
    assert "Create it first" in refusal(out=tmp_path / "no-folder" / "out.h5ad")
    assert "is a folder" in refusal(out=tmp_path)


def test_names_and_numbers_that_are_given_are_taken_as_they_are() -> None:
    def read(wanted: Any) -> dict[str, int] | None:
        return read_wanted(wanted, PredictConfig())

    assert read(None) is None
    assert read(["A,B", "C"]) == {"A,B": 128, "C": 128}  # a name may hold a comma
    assert read({"A": 5, "B": np.int64(7)}) == {"A": 5, "B": 7}
    assert read("A") == {"A": 128}
    assert read(np.array(["A"])) == {"A": 128}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ([], r"Name at least one perturbation, and each once; given: \(none\)\."),
        ({}, r"Name at least one perturbation"),
        (["A", "B", "A"], r"each once; given: A, B, A\."),
        ({"A": 0}, r"'A: 0' is not a perturbation and a number of cells above 0"),
        ({"A": 2.5}, r"'A: 2\.5' is not"),
        ({"A": "3"}, r"'A: 3' is not"),
    ],
)
def test_names_or_numbers_that_are_none_are_refused(wanted: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_wanted(wanted, PredictConfig())


def test_there_is_one_way_at_a_time_to_say_what_to_predict() -> None:
    with pytest.raises(InputError, match="or pass one of --template, --list, --only and --all-perturbations, not both"):
        read_wanted(["A"], PredictConfig(only="B"))
    with pytest.raises(InputError, match="Pass one of --template, --list, --only and --all-perturbations"):
        read_wanted(None, PredictConfig(template="t.h5ad", list="list.csv"))
    assert read_wanted(None, PredictConfig(only="A,B", n_cells=9)) == {"A,B": 9}
    assert read_wanted(None, PredictConfig(only=("A,B", "C"), n_cells=9)) == {"A,B": 9, "C": 9}
    assert read_wanted(None, PredictConfig(template="t.h5ad")) is None  # the template says it


def known(data: Dataset) -> Known:
    """As of a run on these cells."""
    assert data.split_file is not None
    state = {"cache_sha256": data.cache.sha256, "splits_sha256": data.split_file.sha256}
    return known_with_cells(Checkpoint(Path("run/best"), state), data, small_config(), "onehot")


def summary(requests: list[Request]) -> list[tuple[str, str, bool, int, int]]:
    return [(r.pool.cell_type, r.perturbation, r.is_control, r.n_cells, len(r.pool)) for r in requests]


def test_the_test_split_is_asked_for_context_by_context_with_all_its_controls(tiny_data: Dataset) -> None:
    requests, columns = make_requests(PredictConfig(), None, known(tiny_data), None)
    assert summary(requests) == [
        ("x", "P", False, 8, 7),
        ("x", "ctrl", True, 7, 7),
        ("y", "P", False, 8, 7),
        ("y", "S", False, 6, 7),
        ("y", "ctrl", True, 7, 7),
    ]
    assert columns == Columns("gene", "cell_type", "batch", "ctrl", ())


def test_a_list_is_asked_for_in_its_order_from_the_controls_of_one_cell_type(tiny_data: Dataset) -> None:
    requests, _ = make_requests(PredictConfig(cell_type="y"), {"S": 5, "A": 300}, known(tiny_data), None)
    assert summary(requests) == [("y", "S", False, 5, 7), ("y", "A", False, 300, 7), ("y", "ctrl", True, 7, 7)]
    new = CachedPools(tiny_data)["x"]
    requests, _ = make_requests(
        PredictConfig(), {"S": 5}, known(tiny_data), {"x": new}
    )  # new controls replace the cache's
    assert all(request.pool is new for request in requests)


def test_all_perturbations_of_the_run_in_several_cell_types_at_once(tiny_data: Dataset) -> None:
    names = list(tiny_data.labels.perturbations[1:])
    asked = PredictConfig(all_perturbations=True, cell_type=("y", "x", "y"), n_cells=3)
    assert read_wanted(None, asked) is None
    requests, _ = make_requests(asked, None, known(tiny_data), None)
    assert [(r.pool.cell_type, r.perturbation, r.n_cells) for r in requests if not r.is_control] == [
        (cell_type, name, 3) for cell_type in ("y", "x") for name in names
    ]
    test, _ = make_requests(PredictConfig(cell_type=("x",)), None, known(tiny_data), None)
    assert {r.pool.cell_type for r in test} == {"x"}
    with pytest.raises(InputError, match="No test cells of cell type 'z'"):
        make_requests(PredictConfig(cell_type=("x", "z")), None, known(tiny_data), None)
    with pytest.raises(InputError, match="Pass one of"):
        read_wanted(None, PredictConfig(all_perturbations=True, only="P"))
    with pytest.raises(InputError, match="not both"):
        read_wanted(["P"], PredictConfig(all_perturbations=True))


def test_a_template_without_controls_gets_them_under_the_label_that_is_given(
    refusal: Callable[..., str], predicted: Predict, template: ad.AnnData, real: ad.AnnData, tmp_path: Path
) -> None:
    path = tmp_path / "template.h5ad"
    perturbed = template[template.obs["gene"] != "ctrl"]
    perturbed.write_h5ad(path)
    line = refusal(template=str(path))
    assert str(path) in line and f"pass --control {CONTROL} all the same" in line and "--list and --only" in line
    cells = predicted(template=str(path), control=CONTROL)
    asked = cells.obs.loc[perturbed.obs_names]
    assert asked["gene"].tolist() == perturbed.obs["gene"].tolist()
    for kind in ("alpha", "beta"):
        controls = rows_of(real, CONTROL, kind)
        written = cells.obs[(cells.obs["gene"] == CONTROL) & (cells.obs["cell_type"] == kind)]
        assert set(written.index) == set(real.obs_names[controls])
    assert cells.uns["sest"]["columns"]["control"] == CONTROL


def test_new_controls_of_several_cell_types_start_the_predictions_of_each(tiny_data: Dataset) -> None:
    requests, _ = make_requests(PredictConfig(), {"S": 5}, known(tiny_data), CachedPools(tiny_data))
    assert summary(requests)[:2] == [("x", "S", False, 5, 7), ("x", "ctrl", True, 7, 7)]
    assert [r.pool.cell_type for r in requests] == ["x", "x", "y", "y"]
    one, _ = make_requests(PredictConfig(cell_type="y"), {"S": 5}, known(tiny_data), CachedPools(tiny_data))
    assert [r.pool.cell_type for r in one] == ["y", "y"]


def test_names_with_commas_are_one_where_one_is_called_so_and_sets_have_one_spelling() -> None:
    drug = "[('DMSO_TF', 0.0, 'uM')]"
    known = ["A", "B", "A+C", drug]
    assert named({" A , B,": 9}, known, split=True, as_is=False) == {"A": 9, "B": 9}
    assert named({drug: 9, "C+A": 9}, known, split=True, as_is=False) == {drug: 9, "A+C": 9}
    assert named({"C+A": 1, "x,y": 2}, known, split=False, as_is=True) == {"C+A": 1, "x,y": 2}
    for wanted in ({"A,A": 1}, {" , ": 1}, {"A+C": 1, "C+A": 2}):
        with pytest.raises(InputError, match="each once"):
            named(wanted, known, split=True, as_is=False)


def test_options_that_would_do_nothing_are_refused() -> None:
    for given, said in (
        ({"n_cells": 5}, "real cells of the test split. Leave --n-cells out"),
        ({"n_cells": 5, "template": "t.h5ad"}, "rows of the template. Leave --n-cells out"),
    ):
        with pytest.raises(InputError, match=said):
            read_wanted(None, PredictConfig(**given))
    assert read_wanted(None, PredictConfig(n_cells=5, all_perturbations=True)) is None
