"""sest.splits: what a splits file may say, and which cell it puts where."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sest import splits as splits_module
from sest.errors import InputError
from sest.splits import (
    TEST,
    TRAIN,
    VAL,
    GroupCells,
    SplitFile,
    SplitRow,
    Splits,
    assign_splits,
    expand_braces,
    read_splits,
    split_table,
)

EXAMPLE = """\
[datasets]
replogle = "data/{rpe1,k562}.h5ad"

[training]
replogle = "train"

[zeroshot]
"replogle.jurkat" = "test"

[fewshot."replogle.rpe1"]
val = ["AARS"]
test = ["NUP107", "RPUSD4"]
"""
MINIMAL = '[datasets]\na = "a.h5ad"\n[training]\na = "train"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with empty stand-ins for data files, and another folder as the working folder."""
    for name in ("data/rpe1.h5ad", "data/k562.h5ad", "data/old.h5", "data/notes.txt", "data/._k562.h5ad"):
        file = tmp_path / "project" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "project/data/deeper").mkdir()
    (tmp_path / "project/data/deeper/hidden_below.h5ad").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "outside.h5ad").touch()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "project"


def _write(folder: Path, text: str) -> Path:
    path = folder / "splits.toml"
    path.write_text(text)
    return path


def _names(folder: Path, pattern: str, roots: tuple[Path, ...] = ()) -> list[str]:
    path = _write(folder, f'[datasets]\na = "{pattern}"\n[training]\na = "train"\n')
    return [file.name for file in read_splits(path, roots=roots).datasets["a"]]


