"""What is held out where nobody said: something that can be learned, and enough to train on."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sest.cells.choose_splits import ChosenSplits, choose_splits
from sest.cells.split_file import TEST, TRAIN, VAL, read_splits
from sest.cells.splits import GroupCells, assign_splits
from sest.errors import InputError

SINGLES = [f"P{i:02}" for i in range(20)]


def group(cells: Mapping[str, Mapping[str, int]], controls: int = 5) -> GroupCells:
    """Cell type -> perturbation -> cells, with so many controls each."""
    kinds = sorted(cells)
    names = ["ctrl", *sorted({name for of in cells.values() for name in of})]
    rows = [(k, "ctrl") for k in kinds for _ in range(controls)]
    rows += [(k, name) for k in kinds for name, n in cells[k].items() for _ in range(n)]
    return GroupCells(
        "d", "d", np.array([names.index(name) for _, name in rows], np.int32), tuple(names),
        np.array([kinds.index(k) for k, _ in rows], np.int32), tuple(kinds), "ctrl",
    )  # fmt: skip


def trained(group: GroupCells, chosen: ChosenSplits, tmp_path: Path) -> dict[int, set[tuple[str, str]]]:
    """The (cell type, perturbation)s of each split, by the file that is written."""
    path = tmp_path / "splits.toml"
    path.write_text(chosen.toml("d", tmp_path / "d.h5ad"))
    mask = assign_splits([group], read_splits(path, resolve_files=False), seed=0).masks["d"]
    found: dict[int, set[tuple[str, str]]] = {}
    for bit in (TRAIN, VAL, TEST):
        rows = np.flatnonzero((mask & bit) > 0)
        pairs = {(group.cell_types[group.cell_type[i]], group.perturbations[group.perturbation[i]]) for i in rows}
        found[bit] = {pair for pair in pairs if pair[1] != "ctrl"}
    return found


def test_perturbations_of_several_cell_types_are_held_out_in_one(tmp_path: Path) -> None:
    cells = group({"a": dict.fromkeys(SINGLES, 12), "b": dict.fromkeys(SINGLES[:6], 12)})
    chosen = choose_splits(cells, ())
    found = trained(cells, chosen, tmp_path)
    held = found[TEST] | found[VAL]
    assert len(found[TEST]) == 1 and len(found[VAL]) == 1 and {kind for kind, _ in held} == {"a"}
    assert {name for _, name in held} <= set(SINGLES[:6]) and not chosen.by_genes  # the others train nowhere else
    assert {("b", name) for _, name in held} <= found[TRAIN]
    assert "other cell types train these too" in chosen.why


def test_in_one_cell_type_those_whose_targets_are_genes_are_held_out(tmp_path: Path) -> None:
    cells = group({"a": dict.fromkeys(SINGLES, 12)})
    chosen = choose_splits(cells, SINGLES[:10])
    found = trained(cells, chosen, tmp_path)
    assert (len(found[TEST]), len(found[VAL]), len(found[TRAIN])) == (2, 2, 16)
    assert {name for _, name in found[TEST] | found[VAL]} <= set(SINGLES[:10]) and chosen.by_genes
    everyone = choose_splits(cells, SINGLES)
    assert not everyone.by_genes and len(everyone.fewshot["a"][TEST]) == 4 and len(everyone.fewshot["a"][VAL]) == 5
    assert not choose_splits(cells, (), everything_known=True).by_genes


def test_a_combination_is_held_out_while_its_parts_train(tmp_path: Path) -> None:
    doubles = ["P00+P01", "P02+P03", "P04+P05", "P06+P07"]
    cells = group({"a": dict.fromkeys([*SINGLES[:8], *doubles], 12)})
    for seed in range(5):
        chosen = choose_splits(cells, (), seed=seed)
        found = trained(cells, chosen, tmp_path)
        parts = {part for _, name in found[TRAIN] for part in name.split("+")}
        held = {name for _, name in found[TEST] | found[VAL]}
        assert len(held) >= 2 and {part for name in held for part in name.split("+")} <= parts


def test_what_nothing_is_known_of_is_never_held_out() -> None:
    """As no prediction could be made of it: the refusal names what would make it known."""
    cells = group({"a": dict.fromkeys(SINGLES, 12)})
    with pytest.raises(InputError, match=r"Of 20 perturbations 0 could be .*\(P00, P01, P02 and 17 more\).*--gene-col"):
        choose_splits(cells, ())
    with pytest.raises(InputError, match="Of 20 perturbations 1 could be predicted"):
        choose_splits(cells, SINGLES[:1])


def test_where_there_is_one_perturbation_cell_types_are_held_out_whole(tmp_path: Path) -> None:
    cells = group({kind: {"P": 12} for kind in ("w", "x", "y", "z")})
    chosen = choose_splits(cells, ["P"])
    found = trained(cells, chosen, tmp_path)
    assert found == {TRAIN: {("w", "P"), ("x", "P")}, VAL: {("y", "P")}, TEST: {("z", "P")}}
    assert "z tests, y validates and w, x train" in chosen.why


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"a": {"P": 9}}, "1 perturbation in 1 cell type: too few"),
        ({"a": {"P": 9, "Q": 9}}, "2 perturbations in 1 cell type: too few"),
        ({"a": {"P": 9}, "b": {"P": 9}}, "1 perturbation in 2 cell types: too few"),
    ],
)
def test_too_little_is_refused_with_what_it_takes(cells: dict[str, dict[str, int]], said: str) -> None:
    with pytest.raises(InputError, match=said + r" .*three perturbations, or one in three cell types"):
        choose_splits(group(cells), ["P", "Q"])
    with pytest.raises(InputError, match="No cell type has control cells"):
        choose_splits(group(cells, controls=0), ())


@pytest.mark.parametrize(
    "cells",
    [
        {"a": dict.fromkeys("PQR", 4)},
        {"a": dict.fromkeys("PQ", 4), "b": dict.fromkeys("PQ", 4)},
        {"a": dict.fromkeys("PQ", 4), "b": {"P": 4}, "c": {"R": 4}},
    ],
)
def test_the_least_there_can_be_has_all_three_splits(cells: dict[str, dict[str, int]], tmp_path: Path) -> None:
    for genes in ((), ("P", "Q", "R"))[len(cells) == 1 :]:  # in one cell type nothing is known without genes
        found = trained(group(cells), choose_splits(group(cells), genes), tmp_path)
        assert all(found.values()), found
        assert not found[TEST] & found[VAL]


def test_pairs_of_few_cells_are_not_tested(tmp_path: Path) -> None:
    cells = group({"a": dict.fromkeys(SINGLES, 12) | dict.fromkeys(SINGLES[:10], 9)})
    found = trained(cells, choose_splits(cells, SINGLES), tmp_path)
    assert not {name for _, name in found[TEST] | found[VAL]} & set(SINGLES[:10])


def test_cell_types_without_controls_are_passed_over(tmp_path: Path) -> None:
    cells = group({"a": dict.fromkeys(SINGLES, 12), "b": dict.fromkeys(SINGLES[:4], 12)})
    keep = ~((cells.cell_type == 0) & (cells.perturbation == 0))

    without = replace(cells, perturbation=cells.perturbation[keep], cell_type=cells.cell_type[keep])
    assert set(choose_splits(without, SINGLES).fewshot) == {"b"}


def test_the_file_says_why_and_names_with_quotes_and_dots_survive(tmp_path: Path) -> None:
    odd = 'a"b.c'
    cells = group({odd: dict.fromkeys(["P.1", "Q\\", "R", "S"], 12)})
    chosen = choose_splits(cells, (), everything_known=True)
    text = chosen.toml("d", Path("/x/it's.h5ad"))
    assert text.startswith("# Of 4 perturbations 1 test (")
    assert tomllib.loads(text)["datasets"] == {"d": "/x/it's.h5ad"}
    assert all(trained(cells, chosen, tmp_path).values())
