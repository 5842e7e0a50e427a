"""sest/cells/columns.py: label columns and the control are found, said, and never guessed."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sest.cells.columns import detect_columns, labels, usual_columns
from sest.errors import InputError

TARGETS = ["non-targeting", "STAT1", "JAK2", "non-targeting", "STAT1", "MYC"]


def table(**columns: object) -> pd.DataFrame:
    return pd.DataFrame(columns, index=[f"cell{i}" for i in range(6)])


# --- columns


@pytest.mark.parametrize(
    ("perturbation", "cell_type", "batch"),
    [
        ("target_gene", "cell_type", "batch"),
        ("perturbation", "celltype", "gem_group"),
        ("gene", "cell_line", "batch_var"),
        ("Condition", "Cell.Type", "Replicate"),
        ("guide target", "Cell-Line", "PLATE"),
        ("drug", "cellline", "donor"),
    ],
)
def test_conventional_columns_are_found_whatever_their_case_and_said(
    perturbation: str, cell_type: str, batch: str
) -> None:
    obs = table(**{"n_genes": range(6), batch: list("ababab"), cell_type: ["K562"] * 6, perturbation: TARGETS})
    found = detect_columns(obs)
    assert (found.perturbation, found.cell_type, found.batch) == (perturbation, cell_type, batch)
    assert found.control == "non-targeting"
    assert found.notes == (
        f"The perturbation is column {perturbation!r} of obs.",
        f"The cell type is column {cell_type!r} of obs.",
        f"The batch is column {batch!r} of obs.",
        "The control is 'non-targeting' (2 of 6 cells).",
    )


def test_what_is_not_there_is_none(shared_reference: Path) -> None:
    for obs in (table(n_genes=range(6)), ad.read_h5ad(shared_reference / "se" / "raw" / "cells.h5ad").obs):
        found = detect_columns(obs)
        assert (found.perturbation, found.cell_type, found.batch, found.control, found.notes) == (None,) * 4 + ((),)


def test_columns_that_are_named_are_used_and_not_noted() -> None:
    obs = table(target_gene=TARGETS, guide=["a", "b", "c", "b", "a", "a"], line=list("xxyyxx"), lane=list("112211"))
    found = detect_columns(obs, pert_col="guide", cell_type_col="line", batch_col="lane", control="b")
    assert (found.perturbation, found.cell_type, found.batch, found.control) == ("guide", "line", "lane", "b")
    assert found.notes == ()


def test_usual_columns_are_used_where_the_table_has_them_and_nothing_else_is_given() -> None:
    obs = table(guide=TARGETS, gene=["a"] * 6, line=["x"] * 6)
    usual = {"perturbation": "guide", "cell_type": "kind", "control": "MYC"}
    nothing, auto = {"pert_col": None, "cell_type_col": None, "control": None}, {"rule": "auto"}
    # no column "kind": the cell type is left to be detected
    assert usual_columns(obs, usual, **nothing) == {
        "pert_col": "guide",
        "cell_type_col": None,
        "control": "MYC",
        **auto,
    }
    # the usual control is no label of the column that is given
    given = {"pert_col": "gene", "cell_type_col": "line", "control": None}
    assert usual_columns(obs, usual, **given) == given | auto
    assert usual_columns(obs, usual, **(nothing | {"control": "JAK2"}))["control"] == "JAK2"
    assert usual_columns(obs, dict.fromkeys(usual), **nothing) == nothing | auto
    assert usual_columns(obs, usual | {"labels": "as-is"}, **nothing)["rule"] == "as-is"


@pytest.mark.parametrize(
    ("option", "name"), [("pert_col", "--pert-col"), ("cell_type_col", "--cell-type-col"), ("batch_col", "--batch-col")]
)
def test_a_named_column_that_is_missing_is_an_error_with_the_nearest(option: str, name: str) -> None:
    obs = table(target_gene=TARGETS, lane=range(6))
    words = rf"No column 'target_gen' in obs\. Available: target_gene, lane\. Did you mean 'target_gene'\? Pass {name}"
    with pytest.raises(InputError, match=words):
        detect_columns(obs, **{option: "target_gen"})


def test_candidates_with_the_same_labels_are_one_and_others_are_an_error() -> None:
    obs = table(perturbation=pd.Categorical(TARGETS), target_gene=TARGETS)
    found = detect_columns(obs)
    assert found.perturbation == "target_gene"
    assert found.notes[0] == "The perturbation is column 'target_gene' of obs. 'perturbation' has the same labels."
    obs.loc["cell1", "target_gene"] = "MYC"
    with pytest.raises(InputError, match=r"perturbation: 'target_gene', 'perturbation'\. Choose one with --pert-col"):
        detect_columns(obs)
    assert detect_columns(obs, pert_col="perturbation").perturbation == "perturbation"
    with pytest.raises(InputError, match=r"batch: 'batch', 'plate'\. Choose one with --batch-col"):
        detect_columns(table(target_gene=TARGETS, plate=list("aabbcc"), batch=list("abcabc")))


def test_whole_numbers_are_the_same_labels_in_every_type() -> None:
    obs = table(batch=[1, 2, 1, 2, 1, 2], gem_group=list("121212"), plate=[1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert detect_columns(obs).batch == "batch"


def test_a_column_with_one_label_gives_way_to_one_with_several() -> None:
    assert detect_columns(table(perturbation=["CRISPRi"] * 6, drug=["DMSO"] * 3 + ["A"] * 3)).perturbation == "drug"
    assert detect_columns(table(condition=["control"] * 6)).perturbation == "condition"


def test_columns_of_real_files_are_found(shared_data: Path) -> None:
    papalexi = detect_columns(ad.read_h5ad(shared_data / "papalexi_eccite.h5ad", backed="r").obs)
    assert (papalexi.perturbation, papalexi.cell_type, papalexi.batch, papalexi.control) == (
        "target_gene",
        "cell_type",
        "batch",
        "non-targeting",
    )
    perturbench = detect_columns(ad.read_h5ad(shared_data / "perturbench_devel.h5ad", backed="r").obs)
    assert (perturbench.perturbation, perturbench.cell_type, perturbench.batch, perturbench.control) == (
        "target_gene",
        "cell_type",
        None,
        "control",
    )
    assert "'perturbation', 'condition' have the same labels" in perturbench.notes[0]


# --- control


@pytest.mark.parametrize(
    "label",
    "non-targeting control ctrl NT nontargeting non_targeting scramble safe-targeting vehicle DMSO DMSO_TF unperturbed "
    "mock untreated Non-Targeting CONTROL NTC".split(),
)
def test_conventional_control_labels_are_found(label: str) -> None:
    assert detect_columns(table(target_gene=[label, "STAT1", "JAK2", label, "NTRK1", "MOCOS"])).control == label


def test_several_control_labels_are_an_error_until_one_is_named() -> None:
    obs = table(target_gene=["NT", "DMSO", "STAT1", "STAT1", "NT", "MYC"])
    with pytest.raises(InputError, match=r"may be the control \(cells\): 'DMSO' \(1\), 'NT' \(2\)\. .*--control"):
        detect_columns(obs)
    assert detect_columns(obs, control="DMSO").control == "DMSO"


def test_without_a_control_the_likely_then_the_most_frequent_labels_are_shown() -> None:
    dmso = "[('DMSO_TF_x', 0.0, 'uM')]"
    obs = table(drug=["A", "B", "B", dmso, "C", "B"])
    with pytest.raises(
        InputError, match=r"^No control cells: .*\"\[\('DMSO_TF_x'.*\]\" \(1\), 'B' \(3\), 'A' \(1\)"
    ) as no:
        detect_columns(obs)
    assert str(no.value).endswith("Pass --control.")
    assert "\n" not in str(no.value)
    assert detect_columns(obs, control=dmso).control == dmso
    with pytest.raises(InputError, match=r"no cell has the label 'b'\. Did you mean 'B'"):
        detect_columns(obs, control="b")


def test_a_control_without_a_perturbation_column_is_an_error() -> None:
    with pytest.raises(InputError, match=r"--control 'NT' needs a perturbation column\. Available: lane"):
        detect_columns(table(lane=range(6)), control="NT")


# --- labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b", "c", "a", "b"], ("a", "b", "c")),
        (pd.Categorical(["b", "a", "b", "c", "a", "b"], categories=["unused", "c", "b", "a"]), ("a", "b", "c")),
        (pd.array(["b", "a", "b", "c", "a", "b"], dtype="string"), ("a", "b", "c")),
        ([10, 2, 10, 3, 2, 10], ("10", "2", "3")),
        ([10.0, 2.0, 10.0, 3.0, 2.0, 10.0], ("10", "2", "3")),
        (pd.array([10, 2, 10, 3, 2, 10], dtype="Int64"), ("10", "2", "3")),
        (pd.Categorical([10, 2, 10, 3, 2, 10]), ("10", "2", "3")),
        ([True, False, True, True, False, True], ("False", "True")),
        (pd.array([True, False, True, True, False, True], dtype="boolean"), ("False", "True")),
    ],
)
def test_labels_are_sorted_names_and_codes_for_every_type_of_column(values: object, names: tuple[str, ...]) -> None:
    obs = table(column=values)
    codes, found = labels(obs, "column")
    assert (codes.dtype, found) == (np.dtype(np.int32), names)
    plain = [str(int(v)) if isinstance(v, float) else str(v) for v in obs["column"]]
    assert [found[code] for code in codes] == plain


@pytest.mark.parametrize(
    "values",
    [
        ["a", None, "a", np.nan, "b", "a"],
        ["a", "", "a", " ", "b", "a"],
        ["a", "nan", "a", "<NA>", "b", "a"],
        pd.Categorical(["a", None, "a", None, "b", "a"]),
        [1, np.nan, 1, np.nan, 2, 2],
        pd.array([True, None, True, None, True, False], dtype="boolean"),
    ],
)
def test_missing_labels_are_counted_in_an_error(values: object) -> None:
    with pytest.raises(InputError, match=r"Column 'batch' of obs has no label for 2 of 6 cells"):
        labels(table(batch=values), "batch")


def test_fractional_numbers_are_no_labels() -> None:
    with pytest.raises(InputError, match=r"'dose' of obs holds numbers such as 0\.5"):
        labels(table(dose=[1, 2, 0.5, 1, 2, 1]), "dose")


# --- genes


# --- what genes are called


def test_a_context_is_a_cell_type_where_no_other_column_is() -> None:
    obs = table(perturbation=["control", "X"] * 3, context=list("aaabbb"))
    assert detect_columns(obs).cell_type == "context"
    assert detect_columns(obs.assign(cell_line=list("ababab"))).cell_type == "cell_line"


def test_spaces_around_cell_types_and_batches_are_no_part_of_them_and_this_is_said() -> None:
    obs = pd.DataFrame({"gene": ["ctrl", "A", "A"], "cell_type": ["x ", "x ", "y"], "batch": [" 1", "1", "2"]})
    codes, names = labels(obs, "cell_type")
    assert codes.tolist() == [0, 0, 1] and names == ("x", "y")
    codes, names = labels(obs, "batch", twins=True)
    assert codes.tolist() == [0, 0, 1] and names == ("1", "2")
    notes = detect_columns(obs).notes
    assert "Labels of 'cell_type' are read without the spaces around them: 'x '." in notes
    assert "Labels of 'batch' are read without the spaces around them: ' 1'." in notes


@pytest.mark.parametrize("other", ["beta ", "Beta", "BETA\t"])
def test_cell_types_that_differ_in_case_or_spaces_alone_are_refused(other: str) -> None:
    with pytest.raises(InputError, match=r"Labels in 'cell_type' that differ in case or spaces alone \(1\)") as error:
        labels(pd.DataFrame({"cell_type": ["beta", other, "alpha"]}), "cell_type")
    assert repr(other) in str(error.value) and "'beta'" in str(error.value)