def _error(folder: Path, text: str, *, resolve_files: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        read_splits(_write(folder, text), resolve_files=resolve_files)
    message = str(caught.value)
    assert "\n" not in message
    assert "splits.toml" in message
    return message


# ---- reading


def test_example_is_read_as_written(folder: Path) -> None:
    path = _write(folder, EXAMPLE)
    file = read_splits(path)
    assert file.path == path
    assert file.datasets == {"replogle": (folder / "data/k562.h5ad", folder / "data/rpe1.h5ad")}
    assert file.training == {"replogle"}
    assert file.zeroshot == {("replogle", "jurkat"): TEST}
    assert file.fewshot == {("replogle", "rpe1"): {VAL: ("AARS",), TEST: ("NUP107", "RPUSD4")}}
    assert file.sha256 == hashlib.sha256(EXAMPLE.encode()).hexdigest()


def test_without_resolve_files_no_file_needs_to_exist(tmp_path: Path) -> None:
    assert read_splits(_write(tmp_path, EXAMPLE), resolve_files=False).datasets == {"replogle": ()}


def test_byte_order_mark_of_windows_editors_is_read(tmp_path: Path) -> None:
    assert read_splits(_write(tmp_path, "\ufeff" + MINIMAL), resolve_files=False).training == {"a"}


def test_context_key_splits_after_the_longest_declared_dataset(tmp_path: Path) -> None:
    text = """\
[datasets]
a = "a"
"a.b" = "ab"
[training]
a = "train"
[zeroshot]
"a.b.c.d" = "val"
"a.bc.d" = "test"
"a.b" = "test"
"""
    file = read_splits(_write(tmp_path, text), resolve_files=False)
    assert file.zeroshot == {("a.b", "c.d"): VAL, ("a", "bc.d"): TEST, ("a", "b"): TEST}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + '[zero_shot]\n"a.x" = "val"\n', ["Table 'zero_shot' is unknown", "Did you mean 'zeroshot'"]),
        (MINIMAL.replace('"train"', '"tarin"'), ["'a' must be 'train'", "'tarin'", "Did you mean 'train'?"]),
        (MINIMAL + '[zeroshot]\n"a.x" = "validation"\n', ["must be 'val' or 'test'", "'validation'"]),
        (MINIMAL + '[zeroshot]\n"a.x" = "tests"\n', ["Did you mean 'test'?"]),
        (MINIMAL + '[zeroshot]\n"a.x" = ["val"]\n', ["must be 'val' or 'test', found ['val']"]),
        (MINIMAL + '[fewshot."a.x"]\nvalid = ["P"]\n', ["key 'valid' is unknown", "Did you mean 'val'?"]),
        (MINIMAL + '[fewshot."a.x"]\nval = "P"\n', ["val must be a list", "'P'"]),
        (MINIMAL + '[fewshot."a.x"]\nval = [1]\n', ["must be text in quotes, found 1"]),
        (MINIMAL + '[fewshot]\n"a.x" = "val"\n', ["must be a table with val"]),
        (MINIMAL + '[fewshot."a.x"]\nval = ["P", "P"]\n', ["val names a perturbation twice: P"]),
        (MINIMAL + '[fewshot."a.x"]\nval = ["P", "Q"]\ntest = ["R", "P"]\n', ["in both val and test: P"]),
        (MINIMAL.replace("[training]\na", "[training]\nb"), ["[training] 'b' is not in [datasets], which has a"]),
        (EXAMPLE.replace('"replogle.jurkat"', '"replogel.jurkat"'), ["replogel", "Did you mean 'replogle'?"]),
        (EXAMPLE.replace('"replogle.rpe1"', '"repogle.rpe1"'), ["repogle.rpe1", "Did you mean 'replogle'?"]),
        (EXAMPLE.replace('"replogle.jurkat"', "replogle.jurkat"), ["in quotes, as one key"]),
        (MINIMAL + '[zeroshot]\n"a." = "val"\n', ["'a.' is not \"dataset.cell type\""]),
        ('[datasets]\na = "a"\n', ["[training] is empty or missing", "some of: a"]),
        ('[datasets]\na = "a"\n[training]\n', ["[training] is empty or missing"]),
        ('[training]\na = "train"\n', ["[datasets] is empty or missing"]),
        ('datasets = "a"\n', ["[datasets] must be a table, found 'a'"]),
        ('[datasets]\na.b = "x"\n[training]\na = "train"\n', ["[datasets] 'a' must be text", "dots in quotes"]),
        ('[datasets]\na = ""\n[training]\na = "train"\n', ["[datasets] 'a' is empty"]),
        ('[datasets]\na = "x\\u0000y"\n[training]\na = "train"\n', ["control characters"]),
        ('[datasets]\n"../a" = "x"\n[training]\n"../a" = "train"\n', ["may not contain a slash"]),
        ('[datasets]\n"__a" = "x"\n[training]\n"__a" = "train"\n', ["begin with '.' or '__'"]),
    ],
)
def test_wrong_contents_are_one_line_that_names_the_cure(tmp_path: Path, text: str, words: list[str]) -> None:
    message = _error(tmp_path, text)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[datasets]\na = \n", "line 2"),
        ('[datasets]\na = "a"\na = "b"\n', "line 3"),  # the same name twice
        ('[datasets]\na = "a"\n[training]\na = ["train"\n\n', "line 4"),  # never closed
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("x = " + "1" * 10_000, "not valid TOML"),  # more digits than int() takes
        ('x = """\n"""\n', "multi-line strings"),
    ],
)
def test_wrong_toml_is_one_line_with_its_line_number(tmp_path: Path, text: str, words: str) -> None:
    assert words in _error(tmp_path, text)


def test_a_long_dotted_key_is_refused_before_it_takes_hours_to_parse(tmp_path: Path) -> None:
    assert "at line 3" in _error(tmp_path, "# a\n\n" + "a." * 400_000 + "a = 1\n")
    assert "at line 1" in _error(tmp_path, r'"\".' + '#".' + "a." * 400_000 + "a = 1\n")


