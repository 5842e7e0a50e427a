"""What a splits file may say, and which files its patterns stand for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sest.cells.split_file import TEST, VAL, expand_braces, read_splits
from sest.errors import InputError
from sest.options import MAX_TOML

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
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot read it: No such file"):
        read_splits(tmp_path / "nowhere.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[datasets]\na = '\xff'\n")
    with pytest.raises(InputError, match=r"not UTF-8 text \(at line 2\)"):
        read_splits(binary)


def test_file_over_one_megabyte_is_refused_and_one_of_exactly_that_size_is_read(tmp_path: Path) -> None:
    filled = MINIMAL + "#" * (MAX_TOML - len(MINIMAL))
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
        with pytest.raises(
            InputError, match=r"matched no file of cells \(\.h5ad, .*\)\. Looked for .*project.* and .*work"
        ):
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
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (blobs / "blob").touch()
    (folder / "linked.h5ad").symlink_to(blobs / "blob")
    with pytest.raises(InputError, match="is a link that leads outside"):
        _names(folder, "linked.h5ad")
    assert _names(folder, "linked.h5ad", roots=(blobs,)) == ["linked.h5ad"]  # the name stays the link's


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
