"""A splits file: cell-load style TOML that says which files are datasets, and what trains, validates and tests.

    [datasets]                                 [zeroshot]
    replogle = "data/{rpe1,k562}.h5ad"         "replogle.jurkat" = "test"
    [training]                                 [fewshot."replogle.rpe1"]
    replogle = "train"                         val = ["AARS"]
                                               test = ["NUP107", "RPUSD4"]

A context is a (dataset, cell type). The file is not trusted: reading takes bounded time and memory, and its paths lead
nowhere but into permitted folders. Names are checked against [datasets] here, against the cache in `sest.cells.splits`.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sest.errors import InputError, nearest, shown
from sest.files.containers import SUFFIXES
from sest.files.formats import is_zarr
from sest.options import parse_toml, toml_bytes

TRAIN, VAL, TEST = 1, 2, 4  # bits of a split mask
SPLIT_NAMES = {TRAIN: "train", VAL: "val", TEST: "test"}

MAX_EXPANSIONS = 10_000  # results of one pattern's braces
MAX_TEXT = 4_096  # characters of a name or pattern (PATH_MAX); with MAX_EXPANSIONS it bounds memory at 40 MB
MAX_GLOB_PARTS = 32  # folders of a glob, of which one may be **: more take exponential time

_BITS = {"val": VAL, "test": TEST}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class SplitFile:
    """A splits file as read: names are checked against [datasets], not yet against a cache."""

    path: Path
    datasets: dict[str, tuple[Path, ...]]  # name -> its files, absolute and sorted; empty only without resolve_files
    training: frozenset[str]  # datasets marked "train"
    zeroshot: dict[tuple[str, str], int]  # (dataset, cell type) -> VAL or TEST
    fewshot: dict[tuple[str, str], dict[int, tuple[str, ...]]]  # (dataset, cell type) -> {VAL: ..., TEST: ...}
    sha256: str  # of the file's bytes


def read_splits(path: Path, *, resolve_files: bool = True, roots: tuple[Path, ...] = ()) -> SplitFile:
    """Read and check a splits file.

    A dataset is a file (or a Zarr store), a folder (the files of cells in it, not recursive) or a glob, each with
    nested braces. Relative paths are looked up in the file's folder, then in the working folder. Files must lie in one
    of these two or in one of `roots`, also after following links. `resolve_files=False` does not look for the files.

    Raises `InputError` for wrong TOML, unknown tables, names or values, and patterns that match no file.
    """
    try:
        raw = toml_bytes(path)
        data = parse_toml(raw)
        _known(data, ("datasets", "training", "zeroshot", "fewshot"), "Table")
        patterns = {_dataset_name(name): _text(value, f"[datasets] {name!r}") for name, value in _datasets(data)}
        training = frozenset(_training_names(_table(data, "training"), patterns))
        zeroshot = {
            _context(key, patterns, "zeroshot"): _BITS[_one_of(value, tuple(_BITS), f"[zeroshot] {key!r}")]
            for key, value in _table(data, "zeroshot").items()
        }
        fewshot = {
            _context(key, patterns, "fewshot"): _fewshot_lists(value, f"[fewshot.{key!r}]")
            for key, value in _table(data, "fewshot").items()
        }
        datasets: dict[str, tuple[Path, ...]] = dict.fromkeys(patterns, ())
        if resolve_files:
            folder = Path(os.path.abspath(path)).parent
            datasets = {name: _find_files(name, pattern, folder, roots) for name, pattern in patterns.items()}
            _check_no_file_twice(datasets)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return SplitFile(path, datasets, training, zeroshot, fewshot, hashlib.sha256(raw).hexdigest())


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name, {})
    if not isinstance(value, dict):
        raise InputError(f"[{name}] must be a table, found {reprlib.repr(value)}.")
    return value


def _known(names: Iterable[str], choices: Collection[str], what: str) -> None:
    for name in names:
        if name not in choices:
            raise InputError(f"{what} {name!r} is unknown. Known: {shown(choices)}.{nearest(name, choices)}")


def _text(value: Any, what: str) -> str:
    """Return `value` if it is a usable name or path."""
    if not isinstance(value, str):
        raise InputError(f"{what} must be text in quotes, found {reprlib.repr(value)}. Put names with dots in quotes.")
    if not value or len(value) > MAX_TEXT or _CONTROL_CHARACTERS.search(value):
        raise InputError(f"{what} is empty, too long or has control characters: {reprlib.repr(value)}.")
    return value


def _one_of(value: Any, choices: tuple[str, ...], what: str) -> str:
    if value not in choices:
        close = nearest(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{what} must be {' or '.join(map(repr, choices))}, found {reprlib.repr(value)}.{close}")
    return str(value)


def _datasets(data: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    datasets = _table(data, "datasets")
    if not datasets:
        raise InputError('[datasets] is empty or missing. Write one line a dataset: name = "path".')
    return datasets.items()


def _dataset_name(name: str) -> str:
    """Check that a dataset's name can be a folder of the cache (Zarr reserves names that begin with __)."""
    _text(name, "a name in [datasets]")
    if name.startswith((".", "__")) or "/" in name or "\\" in name:
        raise InputError(f"[datasets] {name!r}: a name may not contain a slash or begin with '.' or '__'.")
    return name


