"""sest/cells/labels.py: what labels are taken for; the labels of real screens, and the symbols of real genes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sest.cells.labels import (
    AS_IS,
    CONTROL,
    UNASSIGNED,
    DecidedLabels,
    NoControlError,
    decide,
    is_usual_control,
    refuse_twins_between,
    same_targets,
    targets_of,
)
from sest.errors import InputError

LABELS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)


def decided(
    *labels: str, given: tuple[str, ...] = (), genes: tuple[str, ...] = (), rule: str = "auto"
) -> DecidedLabels:
    """Labels of one cell each, or "label:cells"."""
    pairs = [label.rsplit(":", 1) if ":" in label else (label, "1") for label in labels]
    return decide({label: int(n) for label, n in pairs}, given, column="gene", rule=rule, genes=genes)


def names(*labels: str, given: tuple[str, ...] = (), genes: tuple[str, ...] = ()) -> dict[str, str | None]:
    return decided(*labels, given=given, genes=genes).names


@pytest.mark.parametrize(
    ("guides", "control"),
    [
        (["non-targeting", "non-targeting_00031", "non-targeting_00002"], "non-targeting"),
        (["NegCtrl0", "NegCtrl10", "NegCtrl0_NegCtrl0"], "NegCtrl"),  # Norman 2019's
        (["NT1", "NT2", "NT11"], "NT"),
        (["sgNTC-3", "sgNTC-4"], "sgNTC"),
        (["NO"], None),
        (["non-targeting", "NegCtrl4"], "non-targeting"),
        (["ctrl", "ctrl+ctrl"], "ctrl"),
        (["Scramble sgRNA 1", "Scramble sgRNA 2"], "Scramble sgRNA"),
        (["DMSO", "DMSO_0.0uM"], None),  # two kinds of names for controls: which is not said
        (["[('DMSO_TF', 0.0, 'uM')]"], "[('DMSO_TF', 0.0, 'uM')]"),
    ],
)
def test_controls_and_their_guides_are_one(guides: list[str], control: str | None) -> None:
    if control is None:
        with pytest.raises(InputError):
            decided(*guides, "STAT1")
        return
    found = decided(*guides, "STAT1", "JAK2")
    assert found.control == control
    assert found.names == {**dict.fromkeys(guides, control), "STAT1": "STAT1", "JAK2": "JAK2"}


def test_what_is_pooled_merged_and_dropped_is_said_with_counts() -> None:
    found = decided("ctrl:9", "ctrl_1:2", "A+ctrl:3", "ctrl+A:4", "B+C:1", "C+B:2", "None:5", "multiplet:1", "D:1")
    assert found.names == {
        "ctrl": "ctrl",
        "ctrl_1": "ctrl",
        "A+ctrl": "A",
        "ctrl+A": "A",
        "B+C": "C+B",  # the spelling of most cells
        "C+B": "C+B",
        "D": "D",
        "None": None,
        "multiplet": None,
    }
    assert found.notes(detected=True) == [
        "The control is 'ctrl' (11 of 28 cells).",
        "Taken for the control too: 2 cells of 1 labels: 'ctrl_1' (2).",
        "A perturbation is a set of targets: 'ctrl+A' is 'A', 'A+ctrl' is 'A', 'B+C' is 'C+B'.",
        "6 of 28 cells are left out, as no perturbation is known: 'None' (5), 'multiplet' (1). "
        "--labels as-is takes every label as it stands.",
    ]
    assert decided("ctrl:9", "A:3").notes(detected=False) == []


def test_cells_without_a_label_are_left_out_and_refused_as_they_stand() -> None:
    found = decide({"": 3, "ctrl": 2, "A": 4}, (), column="gene")
    assert found.names[""] is None and found.n_unassigned == 3 and [d.label for d in found.of(UNASSIGNED)] == [""]
    with pytest.raises(InputError, match="no label for 3 of 9 cells"):
        decide({"": 3, "ctrl": 2, "A": 4}, (), column="gene", rule=AS_IS)


@pytest.mark.parametrize("given", [(), ("nan",)])
def test_where_no_label_is_the_controls_cells_without_a_label_are_counted(given: tuple[str, ...]) -> None:
    with pytest.raises(NoControlError, match="3 cells have no label: give them one if they are the controls, or pass"):
        decide({"": 3, "A": 4}, given, column="gene")
    with pytest.raises(NoControlError, match=r"'A' \(4\)\. Pass --control\.$"):
        decide({"A": 4}, (), column="gene")


def test_as_is_takes_every_label_for_itself() -> None:
    labels = ["ctrl", "ctrl_1", "A+ctrl", "ctrl+A", "None", "a", "A ", "A"]
    assert decided(*labels, rule=AS_IS).names == {label: label for label in labels}
    with pytest.raises(InputError, match="Pass one --control"):
        decided(*labels, given=("ctrl", "ctrl_1"), rule=AS_IS)


@pytest.mark.parametrize(
    ("labels", "pair"),
    [
        (("A", "A "), "'A' and 'A '"),
        (("Stat1", "STAT1"), "'STAT1' and 'Stat1'"),
        (("A+B", "b+a"), "'A+B' and 'b+a'"),
        (("STAT1", "Stat1+ctrl"), "'STAT1' and 'Stat1'"),
    ],
)
def test_labels_that_differ_in_case_or_spaces_alone_are_refused(labels: tuple[str, ...], pair: str) -> None:
    with pytest.raises(InputError, match="differ in case or spaces alone") as error:
        decided("ctrl", *labels)
    first, second = pair.split(" and ")
    assert first in str(error.value) and second in str(error.value) and "--labels as-is" in str(error.value)


def test_perturbations_of_two_files_that_differ_in_case_alone_are_refused_and_an_order_is_no_difference() -> None:
    refuse_twins_between({"one": ["A+B", "C"], "two": ["B+A", "C", "D"]})
    with pytest.raises(InputError) as error:
        refuse_twins_between({"one": ["A+B", "C"], "two": ["b+A", "C"], "three": ["c"]})
    assert str(error.value).startswith(
        "Perturbations of several files that differ in case or spaces alone (2): 'A+B' (one) and 'A+b' (two); "
        "'C' (one) and 'c' (three). Make them one"
    )


def test_a_space_around_a_label_that_has_no_twin_is_no_part_of_it() -> None:
    assert names("ctrl", "A ", "B") == {"ctrl": "ctrl", "A ": "A", "B": "B"}


def test_several_controls_and_patterns_are_one_control() -> None:
    labels = ("DMSO", "untreated", "mock 1", "mock 2", "A")
    with pytest.raises(InputError, match=r"Several labels .* Choose with --control, which may be given several times"):
        decided(*labels)
    found = decided(*labels, given=("DMSO", "mock*", "absent"))
    assert found.names == {"DMSO": "DMSO", "untreated": "untreated", "mock 1": "DMSO", "mock 2": "DMSO", "A": "A"}
    assert found.notes(detected=False)[0] == "No cell has the label 'absent', given as control."
    assert decided(*labels, given=("mock*",)).control == "mock"
    assert decided("ctrl:1", "ctrlX:9", "A", given=("ctr*",)).control == "ctrl"  # a usual name before a stem
    assert decided("x[1]", "A", given=("x[1]",)).control == "x[1]"  # a label before a pattern
    with pytest.raises(NoControlError, match=r"no cell has the label 'DMS'. Did you mean 'DMSO'"):
        decided(*labels, given=("DMS",))


def test_a_given_control_has_its_own_guides_and_no_others() -> None:
    labels = ("PBS", "PBS_1", "PBSX", "NT-3", "NT1")
    assert decided(*labels, given=("PBS",)).names == {
        "PBS": "PBS", "PBS_1": "PBS", "PBSX": "PBSX", "NT-3": "NT-3", "NT1": "NT1",
    }  # fmt: skip
    assert names("NT1", "NT11", given=("NT1",)) == {"NT1": "NT1", "NT11": "NT11"}  # a guide, not a stem


@pytest.mark.parametrize(
    ("labels", "given", "targets"),
    [
        (("NT", "TP53+NT-3"), (), {"TP53+NT-3": "TP53"}),
        (("NT-1", "NT-2", "NT-3+TP53", "TP53"), (), {"NT-3+TP53": "TP53"}),
        (("NT-1+NT-2", "TP53+NT-1", "NT-3+A"), (), {"TP53+NT-1": "TP53", "NT-3+A": "A"}),
        (("NT-1+NT-1", "TP53+NT-1"), (), {"TP53+NT-1": "TP53"}),
        (("non-targeting", "NegCtrl0+TP53", "A+NegCtrl1+B"), (), {"NegCtrl0+TP53": "TP53", "A+NegCtrl1+B": "A+B"}),
        (("non-targeting", "NegCtrl0+TP53"), ("non-targeting",), {"NegCtrl0+TP53": "TP53"}),
        (("PBS", "TP53+PBS_2"), ("PBS",), {"TP53+PBS_2": "TP53"}),
        (("NT-1", "NT-2", "NT-1+TP53"), ("NT-*",), {"NT-1+TP53": "TP53"}),
        (("safe_a", "safe_b+A"), ("safe_*",), {"safe_b+A": "A"}),
        (("ctrl", "IL-6+NT-3", "NT-3"), (), {"IL-6+NT-3": "IL-6+NT-3", "NT-3": "NT-3"}),  # one: a ligand
        (("ctrl", "IL-6+NT-3", "NT-3"), ("ctrl",), {"IL-6+NT-3": "IL-6+NT-3", "NT-3": "NT-3"}),
        (("DMSO", "NT-1+A", "NT-2+A"), (), {"NT-1+A": "NT-1+A", "NT-2+A": "NT-2+A"}),  # of another control
    ],
)
def test_a_guide_of_the_control_beside_a_target_is_no_target(
    labels: tuple[str, ...], given: tuple[str, ...], targets: dict[str, str]
) -> None:
    found = names(*labels, given=given)
    assert {label: found[label] for label in targets} == targets
    assert all(d.name not in targets.values() for d in decided(*labels, given=given).of(CONTROL))


def test_a_measured_gene_beside_a_target_is_no_guide() -> None:
    assert names("NT", "A+NT3", "A", genes=("A", "NT3"))["A+NT3"] == "A+NT3"


def test_a_pattern_of_controls_that_takes_measured_genes_is_refused() -> None:
    labels, genes = ("NT-1", "NT-2", "NT-31", "NTRK1", "NT5E+NT-1", "A"), ("NTRK1", "NT5E", "A")
    with pytest.raises(InputError) as error:
        decided(*labels, given=("NT*",), genes=genes)
    assert str(error.value) == (
        "--control 'NT*' also takes measured genes for controls: 'NTRK1', 'NT5E+NT-1'. "
        "Give the controls alone: --control 'NT-*'."
    )
    found = names(*labels, given=("NT-*",), genes=genes)
    assert found["NTRK1"] == "NTRK1" and found["NT5E+NT-1"] == "NT5E" and found["NT-31"] == "NT"
    with pytest.raises(InputError, match=r"alone: --control 'NT1' --control 'NT2'\.$"):
        decided("NT1", "NT2", "NT5E", given=("NT*",), genes=genes)
    assert names("NT5E", "NT5E2", given=("NT5E",), genes=("NT5E", "NT5E2"))["NT5E2"] == "NT5E2"  # a name, no pattern
    assert [d.label for d in decided("NT1", "NTX", "A", given=("NT*",), genes=("A",)).of(CONTROL)] == ["NT1", "NTX"]


def test_genes_are_never_guides_or_controls() -> None:
    assert names("ctrl", "NT1", "NT2", genes=("NT1", "NT2")) == {"ctrl": "ctrl", "NT1": "NT1", "NT2": "NT2"}
    assert decided("non-targeting", "CTRL", "A+CTRL", genes=("CTRL", "A")).names["A+CTRL"] == "A+CTRL"
    assert names("ctrl", "NT-3", "IL-6") == {"ctrl": "ctrl", "NT-3": "NT-3", "IL-6": "IL-6"}  # a ligand


def test_no_symbol_of_the_challenge_is_a_control_or_unassigned(shared_data: Path) -> None:
    genes = (shared_data / "vcc" / "gene_names.csv").read_text().split()
    assert len(genes) == 18_080
    found = decide({"non-targeting": 5, **dict.fromkeys(genes, 1)}, (), column="gene", genes=genes)
    assert {label: name for label, name in found.names.items() if label != name} == {}
    assert [gene for gene in genes if is_usual_control(gene)] == ["CTRL"]  # asked about where it is not measured
    others = [gene for gene in genes if gene != "CTRL"]
    assert decide(dict.fromkeys(["non-targeting", *others], 1), (), column="gene").names == {
        name: name for name in ("non-targeting", *others)
    }


def test_pairs_with_an_underscore_are_sets_where_a_control_stands_beside_single_targets() -> None:
    found = names("NegCtrl0_NegCtrl0", "AHR_NegCtrl0", "NegCtrl0_FEV", "AHR_FEV", "a_b_c", "X_Y")
    assert found["AHR_NegCtrl0"] == "AHR" and found["NegCtrl0_FEV"] == "FEV" and found["AHR_FEV"] == "AHR+FEV"
    assert found["a_b_c"] == "a_b_c" and found["X_Y"] == "X_Y" and found["NegCtrl0_NegCtrl0"] == "NegCtrl0_NegCtrl0"
    assert names("ctrl", "AHR_FEV", "AHR")["AHR_FEV"] == "AHR_FEV"


def test_drugs_and_doses_are_never_split() -> None:
    label = "[('Trametinib', 0.05, 'uM'), ('(+)-JQ1', 1.0, 'uM')]"
    assert targets_of(label) == (label,) and targets_of("(+)-JQ1") == ("(+)-JQ1",) and targets_of("A+") == ("A+",)
    control = "[('DMSO_TF', 0.0, 'uM')]"
    assert names(control, label) == {control: control, label: label}


def test_sets_are_found_whatever_their_order() -> None:
    assert same_targets(["B+A", "A+ctrl", "C", "A+B"], ["A+B", "A", "X+Y"]) == {
        "B+A": "A+B", "A+ctrl": "A", "C": "C", "A+B": "A+B",
    }  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(LABELS, min_size=1, max_size=8, unique=True))
def test_names_are_names_of_themselves(labels: list[str]) -> None:
    """What was decided once, as in a prediction of a cache, stays."""
    try:
        found = decide(dict.fromkeys(["non-targeting", *labels], 2), (), column="gene")
    except InputError:
        return
    kept = {name for name in found.names.values() if name is not None}
    again = decide(dict.fromkeys(sorted(kept), 1), (found.control,), column="gene")
    assert again.names == {name: name for name in kept}


@given(st.lists(st.sampled_from(["A", "B", "HLA-A", "T.1"]), min_size=1, max_size=4, unique=True), st.randoms())
def test_the_order_of_targets_and_controls_among_them_are_nothing(parts: list[str], random: object) -> None:
    other = [*parts, "ctrl"]
    random.shuffle(other)  # type: ignore[attr-defined]
    found = names("ctrl", "+".join(parts), "+".join(other))
    assert len(set(found.values())) == 2 and all(d.name for d in decided("ctrl", "+".join(other)).of(CONTROL))
