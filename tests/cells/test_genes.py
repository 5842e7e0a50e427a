"""sest/cells/genes.py: known genes are found by name, said, and never guessed by row."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sest.cells.genes import agreeing_names, all_names, gene_names, match_genes, names_as_known
from sest.errors import InputError

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


def test_words_of_any_column_and_features_that_are_no_genes_name_no_gene() -> None:
    var = pd.DataFrame(
        {
            "symbol": ["TP53", "MYC", "ACTB", "NT-1", "CD3"],
            "pathway": ["None", "None", "None", "x", "x"],
            "feature_types": ["Gene Expression", "Gene Expression", None, "CRISPR Guide Capture", "Antibody Capture"],
        },
        index=["E1", "E2", "E3", "NT-1", "CD3"],
    )
    assert all_names(var) == {"E1", "E2", "E3", "TP53", "MYC", "ACTB"}
    biotypes = var[["symbol"]].assign(feature_type=["protein_coding"] * 4 + ["lncRNA"])
    assert all_names(biotypes) == {*var.index, *var["symbol"]}