def _training_names(table: dict[str, Any], declared: Collection[str]) -> list[str]:
    if not table:
        raise InputError(f'[training] is empty or missing. Write name = "train" for some of: {shown(declared)}.')
    for name, value in table.items():
        if name not in declared:
            have = f"which has {shown(declared)}.{nearest(name, declared)}"
            raise InputError(f"[training] {name!r} is not in [datasets], {have}")
        _one_of(value, ("train",), f"[training] {name!r}")
    return list(table)


def _context(key: str, declared: Collection[str], table: str) -> tuple[str, str]:
    """Split "dataset.cell type" after the longest declared dataset; both halves may contain dots."""
    _text(key, f"a key of [{table}]")
    for dot in reversed([match.start() for match in re.finditer(r"\.", key)]):
        if key[:dot] in declared and key[dot + 1 :]:
            return key[:dot], key[dot + 1 :]
    close = nearest(key.split(".")[0], declared) or nearest(key.rpartition(".")[0], declared)
    raise InputError(
        f'[{table}] {key!r} is not "dataset.cell type" (in quotes, as one key) of a dataset in [datasets], '
        f"which has {shown(declared)}.{close}"
    )


def _fewshot_lists(value: Any, what: str) -> dict[int, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a table with val = [...] and test = [...], found {reprlib.repr(value)}.")
    _known(value, _BITS, f"{what}: key")
    lists: dict[int, tuple[str, ...]] = {}
    for word, bit in _BITS.items():
        names = value.get(word, [])
        if not isinstance(names, list):
            raise InputError(f"{what} {word} must be a list of perturbations, found {reprlib.repr(names)}.")
        lists[bit] = tuple(_text(name, f"{what} {word}: a perturbation") for name in names)
        _refuse_repeats(lists[bit], f"{what} {word} names a perturbation twice")
    _refuse_repeats(lists[VAL] + lists[TEST], f"{what} has a perturbation in both val and test")
    return lists


def _refuse_repeats(names: tuple[str, ...], what: str) -> None:
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"{what}: {shown(repeated)}.")


# ---- finding files
# Not by wcmatch: it leaves braces with one entry or no partner as they are (typos, refused here) and ends deep ones in
# a RecursionError; for globs it would save no line, and no longer look into hidden folders.


def expand_braces(pattern: str) -> list[str]:
    """Expand nested braces: `{a,b{1,2}}.h5ad` is a.h5ad, b1.h5ad, b2.h5ad. At most MAX_EXPANSIONS results.

    Raises `InputError` for unbalanced braces and for more results.
    """
    done: list[list[str]] = [[]]  # of every open brace (and the whole): alternatives already closed by a comma
    current: list[list[str]] = [[""]]  # of every open brace (and the whole): the alternative being read, expanded
    for piece in re.split(r"([{},])", pattern):
        if piece == "{":
            done.append([])
            current.append([""])
        elif piece == "}" and len(done) > 1:
            choices = done.pop() + current.pop()
            if len(current[-1]) * len(choices) > MAX_EXPANSIONS:
                raise InputError(f"the braces of {pattern!r} give more than {MAX_EXPANSIONS:,} paths.")
            current[-1] = [left + right for left in current[-1] for right in choices]
        elif piece == "," and len(done) > 1:
            done[-1] += current[-1]
            current[-1] = [""]
        elif piece == "}":
            raise InputError(f"unbalanced braces in {pattern!r}.")
        else:
            current[-1] = [left + piece for left in current[-1]]
    if len(done) > 1:
        raise InputError(f"unbalanced braces in {pattern!r}.")
    return current[0]