def test_dots_in_quotes_and_comments_are_no_dotted_key(tmp_path: Path) -> None:
    names = ", ".join(f'"ENSG{i}.1"' for i in range(50))
    text = MINIMAL + f'# {"." * 40}\n[fewshot."a.{"x." * 20}y"]\nval = [{names}] # it\'s... {"." * 9}\n'
    file = read_splits(_write(tmp_path, text), resolve_files=False)
    assert len(file.fewshot["a", "x." * 20 + "y"][VAL]) == 50


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot read the splits file: No such file"):
        read_splits(tmp_path / "nowhere.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[datasets]\na = '\xff'\n")
    with pytest.raises(InputError, match=r"not UTF-8 text \(at line 2\)"):
        read_splits(binary)


def test_file_over_one_megabyte_is_refused_and_one_of_exactly_that_size_is_read(tmp_path: Path) -> None:
    filled = MINIMAL + "#" * (splits_module.MAX_BYTES - len(MINIMAL))
    assert read_splits(_write(tmp_path, filled), resolve_files=False).training == {"a"}
    assert "larger than 1,000,000 bytes" in _error(tmp_path, filled + "#")


# ---- finding files


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("plain.h5ad", ["plain.h5ad"]),
        ("{a,b{1,2}}.h5ad", ["a.h5ad", "b1.h5ad", "b2.h5ad"]),
        ("{a,b}{1,2}", ["a1", "a2", "b1", "b2"]),
        ("x{,_2}", ["x", "x_2"]),
        ("{{a,b},c}{d}", ["ad", "bd", "cd"]),
        ("a,b", ["a,b"]),
        ("{a,b{,1{2,3}},}/{x}", ["a/x", "b/x", "b12/x", "b13/x", "/x"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{a", "a}", "{a,{b}", "{a}}", "}{"])
def test_unbalanced_braces_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="unbalanced braces"):
        expand_braces(pattern)


def test_brace_expansion_stops_at_ten_thousand() -> None:
    ten = "{0,1,2,3,4,5,6,7,8,9}"
    assert len(set(expand_braces(ten * 4))) == 10_000
    for pattern in (ten * 4 + "{a,b}", "{a,b}" * 600, "{" + "{a,b}" * 600 + "}", "{x," + ten * 4 + "}"):
        with pytest.raises(InputError, match="more than 10,000"):
            expand_braces(pattern)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("data/k562.h5ad", ["k562.h5ad"]),
        ("data", ["k562.h5ad", "old.h5", "rpe1.h5ad"]),  # no text files, no hidden files, nothing below
        ("data/", ["k562.h5ad", "old.h5", "rpe1.h5ad"]),
        ("data/*.h5ad", ["k562.h5ad", "rpe1.h5ad"]),
        ("data/*", ["k562.h5ad", "old.h5", "rpe1.h5ad"]),
        ("data/[kr]*.h5{,ad}", None),  # no k*.h5: every alternative of the braces has to match
        ("**/*.h5ad", ["hidden_below.h5ad", "k562.h5ad", "rpe1.h5ad"]),
        ("data/{rpe1,{k562,rpe1}}.h5ad", ["k562.h5ad", "rpe1.h5ad"]),
        ("data/../data/k562.h5ad", ["k562.h5ad"]),
        ("data/notes.txt", None),
        ("data/{rpe1,k526}.h5ad", None),
    ],
)
def test_pattern_is_a_file_a_folder_or_a_glob(folder: Path, pattern: str, expected: list[str] | None) -> None:
    if expected is not None:
        assert _names(folder, pattern) == expected
    else:
        with pytest.raises(InputError, match=r"matched no \.h5ad or \.h5 file\. Looked for .*project.* and .*work"):
            _names(folder, pattern)


def test_a_name_with_glob_characters_is_that_file(folder: Path) -> None:
    (folder / "data/[1].h5ad").touch()
    assert _names(folder, "data/[1].h5ad") == ["[1].h5ad"]


