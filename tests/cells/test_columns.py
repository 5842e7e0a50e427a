"""sest/cells/columns.py: label columns, the control and the known genes are found, said, and never guessed."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sest.cells.columns import (
    agreeing_names,
    detect_columns,
    gene_names,
    labels,
    match_genes,
    names_as_known,
    usual_columns,
)
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
    nothing = {"pert_col": None, "cell_type_col": None, "control": None}
    # no column "kind": the cell type is left to be detected
    assert usual_columns(obs, usual, **nothing) == {"pert_col": "guide", "cell_type_col": None, "control": "MYC"}
    # the usual control is no label of the column that is given
    given = {"pert_col": "gene", "cell_type_col": "line", "control": None}
    assert usual_columns(obs, usual, **given) == given
    assert usual_columns(obs, usual, **(nothing | {"control": "JAK2"}))["control"] == "JAK2"
    assert usual_columns(obs, dict.fromkeys(usual), **nothing) == nothing


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
    dmso = "[('DMSO_TF', 0.0, 'uM')]"
    obs = table(drug=["A", "B", "B", dmso, "C", "B"])
    with pytest.raises(
        InputError, match=r"^No control cells: .*\"\[\('DMSO_TF'.*\]\" \(1\), 'B' \(3\), 'A' \(1\)"
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

KNOWN = ["TSPAN6", "STAT1", "JAK2", "MYC", "IRF1", "CD86", "CAV1"]


def genes(index: list[str], **columns: object) -> pd.DataFrame:
    return pd.DataFrame(columns, index=index)


def test_kept_genes_are_in_file_order_with_their_place_among_the_known() -> None:
    match = match_genes(genes(["MYC", "unknown", "TSPAN6", "CAV1", "LINC01", "STAT1"]), KNOWN)
    assert (match.column, match.names[1]) == ("var index", "unknown")
    assert (match.positions.tolist(), match.tokens.tolist()) == ([0, 2, 3, 5], [3, 0, 6, 1])
    assert (match.positions.dtype, match.tokens.dtype) == (np.dtype(np.int64), np.dtype(np.int64))


@pytest.mark.parametrize("kind", ["object", "string", "category"])
def test_the_column_with_most_matches_is_used_and_missing_names_match_nothing(kind: str) -> None:
    ids = [f"ENSG{i:011d}" for i in range(6)]
    symbols = pd.Series(["MYC", None, "TSPAN6", "CAV1", "STAT1", "x"], index=ids).astype(kind)
    match = match_genes(genes(ids, n=range(6), other=["MYC", "a", "b", "c", "d", "e"], symbol=symbols), KNOWN)
    assert (match.column, match.names) == ("symbol", ("MYC", "", "TSPAN6", "CAV1", "STAT1", "x"))
    assert match.positions.tolist() == [0, 2, 3, 4]


def test_the_index_wins_among_equals() -> None:
    assert match_genes(genes(KNOWN, symbol=KNOWN), KNOWN).column == "var index"


def test_a_panel_of_few_known_genes_is_enough_and_three_are_not() -> None:
    assert len(match_genes(genes(KNOWN[:4]), KNOWN).positions) == 4
    with pytest.raises(InputError, match="Too few of the file's 3 genes"):
        match_genes(genes(KNOWN[:3]), KNOWN)


def test_overlap_is_measured_against_the_genes_of_the_file() -> None:
    many = [*KNOWN[:5], *(f"x{i}" for i in range(45))]
    assert len(match_genes(genes(many), KNOWN).positions) == 5  # 10% of 50
    with pytest.raises(InputError, match="Too few of the file's 51 genes"):
        match_genes(genes([*many, "y"]), KNOWN)
    assert len(match_genes(genes([*many, "y"]), KNOWN, minimum=0.05).positions) == 5


def test_too_little_overlap_says_what_the_names_look_like_and_what_was_tried() -> None:
    ids = [f"ENSG{i:011d}.3" for i in range(6)]
    var = genes(ids, entrez=[str(7157 + i) for i in range(6)], mouse=["Myc", "Stat1", "Jak2", "Irf1", "Cd86", "x"])
    with pytest.raises(InputError) as caught:
        match_genes(var, KNOWN)
    assert str(caught.value) == (
        "Too few of the file's 6 genes are known to the encoder; matches by var column: var index 0 (these look like "
        "ENSEMBL ids), entrez 0 (these look like Entrez numbers), mouse 0, 5 ignoring case. It knows 7 names such as "
        "TSPAN6, STAT1, JAK2. Add a var column with such names."
    )
    with pytest.raises(InputError, match=r"such as ENSG00000000000\.3, .*\(these look like ENSEMBL ids\)\. Add"):
        match_genes(genes(KNOWN), ids)


def test_a_known_gene_that_is_there_twice_is_an_error_and_an_unknown_one_is_not() -> None:
    ids = [f"ENSG{i:011d}" for i in range(7)]
    symbols = ["MYC", "TSPAN6", "Y_RNA", "CAV1", "STAT1", "Y_RNA", "JAK2"]
    assert len(match_genes(genes(ids, symbol=symbols), KNOWN).positions) == 5
    symbols[2] = "MYC"
    with pytest.raises(InputError, match=r"^1 known genes are there more than once \(symbol\): MYC\. Sum or drop"):
        match_genes(genes(ids, symbol=symbols), KNOWN)


def test_real_panels_match_the_symbols_of_the_challenge(shared_data: Path) -> None:
    known = (shared_data / "vcc" / "gene_names.csv").read_text().split()
    for name, n_genes in (("papalexi_eccite", 299), ("perturbench_devel", 500)):
        var = ad.read_h5ad(shared_data / f"{name}.h5ad", backed="r").var
        match = match_genes(var, known)
        assert (match.column, len(match.names)) == ("var index", n_genes)
        assert len(match.positions) == len(set(var.index) & set(known)) > 0.5 * n_genes
        assert [match.names[p] for p in match.positions] == [known[t] for t in match.tokens]


# --- what genes are called


@pytest.mark.parametrize(
    ("index", "columns", "column"),
    [
        (["A", "B", "1"], {"gene_name": ["x", "y", "z"]}, "var index"),
        (["0", "1", "2"], {"type": ["g", "g", "g"], "Gene.Name": ["x", "y", "z"]}, "Gene.Name"),
        (["0", "1", "0-1"], {"gene_ids": ["E1", "E2", "E3"], "symbol": ["x", "y", "z"]}, "symbol"),
        (["7157", "3717", "2"], {"gene_name": ["7157", "3717", "2"], "feature_name": ["x", "y", ""]}, "feature_name"),
        (["0", "1", "2"], {"other": ["x", "y", "z"]}, "var index"),
        (["0", "1", "2"], {"symbol": ["", "", "z"]}, "var index"),
    ],
)
def test_an_index_of_numbers_gives_way_to_the_usual_column(
    index: list[str], columns: dict[str, list[str]], column: str
) -> None:
    found = gene_names(genes(index, **columns))
    assert found.column == column
    assert list(found.names) == columns.get(column, index)


def test_the_column_of_names_can_be_given() -> None:
    var = genes(["0", "1"], gene_name=["x", "y"], other=["p", "q"])
    assert gene_names(var, "other").names == ("p", "q")
    assert gene_names(var, "index").names == ("0", "1")
    with pytest.raises(InputError, match=r"No column 'no' in var\. Available: index, gene_name, other\."):
        gene_names(var, "no")
    assert match_genes(genes(list("ABCD"), x=list("EFGH")), list("ABCDEFGH"), given="x").names == tuple("EFGH")


IDS = [f"ENSG{i:011d}" for i in range(20)]
SYMBOLS = [f"S{i}" for i in range(20)]
VERSIONED = [f"{name}.{i % 7 + 1}" for i, name in enumerate(IDS)]


def columns_that_agree(*tables: pd.DataFrame, column: str | None = None) -> list[tuple[str, str]]:
    return [(names.column, names.names[0]) for names in agreeing_names(tables, column)]


def test_files_agree_by_the_columns_that_have_most_genes_in_common() -> None:
    index, bare = "var index", "var index, whatever the version"
    own = genes(SYMBOLS)
    assert columns_that_agree(own, genes(SYMBOLS[::-1])) == [(index, "S0"), (index, "S19")]
    assert columns_that_agree(own, genes(IDS, name_x=SYMBOLS)) == [(index, "S0"), ("name_x", "S0")]
    assert columns_that_agree(genes(IDS, name_x=SYMBOLS), own) == [("name_x", "S0"), (index, "S0")]
    assert columns_that_agree(genes(VERSIONED), genes(IDS)) == [(bare, IDS[0]), (index, IDS[0])]
    assert columns_that_agree(genes(VERSIONED), genes(VERSIONED)) == [(index, VERSIONED[0])] * 2
    newer = [f"{name}.{i % 5 + 1}" for i, name in enumerate(IDS)]  # 10 of 20 have the same version
    assert columns_that_agree(genes(VERSIONED), genes(newer)) == [(bare, IDS[0])] * 2
    assert columns_that_agree(genes(VERSIONED), genes(newer), column="index") == [(index, IDS[0] + ".1")] * 2
    rows = genes(list(map(str, range(20))), symbol=SYMBOLS)
    assert columns_that_agree(rows, own) == [("symbol", "S0"), (index, "S0")]
    assert columns_that_agree(rows, rows, column="index") == [(index, "0")] * 2
    nothing = genes(list(map(str, range(20))))
    assert columns_that_agree(nothing, nothing) == [(index, "0")] * 2  # which is refused where it matters
    assert columns_that_agree(genes(SYMBOLS[:2] + IDS[2:]), own) == [(index, "S0")] * 2  # a tenth is enough


def test_names_are_found_among_known_ones_whatever_their_version() -> None:
    assert names_as_known(genes(SYMBOLS, x=IDS), SYMBOLS[:3]).column == "var index"
    assert names_as_known(genes(SYMBOLS, x=IDS), IDS[:3]).names == tuple(IDS)
    assert names_as_known(genes(IDS), VERSIONED[:3]).names == (*VERSIONED[:3], *IDS[3:])
    assert names_as_known(genes(VERSIONED), IDS[:3]).names == tuple(IDS)
    assert names_as_known(genes(SYMBOLS, x=IDS), IDS, "index").names == tuple(SYMBOLS)


def test_an_encoder_of_ensembl_ids_knows_them_without_their_versions() -> None:
    found = match_genes(genes(VERSIONED[:6]), IDS)
    assert found.tokens.tolist() == list(range(6)) and found.names == tuple(IDS[:6])


@given(st.permutations(range(20)), st.sampled_from(["index", "versions", "numbers"]))
def test_the_same_genes_in_any_order_and_under_any_name_become_the_same_names(order: list[int], kind: str) -> None:
    ids = [(VERSIONED if kind == "versions" else IDS)[i] for i in order]
    symbols = [SYMBOLS[i] for i in order]
    index = list(map(str, range(20))) if kind == "numbers" else ids
    names = agreeing_names([genes(SYMBOLS), genes(index, name=symbols, gene_ids=ids)])
    assert list(names[0].names) == SYMBOLS and list(names[1].names) == symbols


def test_a_context_is_a_cell_type_where_no_other_column_is() -> None:
    obs = table(perturbation=["control", "X"] * 3, context=list("aaabbb"))
    assert detect_columns(obs).cell_type == "context"
    assert detect_columns(obs.assign(cell_line=list("ababab"))).cell_type == "cell_line"