def _find_files(name: str, pattern: str, folder: Path, roots: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the files of one dataset. Every alternative of the braces must match: a missing one is missing data."""
    places = list(dict.fromkeys((str(folder), os.getcwd())))
    permitted_folders = places + [os.path.abspath(root) for root in roots]
    outside = f"outside the permitted folders ({shown(permitted_folders)}). Permit its folder with --data-root."
    allowed = permitted_folders + [os.path.realpath(root) for root in permitted_folders]
    found: set[str] = set()
    for one in expand_braces(pattern):
        wanted = [os.path.normpath(os.path.join(place, one)) for place in places]  # an absolute `one` stands alone
        permitted = [(path, root) for path in dict.fromkeys(wanted) if (root := _root_of(path, allowed))]
        if not permitted:
            raise InputError(f"{one!r} of dataset {name!r} lies {outside}")
        matches: list[str] = []
        for path, root in permitted:
            matches = matches or _match(path, root, one)
        if not matches:
            looked = " and ".join(path for path, _ in permitted)
            raise InputError(
                f"{one!r} of dataset {name!r} matched no file of cells ({', '.join(SUFFIXES)}). Looked for {looked}."
            )
        found.update(matches)
    for path in sorted(found):
        if not _root_of(os.path.realpath(path), allowed):
            raise InputError(f"{path} of dataset {name!r} is a link that leads {outside}")
    return tuple(Path(path) for path in sorted(found))


def _root_of(path: str, allowed: list[str]) -> str | None:
    """Return the deepest of `allowed` that holds `path`; both are absolute and normalised."""
    return max((root for root in allowed if os.path.commonpath((root, path)) == root), key=len, default=None)


def _match(path: str, root: str, shown_as: str) -> list[str]:
    """Return the files of cells that `path` (a file, a folder or a glob below `root`) stands for."""
    try:
        if os.path.isfile(path) or is_zarr(Path(path)):
            candidates = [path]
        elif os.path.isdir(path):
            candidates = [os.path.join(path, entry) for entry in os.listdir(path)]
        else:
            candidates = _glob(root, os.path.relpath(path, root)) if re.search(r"[*?[]", path) else []
    except ValueError as error:
        raise InputError(f"{shown_as!r} is not a usable pattern: {error}") from None
    except OSError as error:
        raise InputError(f"cannot look for {shown_as!r}: {error.strerror}.") from None
    # Hidden names are left out: macOS writes a "._x.h5ad" beside every x.h5ad.
    kept = [file for file in candidates if file.endswith(SUFFIXES) and not os.path.basename(file).startswith(".")]
    return [file for file in kept if os.path.isfile(file) or is_zarr(Path(file))]


def _glob(root: str, pattern: str) -> list[str]:
    parts = pattern.split(os.sep)
    if len(parts) > MAX_GLOB_PARTS or parts.count("**") > 1:
        raise ValueError(f"a glob has at most {MAX_GLOB_PARTS} parts and one '**'.")
    return [str(match) for match in Path(root).glob(pattern)]  # unlike glob.glob, ** follows no links to folders


def _check_no_file_twice(datasets: dict[str, tuple[Path, ...]]) -> None:
    """Refuse a file in two datasets (or twice in one, by a link): its cells could train and test."""
    owner: dict[str, str] = {}
    for name, files in datasets.items():
        for file in files:
            real = os.path.realpath(file)
            if real in owner:
                raise InputError(f"datasets {owner[real]!r} and {name!r} both have {file}. Name each file once.")
            owner[real] = name