def test_the_toml_folder_is_looked_at_before_the_working_folder(folder: Path) -> None:
    work = folder.parent / "work"
    (work / "data").mkdir()
    (work / "data/k562.h5ad").touch()
    (work / "data/only_here.h5ad").touch()
    text = MINIMAL.replace("a.h5ad", "data/{k562,only_here}.h5ad")
    assert read_splits(_write(folder, text)).datasets["a"] == (
        folder / "data/k562.h5ad",
        work / "data/only_here.h5ad",
    )


@pytest.mark.parametrize("pattern", ["../outside.h5ad", "../*.h5ad", "data/../../outside.h5ad", "/etc", "/**/*.h5ad"])
def test_paths_that_leave_the_permitted_folders_are_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"lies outside the permitted folders .*project"):
        _names(folder, pattern)


def test_a_sibling_folder_with_the_same_beginning_is_outside(folder: Path) -> None:
    (folder.parent / "project2").mkdir()
    (folder.parent / "project2/x.h5ad").touch()
    with pytest.raises(InputError, match="lies outside"):
        _names(folder, "../project2/x.h5ad")


def test_roots_permit_more_folders_and_absolute_paths_inside_them(folder: Path) -> None:
    outside = folder.parent / "outside.h5ad"
    assert _names(folder, str(outside), roots=(folder.parent,)) == ["outside.h5ad"]
    assert _names(folder, "../outside.h5ad", roots=(folder.parent,)) == ["outside.h5ad"]
    assert _names(folder, str(folder / "data/k562.h5ad")) == ["k562.h5ad"]  # inside the file's own folder anyway


def test_a_link_out_of_the_permitted_folders_is_refused_until_its_target_is_a_root(folder: Path) -> None:
    store = folder.parent / "store"
    store.mkdir()
    (store / "blob").touch()
    (folder / "linked.h5ad").symlink_to(store / "blob")
    with pytest.raises(InputError, match="is a link that leads outside"):
        _names(folder, "linked.h5ad")
    assert _names(folder, "linked.h5ad", roots=(store,)) == ["linked.h5ad"]  # the name stays the link's


def test_a_root_may_be_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder / "data")
    (folder.parent / "elsewhere").mkdir()
    path = folder.parent / "elsewhere/splits.toml"
    path.write_text(MINIMAL.replace("a.h5ad", str(link / "k*.h5ad")))
    assert read_splits(path, roots=(link,)).datasets["a"] == (link / "k562.h5ad",)


def test_glob_characters_in_the_name_of_a_permitted_folder_are_no_glob(folder: Path) -> None:
    root = folder / "run[1]"
    root.mkdir()
    (root / "x.h5ad").touch()
    assert _names(folder, f"{root}/*.h5ad", roots=(root,)) == ["x.h5ad"]


def test_the_same_file_in_two_datasets_is_refused(folder: Path) -> None:
    text = '[datasets]\na = "data/*.h5ad"\nb = "data/k562.h5ad"\n[training]\na = "train"\n'
    assert "'a' and 'b' both have" in _error(folder, text, resolve_files=True)
    (folder / "data/again.h5ad").symlink_to(folder / "data/k562.h5ad")
    assert "'a' and 'a' both have" in _error(
        folder, MINIMAL.replace("a.h5ad", "data/{k562,again}.h5ad"), resolve_files=True
    )


@pytest.mark.parametrize(
    "pattern",
    ["a" * 300 + ".h5ad", "data/" + "x/" * 2000, "data/x**.h5ad", "[", "a" * 5000, "**/" * 9 + "x", "*/" * 900],
)
def test_hostile_patterns_are_input_errors(folder: Path, pattern: str) -> None:
    assert _error(folder, MINIMAL.replace("a.h5ad", pattern), resolve_files=True)


# ---- assigning


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
    """DESIGN.md section 6 for one cell, before any holding out: the slow second implementation."""
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
    path = _write(
        tmp_path,
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
