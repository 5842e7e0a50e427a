"""Which cell a splits file puts where, and what is held out without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sest.cells.split_file import TEST, TRAIN, VAL, SplitFile, read_splits
from sest.cells.splits import GroupCells, SplitRow, Splits, assign_splits, group_cells, split_table
from sest.errors import InputError


def _group(path: str, cells: Sequence[tuple[str, str]], control: str = "ctrl") -> GroupCells:
    """One group from its cells, written as (cell type, perturbation); the dataset is the path's first part.

    Codes are int8 as pandas makes them, and there is one category of each kind that no cell has.
    """
    cell_types = (*sorted({cell_type for cell_type, _ in cells}), "unused type")
    perturbations = (*sorted({name for _, name in cells}), "unused perturbation")
    return GroupCells(
        path=path,
        dataset=path.split("/")[0],
        perturbation=np.array([perturbations.index(name) for _, name in cells], dtype=np.int8),
        perturbations=perturbations,
        cell_type=np.array([cell_types.index(cell_type) for cell_type, _ in cells], dtype=np.int8),
        cell_types=cell_types,
        control=control,
    )


def _cells(text: str) -> list[tuple[str, str]]:
    """Read "rpe1: ctrl A A; k562: ctrl B" as (cell type, perturbation) pairs."""
    pairs = [part.split(":") for part in text.split(";")]
    return [(cell_type.strip(), name) for cell_type, names in pairs for name in names.split()]


def _file(
    training: str = "d",
    zeroshot: dict[tuple[str, str], int] | None = None,
    fewshot: dict[tuple[str, str], tuple[str, str]] | None = None,
    datasets: str = "",
) -> SplitFile:
    """A splits file without files; `fewshot` values are val and test names separated by spaces."""
    lists = {key: {VAL: tuple(val.split()), TEST: tuple(test.split())} for key, (val, test) in (fewshot or {}).items()}
    contexts = [*(zeroshot or {}), *lists]
    declared = {*training.split(), *datasets.split(), *(dataset for dataset, _ in contexts)}
    return SplitFile(
        path=Path("s.toml"),
        datasets=dict.fromkeys(sorted(declared), ()),
        training=frozenset(training.split()),
        zeroshot=zeroshot or {},
        fewshot=lists,
        sha256="",
    )


def test_the_labels_of_a_group_are_those_of_its_table() -> None:
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(["A", "ctrl", None, "A"], categories=["A", "B", "ctrl"]),
            "cell_type": pd.Categorical(["x", "y", "x", "y"]),
        }
    )
    group = group_cells("d/1", "d", obs, "ctrl")
    assert group.perturbation.tolist() == [0, 2, -1, 0] and group.perturbations == ("A", "B", "ctrl")
    assert group.cell_type.tolist() == [0, 1, 0, 1] and group.cell_types == ("x", "y")
    assert (group.path, group.dataset, group.control) == ("d/1", "d", "ctrl")


def test_zeroshot_context_goes_to_its_split_and_its_controls_also_train() -> None:
    group = _group("d/1", _cells("x: ctrl A B; y: ctrl A B; z: ctrl A"))
    result = assign_splits([group], _file(zeroshot={("d", "y"): TEST, ("d", "z"): VAL}), seed=0)
    T = TRAIN
    assert result.masks["d/1"].tolist() == [T, T, T, TEST | T, TEST, TEST, VAL | T, VAL]
    assert result.masks["d/1"].dtype == np.uint8
    assert result.notes == ()


def test_zeroshot_controls_of_a_dataset_that_does_not_train_stay_in_their_split() -> None:
    train = _group("d/1", _cells("x: ctrl A B"))
    other = _group("e/1", _cells("y: ctrl A; z: ctrl A A"))
    file = _file(zeroshot={("e", "y"): VAL})
    result = assign_splits([train, other], file, seed=0)
    assert result.masks["e/1"].tolist() == [VAL, VAL, 0, 0, 0]
    assert result.notes == ("'e' is not in [training]: its cell types z (3 cells) are not used.",)


def test_fewshot_moves_the_listed_perturbations_and_controls_serve_every_split() -> None:
    group = _group("d/1", _cells("x: ctrl A B C A D; y: ctrl A"))
    result = assign_splits([group], _file(fewshot={("d", "x"): ("A", "B C")}), seed=0)
    assert result.masks["d/1"].tolist() == [7, VAL, TEST, TEST, VAL, TRAIN, TRAIN, TRAIN]
    only_val = assign_splits([group], _file(fewshot={("d", "x"): ("A", "")}), seed=0)
    assert only_val.masks["d/1"].tolist() == [TRAIN | VAL, VAL, TRAIN, TRAIN, VAL, TRAIN, TRAIN, TRAIN]


def test_fewshot_context_of_a_dataset_that_does_not_train_trains_on_the_rest() -> None:
    groups = [_group("d/1", _cells("x: ctrl A")), _group("e/1", _cells("x: ctrl A B; y: ctrl A"))]
    result = assign_splits(groups, _file(fewshot={("e", "x"): ("A", "")}), seed=0)
    assert result.masks["e/1"].tolist() == [TRAIN | VAL, VAL, TRAIN, 0, 0]


def test_zeroshot_wins_over_fewshot_with_a_note() -> None:
    group = _group("d/1", _cells("x: ctrl A B; y: ctrl A"))
    file = _file(zeroshot={("d", "x"): VAL}, fewshot={("d", "x"): ("", "A")})
    result = assign_splits([group], file, seed=0)
    assert result.masks["d/1"].tolist() == [VAL | TRAIN, VAL, VAL, TRAIN, TRAIN]
    assert result.notes == ("'d.x' is in [zeroshot] and in [fewshot]: zeroshot wins, its fewshot lists are not used.",)


def test_a_context_spread_over_groups_follows_one_rule() -> None:
    groups = [_group("d/1", _cells("x: ctrl A")), _group("d/2", _cells("x: ctrl B; y: ctrl A"))]
    result = assign_splits(groups, _file(fewshot={("d", "x"): ("A", "B")}), seed=0)
    assert result.masks["d/1"].tolist() == [7, VAL]
    assert result.masks["d/2"].tolist() == [7, TEST, TRAIN, TRAIN]


def test_dataset_of_the_cache_that_the_file_does_not_name_is_unused_with_a_note() -> None:
    groups = [_group("d/1", _cells("x: ctrl A; y: ctrl A")), _group("new/1", _cells("x: ctrl A A"))]
    result = assign_splits(groups, _file(zeroshot={("d", "y"): VAL}), seed=0)
    assert result.masks["new/1"].tolist() == [0, 0, 0]
    assert result.notes == ("Dataset 'new' is not in s.toml: its 3 cells are not used.",)


def test_cells_without_a_label_are_unused_with_a_note() -> None:
    group = _group("d/1", _cells("x: ctrl A A B; y: ctrl A"))
    group.perturbation[1] = -1
    group.cell_type[3] = -1
    result = assign_splits([group], _file(zeroshot={("d", "y"): VAL}), seed=0)
    assert result.masks["d/1"].tolist() == [TRAIN, 0, TRAIN, 0, VAL | TRAIN, VAL]
    assert result.notes == ("2 cells of 'd/1' have no perturbation or no cell type: not used.",)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (_file("d dd"), ["not in the cache: dd", "The cache has d"]),
        (_file("d", zeroshot={("other", "x"): VAL}), ["not in the cache: other"]),
        (_file("d", fewshot={("other", "x"): ("A", "")}), ["not in the cache: other"]),
        (_file("d", zeroshot={("d", "jurkta"): VAL}), ["no cell type 'jurkta'", "jurkat, rpe1", "mean 'jurkat'?"]),
        (_file("d", fewshot={("d", "RPE1"): ("AARS", "")}), ["no cell type 'RPE1'", "Did you mean 'rpe1'?"]),
        (_file("d", zeroshot={("d", "unused type"): VAL}), ["no cell type 'unused type'"]),
        (
            _file("d", fewshot={("d", "rpe1"): ("AASR", "")}),
            ["without cells there: AASR", "has AARS, NUP107.", "mean 'AARS'?"],
        ),
        (_file("d", fewshot={("d", "jurkat"): ("", "NUP107")}), ["without cells there: NUP107", "has AARS"]),
        (_file("d", fewshot={("d", "rpe1"): ("unused perturbation", "")}), ["without cells there"]),
        (_file("d", fewshot={("d", "rpe1"): ("", "AARS ctrl")}), ["lists the control 'ctrl'", "every split"]),
    ],
)
def test_names_the_cache_does_not_have_are_errors_with_the_nearest(file: SplitFile, words: list[str]) -> None:
    group = _group("d/1", _cells("rpe1: ctrl AARS NUP107; jurkat: ctrl AARS"))
    with pytest.raises(InputError) as caught:
        assign_splits([group], file, seed=0)
    assert "s.toml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("file", [_file(zeroshot={("d", "y"): TEST}), _file(fewshot={("d", "y"): ("A", "")})])
def test_a_test_or_val_context_without_controls_in_its_group_is_refused(file: SplitFile) -> None:
    # The controls of d/1 do not help: a set's controls come from its own file.
    groups = [_group("d/1", _cells("x: ctrl A B; y: ctrl B")), _group("d/2", _cells("y: A B"))]
    with pytest.raises(InputError, match=r"'d\.y' has no controls \('ctrl'\) in 'd/2', so it cannot be in (test|val)"):
        assign_splits(groups, file, seed=0)


def test_training_cells_without_controls_are_unused_with_a_note() -> None:
    groups = [_group("d/1", _cells("x: ctrl A B; z: ctrl A")), _group("d/2", _cells("x: A B B"))]
    result = assign_splits(groups, _file(zeroshot={("d", "z"): VAL}), seed=0)
    assert result.masks["d/2"].tolist() == [0, 0, 0]
    assert result.notes == ("'d.x' has no controls ('ctrl') in 'd/2': its 3 training cells are not used.",)


def test_each_group_has_its_own_control_label() -> None:
    groups = [
        _group("d/1", _cells("x: ctrl A; y: ctrl A")),
        _group("e/1", _cells("x: non-targeting A ctrl"), control="non-targeting"),
    ]
    result = assign_splits(groups, _file("d", zeroshot={("e", "x"): TEST, ("d", "y"): VAL}), seed=0)
    assert result.masks["e/1"].tolist() == [TEST, TEST, TEST]
    assert result.masks["d/1"].tolist() == [TRAIN, TRAIN, VAL | TRAIN, VAL]


def test_zeroshot_context_of_controls_only_is_noted_and_is_no_validation_split() -> None:
    group = _group("d/1", _cells("x: ctrl A B; y: ctrl ctrl"))
    result = assign_splits([group], _file(zeroshot={("d", "y"): VAL}), seed=0)
    assert result.notes[0] == "'d.y' has no perturbed cells: it adds nothing to val."
    assert result.notes[1].startswith("No validation split: held out 1 of 2 training perturbations (")


# ---- holding out


def _many(n: int, cell_types: Sequence[str] = ("x", "y")) -> list[tuple[str, str]]:
    names = ["ctrl"] + [f"P{i:03d}" for i in range(n)]
    return [(cell_type, name) for cell_type in cell_types for name in names for _ in range(2)]


def test_without_a_file_everything_trains_except_a_seeded_share_of_perturbations() -> None:
    result = assign_splits([_group("d/1", _many(57))], None, seed=0)
    (note,) = result.notes
    assert note.startswith("No validation split: held out 3 of 57 training perturbations (P")
    assert note.endswith("), seed 0.")
    held = note[note.index("(") + 1 : note.index(")")].split(", ")
    assert held == sorted(held)
    for (_, name), mask in zip(_many(57), result.masks["d/1"].tolist(), strict=True):
        assert mask == (TRAIN | VAL if name == "ctrl" else VAL if name in held else TRAIN)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"), [(2, 0.05, 1), (10, 0.05, 1), (57, 0.05, 3), (100, 0.05, 5), (3, 0.99, 2)]
)
def test_held_out_share_is_rounded_at_least_one_and_never_all(n: int, fraction: float, expected: int) -> None:
    group = _group("d/1", _many(n))
    rows = split_table([group], assign_splits([group], None, seed=3, val_fraction=fraction))
    assert {row.split: row.n_perturbations for row in rows} == {"train": n - expected, "val": expected}


def test_held_out_perturbations_leave_training_in_every_context_and_test_stays_as_it_is() -> None:
    groups = [_group("d/1", _many(20)), _group("d/2", _many(20, ("y", "z"))), _group("e/1", _many(20, ("x", "w")))]
    file = _file("d e", zeroshot={("d", "z"): TEST}, fewshot={("e", "w"): ("", "P003 P004")})
    result = assign_splits(groups, file, seed=1, val_fraction=0.2)
    note = result.notes[-1]
    held = set(note[note.index("(") + 1 : note.index(")")].split(", "))
    assert len(held) == 4
    for path, cells in (("d/1", _many(20)), ("d/2", _many(20, ("y", "z"))), ("e/1", _many(20, ("x", "w")))):
        for (cell_type, name), mask in zip(cells, result.masks[path].tolist(), strict=True):
            listed = path == "e/1" and cell_type == "w" and name in ("P003", "P004")
            if name != "ctrl":
                assert mask == (TEST if listed or cell_type == "z" else VAL if name in held else TRAIN)
            elif cell_type == "z":
                assert mask == TEST | TRAIN
            else:
                assert mask == (TRAIN | VAL | TEST if cell_type == "w" else TRAIN | VAL)


def test_only_contexts_with_held_out_cells_lend_their_controls_to_val() -> None:
    group = _group("d/1", _cells("x: ctrl A; y: ctrl B"))
    masks = assign_splits([group], None, seed=0).masks["d/1"].tolist()
    assert masks in ([TRAIN | VAL, VAL, TRAIN, TRAIN], [TRAIN, TRAIN, TRAIN | VAL, VAL])


def test_seeds_choose_and_the_order_of_groups_does_not() -> None:
    groups = [_group("d/1", _many(40)), _group("d/2", _many(60)), _group("e/1", _many(30))]
    for group in groups:
        group.cell_type[0] = -1  # one note each
    first = assign_splits(groups, None, seed=5)
    again = assign_splits(groups[::-1], None, seed=5)
    assert first.notes == again.notes
    assert list(again.masks) == ["e/1", "d/2", "d/1"]
    for path, mask in first.masks.items():
        np.testing.assert_array_equal(mask, again.masks[path])
    masks = {assign_splits(groups, None, seed=seed).masks["d/2"].tobytes() for seed in range(8)}
    assert len(masks) == 8  # of 34,220 choices of 3 from 60


def test_a_single_training_perturbation_cannot_be_held_out() -> None:
    with pytest.raises(InputError, match=r"one training perturbation \('A'\).*Name a val split"):
        assign_splits([_group("d/1", _cells("x: ctrl A A; y: ctrl A"))], None, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_val_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(InputError, match="val_fraction must be between 0 and 1"):
        assign_splits([_group("d/1", _many(5))], None, seed=0, val_fraction=fraction)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ([], None),
        ([_group("d/1", _cells("x: ctrl ctrl"))], None),
        ([_group("d/1", _cells("x: ctrl A"), control="wrong label")], None),
        ([_group("d/1", _cells("x: ctrl A"))], _file(zeroshot={("d", "x"): VAL})),
    ],
)
def test_nothing_left_to_train_on_is_an_error(groups: list[GroupCells], file: SplitFile | None) -> None:
    with pytest.raises(InputError, match="No perturbed cells are left for training"):
        assign_splits(groups, file, seed=0)


# ---- the table


def test_split_table_counts_contexts_over_their_groups() -> None:
    groups = [
        _group("d/1", _cells("x: ctrl ctrl A A B; y: ctrl A")),
        _group("d/2", _cells("x: ctrl B C; y: ctrl A A")),
        _group("e/1", _cells("x: ctrl A")),
    ]
    file = _file(zeroshot={("d", "y"): TEST}, fewshot={("d", "x"): ("B", "")}, datasets="e")
    assert split_table(groups, assign_splits(groups, file, seed=0)) == [
        SplitRow("d", "x", "train", n_perturbations=2, n_perturbed_cells=3, n_controls=3),
        SplitRow("d", "x", "val", n_perturbations=1, n_perturbed_cells=2, n_controls=3),
        SplitRow("d", "y", "train", n_perturbations=0, n_perturbed_cells=0, n_controls=2),
        SplitRow("d", "y", "test", n_perturbations=1, n_perturbed_cells=3, n_controls=2),
    ]


# ---- any groups, any file

NAMES = ["A", "B", "C", "D"]
CELL_TYPES = ["x", "y", "z"]


@st.composite
def _groups_and_file(draw: st.DrawFn) -> tuple[list[GroupCells], SplitFile, dict[str, list[tuple[str, str]]]]:
    """Up to four groups of two datasets, and a file whose every name has cells (so that only the rules are tested).

    Most contexts get a control in every group, as the others are mostly refused.
    """
    cell = st.tuples(st.sampled_from(CELL_TYPES), st.sampled_from(["ctrl", *NAMES]))
    cells = {
        path: draw(st.lists(cell, min_size=4, max_size=30))
        for path in draw(st.sets(st.sampled_from(["d/1", "d/2", "e/1", "e/2"]), min_size=1))
    }
    for pairs in cells.values():
        present = sorted({cell_type for cell_type, _ in pairs})
        pairs += [(cell_type, "ctrl") for cell_type in present if draw(st.integers(0, 19)) > 0]
    contexts: dict[tuple[str, str], set[str]] = {}
    for path, pairs in sorted(cells.items()):
        for cell_type, name in pairs:
            contexts.setdefault((path[0], cell_type), set()).update({name} - {"ctrl"})
    zeroshot: dict[tuple[str, str], int] = {}
    fewshot: dict[tuple[str, str], tuple[str, str]] = {}
    for context, names in sorted(contexts.items()):
        kind = draw(st.sampled_from(["plain", "plain", "zeroshot", "fewshot", "both"]))
        if kind in ("zeroshot", "both"):
            zeroshot[context] = draw(st.sampled_from([VAL, TEST]))
        if kind in ("fewshot", "both"):
            order = draw(st.permutations(sorted(names)))
            cut = sorted(draw(st.tuples(st.integers(0, len(order)), st.integers(0, len(order)))))
            fewshot[context] = (" ".join(order[: cut[0]]), " ".join(order[cut[0] : cut[1]]))
    datasets = sorted({path[0] for path in cells})
    training = draw(st.sets(st.sampled_from(datasets), min_size=1))
    groups = [_group(path, pairs) for path, pairs in cells.items()]
    return groups, _file(" ".join(sorted(training)), zeroshot, fewshot, "d e"), cells


def _rule(file: SplitFile, dataset: str, cell_type: str, name: str) -> int:
    """The rules of docs/design.md for one cell, before any holding out: the slow second implementation."""
    context = (dataset, cell_type)
    if context in file.zeroshot:
        also = TRAIN if name == "ctrl" and dataset in file.training else 0
        return file.zeroshot[context] | also
    if context in file.fewshot:
        lists = file.fewshot[context]
        if name == "ctrl":
            return TRAIN | sum(bit for bit in (VAL, TEST) if lists[bit])
        return next((bit for bit in (VAL, TEST) if name in lists[bit]), TRAIN)
    return TRAIN if dataset in file.training else 0


def _assigned(groups: list[GroupCells], file: SplitFile, seed: int) -> Splits | None:
    """Return the splits, or None where random cells lack controls or anything to train or validate on."""
    try:
        return assign_splits(groups, file, seed=seed)
    except InputError as error:
        if any(words in str(error) for words in ("has no controls", "No perturbed cells", "one training perturbation")):
            return None
        raise


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_groups_and_file(), st.integers(0, 3))
def test_no_perturbed_cell_is_in_two_splits_whatever_the_file(
    drawn: tuple[list[GroupCells], SplitFile, dict[str, list[tuple[str, str]]]], seed: int
) -> None:
    groups, file, cells = drawn
    result = _assigned(groups, file, seed)
    if result is None:
        return
    held_out = any(note.startswith("No validation split") for note in result.notes)
    names_in: dict[int, set[str]] = {TRAIN: set(), VAL: set()}
    n_train = n_val = 0
    for path, pairs in cells.items():
        masks = result.masks[path].tolist()
        by_context: dict[str, int] = {}
        for (cell_type, name), mask in zip(pairs, masks, strict=True):
            if name == "ctrl":
                by_context[cell_type] = by_context.get(cell_type, 0) | mask
        for (cell_type, name), mask in zip(pairs, masks, strict=True):
            expected = _rule(file, path[0], cell_type, name)
            if name == "ctrl":
                assert mask & ~VAL == expected & ~VAL or mask == 0
                continue
            assert mask in (0, TRAIN, VAL, TEST)
            assert mask & by_context.get(cell_type, 0) == mask  # its controls serve its split
            if cell_type not in by_context:
                assert mask == 0  # nothing to pair it with
            else:
                assert mask == expected or (held_out and (expected, mask) == (TRAIN, VAL))
            if (path[0], cell_type) in file.fewshot and (path[0], cell_type) not in file.zeroshot:
                listed = {listed for names in file.fewshot[path[0], cell_type].values() for listed in names}
                assert not (name in listed and mask == TRAIN)
            n_train += mask == TRAIN
            n_val += mask == VAL
            if mask in names_in:
                names_in[mask].add(name)
    assert n_train > 0
    assert n_val > 0
    if held_out:
        assert not names_in[TRAIN] & names_in[VAL]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_groups_and_file(), st.integers(0, 3))
def test_split_table_adds_up_to_the_masks(
    drawn: tuple[list[GroupCells], SplitFile, dict[str, list[tuple[str, str]]]], seed: int
) -> None:
    groups, file, cells = drawn
    result = _assigned(groups, file, seed)
    if result is None:
        return
    rows = split_table(groups, result)
    for word, bit in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        chosen = [
            (path, cell) for path in cells for cell, m in zip(cells[path], result.masks[path], strict=True) if m & bit
        ]
        assert sum(row.n_controls for row in rows if row.split == word) == sum(c[1] == "ctrl" for _, c in chosen)
        assert sum(row.n_perturbed_cells for row in rows if row.split == word) == sum(c[1] != "ctrl" for _, c in chosen)
        contexts = {(path[0], c[0], c[1]) for path, c in chosen if c[1] != "ctrl"}
        assert sum(row.n_perturbations for row in rows if row.split == word) == len(contexts)


# ---- real cells


def test_real_contexts_split_as_the_file_says(shared_data: Path, tmp_path: Path) -> None:
    """5,961 cells of Norman 2019 and McFaline-Figueroa 2023; the numbers are value_counts of obs."""
    anndata = pytest.importorskip("anndata")
    obs = anndata.read_h5ad(shared_data / "perturbench_devel.h5ad", backed="r").obs
    group = GroupCells(
        path="devel/perturbench_devel",
        dataset="devel",
        perturbation=obs["target_gene"].cat.codes.to_numpy(),
        perturbations=tuple(obs["target_gene"].cat.categories),
        cell_type=obs["cell_type"].cat.codes.to_numpy(),
        cell_types=tuple(obs["cell_type"].cat.categories),
        control="control",
    )
    listed = sorted(set(obs.loc[obs["cell_type"] == "A172", "target_gene"]) - {"control"})[:2]
    path = tmp_path / "splits.toml"
    path.write_text(
        f'[datasets]\ndevel = "perturbench_devel.h5ad"\n[training]\ndevel = "train"\n'
        f'[zeroshot]\n"devel.T98G" = "test"\n[fewshot."devel.A172"]\nval = {listed}\n',
    )
    file = read_splits(path, roots=(shared_data,), resolve_files=False)
    rows = {(r.cell_type, r.split): r for r in split_table([group], assign_splits([group], file, seed=0))}
    is_control = obs["target_gene"] == "control"
    for cell_type in group.cell_types:
        of_type = obs["cell_type"] == cell_type
        n_perturbed, n_controls = int((of_type & ~is_control).sum()), int((of_type & is_control).sum())
        used = [row for (name, _), row in rows.items() if name == cell_type]
        assert sum(row.n_perturbed_cells for row in used) == n_perturbed
        assert {row.n_controls for row in used} == {n_controls}
    in_a172 = (obs["cell_type"] == "A172") & obs["target_gene"].isin(listed)
    assert rows["A172", "val"].n_perturbed_cells == int(in_a172.sum())
    assert set(rows) == {
        ("A172", "train"),
        ("A172", "val"),
        ("T98G", "train"),
        ("T98G", "test"),
        ("U87MG", "train"),
        ("k562", "train"),
    }


# ---- holding out in one context


def test_held_out_in_one_context_a_perturbation_trains_in_its_others() -> None:
    cells = [*_many(20), ("z", "only"), ("z", "ctrl")]  # "only" has one context, so it stays
    group = _group("d/1", cells)
    result = assign_splits([group], None, seed=0, val_fraction=0.5, one_context=True)
    at: dict[str, dict[str, int]] = {}
    for (cell_type, name), mask in zip(cells, result.masks["d/1"].tolist(), strict=True):
        at.setdefault(name, {})[cell_type] = mask
    held = {name: masks for name, masks in at.items() if name != "ctrl" and VAL in masks.values()}
    assert len(held) == 10 and all(sorted(masks.values()) == [TRAIN, VAL] for masks in held.values())  # of 21
    assert at["only"] == {"z": TRAIN} and at["ctrl"]["x"] == at["ctrl"]["y"] == TRAIN | VAL
    assert {cell_type for masks in held.values() for cell_type, mask in masks.items() if mask == VAL} == {"x", "y"}
    assert result.notes[0].startswith("No validation split: held out 10 of 21 training perturbations in one context")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.permutations(range(3)))
def test_whatever_is_held_out_in_one_context_trains_whatever_the_order_of_files(
    seed: int, fraction: float, order: list[int]
) -> None:
    cells = {"d/1": _many(6), "d/2": _many(4, ("y", "z")), "e/1": _many(8, ("x",))}
    groups = [_group(path, its) for path, its in cells.items()]
    result = assign_splits([groups[i] for i in order], None, seed=seed, val_fraction=fraction, one_context=True)
    same = assign_splits(groups, None, seed=seed, val_fraction=fraction, one_context=True)
    trains, validates = set[tuple[str, str, str]](), set[tuple[str, str, str]]()
    for path, its in cells.items():
        np.testing.assert_array_equal(result.masks[path], same.masks[path])
        for (cell_type, name), mask in zip(its, result.masks[path].tolist(), strict=True):
            if name != "ctrl":
                (trains if mask == TRAIN else validates).add((path.split("/")[0], cell_type, name))
    assert validates and not trains & validates
    assert {name for _, _, name in validates} <= {name for _, _, name in trains}


def test_with_one_context_only_perturbations_are_held_out_as_ever() -> None:
    group = _group("d/1", _many(20, ("x",)))
    one, other = (assign_splits([group], None, seed=5, one_context=flag) for flag in (True, False))
    assert one.notes == other.notes and one.masks["d/1"].tolist() == other.masks["d/1"].tolist()
