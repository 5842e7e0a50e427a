"""Which cells train, validate and test: a cell-load style TOML file, applied to the groups of a cache.

    [datasets]                                 [zeroshot]
    replogle = "data/{rpe1,k562}.h5ad"         "replogle.jurkat" = "test"
    [training]                                 [fewshot."replogle.rpe1"]
    replogle = "train"                         val = ["AARS"]
                                               test = ["NUP107", "RPUSD4"]

A context is a (dataset, cell type). The semantics are those of DESIGN.md section 6; whatever a file names and the
cache does not have is an error, never ignored. C: cell types, P: perturbations (the control among them), n: cells.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sest.errors import InputError, nearest, shown

TRAIN, VAL, TEST = 1, 2, 4  # bits of a split mask
SPLIT_NAMES = {TRAIN: "train", VAL: "val", TEST: "test"}

MAX_BYTES = 1_000_000  # of the file
MAX_EXPANSIONS = 10_000  # results of one pattern's braces
MAX_TEXT = 4_096  # characters of a name or pattern (PATH_MAX); with MAX_EXPANSIONS it bounds memory at 40 MB
MAX_GLOB_PARTS = 32  # folders of a glob, of which one may be **: more take exponential time
MAX_BARE_DOTS = 8  # dots of a line outside quotes: tomllib takes quadratic time over a dotted key

_BITS = {"val": VAL, "test": TEST}
_SUFFIXES = (".h5ad", ".h5")
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*+"?|' + r"'[^'\n]*+'?|#[^\n]*+")


@dataclass(frozen=True)
class SplitFile:
    """A splits file as read: names are checked against [datasets], not yet against a cache."""

    path: Path
    datasets: dict[str, tuple[Path, ...]]  # name -> its files, absolute and sorted; empty only without resolve_files
    training: frozenset[str]  # datasets marked "train"
    zeroshot: dict[tuple[str, str], int]  # (dataset, cell type) -> VAL or TEST
    fewshot: dict[tuple[str, str], dict[int, tuple[str, ...]]]  # (dataset, cell type) -> {VAL: ..., TEST: ...}
    sha256: str  # of the file's bytes


@dataclass(frozen=True)
class GroupCells:
    """The labels of one group (one file) of the cache; a negative code is a missing label."""

    path: str  # in the cache, e.g. "replogle/rpe1"
    dataset: str
    perturbation: np.ndarray  # (n,) int codes
    perturbations: tuple[str, ...]  # code -> name
    cell_type: np.ndarray  # (n,) int codes
    cell_types: tuple[str, ...]  # code -> name
    control: str  # label of control cells


@dataclass(frozen=True)
class Splits:
    """What `assign_splits` decided."""

    masks: dict[str, np.ndarray]  # group path -> (n,) uint8; perturbed cells <= 1 bit, controls any, 0 is unused
    notes: tuple[str, ...]  # sentences to show the user


@dataclass(frozen=True)
class SplitRow:
    """One line of the table printed before training."""

    dataset: str
    cell_type: str
    split: str  # "train", "val" or "test"
    n_perturbations: int
    n_perturbed_cells: int
    n_controls: int


# ---- reading


def read_splits(path: Path, *, resolve_files: bool = True, roots: tuple[Path, ...] = ()) -> SplitFile:
    """Read and check a splits file.

    A dataset is a file, a folder (its .h5ad and .h5 files, not recursive) or a glob, each with nested braces.
    Relative paths are looked up in the file's folder, then in the working folder. Files must lie in one of these two
    or in one of `roots`, also after following links. `resolve_files=False` does not look for the datasets' files.

    Raises `InputError` for wrong TOML, unknown tables, names or values, and patterns that match no file.
    """
    try:
        raw = _read_bytes(path)
        data = _parse_toml(raw)
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


def _read_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read the splits file: {error.strerror}.") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"larger than {MAX_BYTES:,} bytes, which no splits file needs. Is it the right file?")
    return raw


def _parse_toml(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"not UTF-8 text (at line {bad_line}).") from None
    if '"""' in text or "'''" in text:
        raise InputError("multi-line strings are not used in splits files: put names and paths in plain quotes.")
    for number, line in enumerate(_STRING_OR_COMMENT.sub("", text).split("\n"), start=1):
        if line.count(".") > MAX_BARE_DOTS:
            raise InputError(f"too many dots outside quotes (at line {number}). Put names with dots in quotes.")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InputError("brackets are nested too deeply.") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of more than 4,300 digits
        last = text.rstrip("\n").count("\n") + 1
        why = str(error).replace("at end of document", f"at the end, line {last}")
        raise InputError(f"not valid TOML: {why}.") from None


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
            raise InputError(f"{one!r} of dataset {name!r} matched no .h5ad or .h5 file. Looked for {looked}.")
        found.update(matches)
    for path in sorted(found):
        if not _root_of(os.path.realpath(path), allowed):
            raise InputError(f"{path} of dataset {name!r} is a link that leads {outside}")
    return tuple(Path(path) for path in sorted(found))


def _root_of(path: str, allowed: list[str]) -> str | None:
    """Return the deepest of `allowed` that holds `path`; both are absolute and normalised."""
    return max((root for root in allowed if os.path.commonpath((root, path)) == root), key=len, default=None)


def _match(path: str, root: str, shown_as: str) -> list[str]:
    """Return the .h5ad and .h5 files that `path` (a file, a folder or a glob below `root`) stands for."""
    try:
        if os.path.isfile(path):
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
    kept = [file for file in candidates if file.endswith(_SUFFIXES) and not os.path.basename(file).startswith(".")]
    return [file for file in kept if os.path.isfile(file)]


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


# ---- assigning


@dataclass(frozen=True)
class _Table:
    """A group's cells counted by context; the rules write `bits`, never single cells."""

    group: GroupCells
    counts: np.ndarray  # (C, P) int64, cells
    bits: np.ndarray  # (C, P) uint8, written in place
    is_control: np.ndarray  # (P,) bool
    labelled: np.ndarray  # (n,) bool

    @classmethod
    def of(cls, group: GroupCells) -> _Table:
        shape = C, P = len(group.cell_types), len(group.perturbations)
        assert len(set(group.cell_types)) == C and len(set(group.perturbations)) == P, "names of codes are unique"
        assert group.perturbation.shape == group.cell_type.shape, "one code a cell"
        labelled = (group.perturbation >= 0) & (group.cell_type >= 0)
        # int64 before multiplying: pandas codes are int8 where there are few names
        pert, row = (codes[labelled].astype(np.int64) for codes in (group.perturbation, group.cell_type))
        assert not pert.size or (pert.max() < P and row.max() < C), "codes are below the number of names"
        counts = np.bincount(row * P + pert, minlength=C * P).reshape(shape)
        is_control = np.array([name == group.control for name in group.perturbations], dtype=bool)
        return cls(group, counts, np.zeros(shape, dtype=np.uint8), is_control, labelled)

    def perturbed(self, bit: int) -> np.ndarray:
        """Return (C, P) bool: contexts and perturbations, not controls, with cells in split `bit`."""
        chosen: np.ndarray = (self.counts > 0) & ((self.bits & bit) > 0) & ~self.is_control
        return chosen

    def masks(self) -> np.ndarray:
        """Return (n,) uint8."""
        out = np.zeros(len(self.labelled), dtype=np.uint8)
        out[self.labelled] = self.bits[self.group.cell_type[self.labelled], self.group.perturbation[self.labelled]]
        return out


def assign_splits(
    groups: Sequence[GroupCells], file: SplitFile | None, *, seed: int, val_fraction: float = 0.05
) -> Splits:
    """Give every cell of the cache its split; without a file every dataset is training.

    Where no perturbed cell is in val, `max(1, round(val_fraction * N))` of the N training perturbations, drawn by
    name from `seed`, move to val in every context. The order of `groups` changes nothing. Training cells of a
    context that has no controls in its group cannot be paired with any: they are left unused, with a note.

    Raises `InputError` for names the cache does not have, a val or test context without controls, or nothing left
    to train or validate on.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be between 0 and 1, found {val_fraction}.")
    assert len({group.path for group in groups}) == len(groups), "group paths are unique"
    tables = [_Table.of(group) for group in sorted(groups, key=lambda group: group.path)]
    notes = _unlabelled_notes(tables)
    if file is None:
        for table in tables:
            table.bits[:] = TRAIN
    else:
        _check_names(tables, file)
        for table in tables:
            _apply(table, file)
        notes += _file_notes(tables, file)
    notes += _require_controls(tables)
    if not any(table.perturbed(TRAIN).any() for table in tables):
        raise InputError("No perturbed cells are left for training. Check the control label and the splits file.")
    if not any(table.perturbed(VAL).any() for table in tables):
        notes.append(_hold_out(tables, seed, val_fraction))
    masks = {table.group.path: table.masks() for table in tables}
    return Splits({group.path: masks[group.path] for group in groups}, tuple(notes))


def _apply(table: _Table, file: SplitFile) -> None:
    dataset, bits, is_control = table.group.dataset, table.bits, table.is_control
    in_training = dataset in file.training
    bits[:] = TRAIN if in_training else 0
    for row, cell_type in enumerate(table.group.cell_types):
        context = (dataset, cell_type)
        if context in file.zeroshot:
            bits[row] = file.zeroshot[context]
            bits[row, is_control] |= TRAIN if in_training else 0
        elif context in file.fewshot:
            bits[row] = TRAIN  # also where the dataset is not in [training]: the rest of a fewshot context trains
            for bit, names in file.fewshot[context].items():
                listed = np.isin(table.group.perturbations, names)
                bits[row, listed] = bit
                bits[row, is_control] |= bit if names else 0


def _check_names(tables: list[_Table], file: SplitFile) -> None:
    """Raise `InputError` for datasets, cell types and perturbations of the file that the cache does not have."""
    contexts = sorted({*file.zeroshot, *file.fewshot})
    have = sorted({table.group.dataset for table in tables})
    missing = sorted((file.training | {dataset for dataset, _ in contexts}) - set(have))
    if missing:
        raise InputError(
            f"{file.path} uses datasets that are not in the cache: {shown(missing)}. "
            f"The cache has {shown(have)}.{nearest(missing[0], have)}"
        )
    for dataset, cell_type in contexts:
        rows = _rows(tables, dataset, cell_type)
        if not rows:
            exist = sorted({table.group.cell_types[row] for table, row in _rows(tables, dataset)})
            raise InputError(
                f"{file.path}: dataset {dataset!r} has no cell type {cell_type!r}. "
                f"It has {shown(exist)}.{nearest(cell_type, exist)}"
            )
        for names in file.fewshot.get((dataset, cell_type), {}).values():
            _check_perturbations(rows, names, f'{file.path}: [fewshot."{dataset}.{cell_type}"]')


def _rows(tables: list[_Table], dataset: str, cell_type: str | None = None) -> list[tuple[_Table, int]]:
    """Return where a dataset (or one cell type of it) has cells."""
    return [
        (table, row)
        for table in tables
        for row, name in enumerate(table.group.cell_types)
        if table.group.dataset == dataset and cell_type in (name, None) and table.counts[row].any()
    ]


def _check_perturbations(rows: list[tuple[_Table, int]], names: tuple[str, ...], what: str) -> None:
    controls = {table.group.control for table, _ in rows}
    if found := sorted(controls.intersection(names)):
        raise InputError(f"{what} lists the control {found[0]!r}: controls go to every split. Take it out of the list.")
    exist = {t.group.perturbations[column] for t, row in rows for column in np.flatnonzero(t.counts[row])} - controls
    if missing := sorted(set(names) - exist):
        raise InputError(
            f"{what} lists perturbations without cells there: {shown(missing)}. "
            f"Of this cell type the cache has {shown(sorted(exist))}.{nearest(missing[0], exist)}"
        )


def _unlabelled_notes(tables: list[_Table]) -> list[str]:
    missing = [(table.group.path, int((~table.labelled).sum())) for table in tables]
    return [f"{n:,} cells of {path!r} have no perturbation or no cell type: not used." for path, n in missing if n]


def _file_notes(tables: list[_Table], file: SplitFile) -> list[str]:
    """Say what of the file does nothing and what of the cache it leaves unused."""
    notes = [
        f"'{dataset}.{cell_type}' is in [zeroshot] and in [fewshot]: zeroshot wins, its fewshot lists are not used."
        for dataset, cell_type in sorted(file.zeroshot.keys() & file.fewshot.keys())
    ]
    for (dataset, cell_type), bit in sorted(file.zeroshot.items()):
        if not any(table.perturbed(bit)[row].any() for table, row in _rows(tables, dataset, cell_type)):
            notes.append(f"'{dataset}.{cell_type}' has no perturbed cells: it adds nothing to {SPLIT_NAMES[bit]}.")
    for dataset in sorted({table.group.dataset for table in tables}):
        unused = [(table, row) for table, row in _rows(tables, dataset) if not table.bits[row].any()]
        n_cells = sum(int(table.counts[row].sum()) for table, row in unused)
        if dataset not in file.datasets:
            notes.append(f"Dataset {dataset!r} is not in {file.path.name}: its {n_cells:,} cells are not used.")
        elif n_cells:
            names = shown(sorted({table.group.cell_types[row] for table, row in unused}))
            notes.append(f"{dataset!r} is not in [training]: its cell types {names} ({n_cells:,} cells) are not used.")
    return notes


def _require_controls(tables: list[_Table]) -> list[str]:
    """Refuse val and test contexts without controls in their group; leave such training contexts unused."""
    notes = []
    for table in tables:
        without = table.counts[:, table.is_control].sum(axis=1) == 0
        for row in np.flatnonzero(without & table.perturbed(TRAIN | VAL | TEST).any(axis=1)):
            group, n_cells = table.group, int(table.counts[row].sum())
            what = f"'{group.dataset}.{group.cell_types[row]}' has no controls ({group.control!r}) in {group.path!r}"
            for bit in (VAL, TEST):
                if table.perturbed(bit)[row].any():
                    raise InputError(f"{what}, so it cannot be in {SPLIT_NAMES[bit]}. Take it out of that split.")
            table.bits[row] = 0
            notes.append(f"{what}: its {n_cells:,} training cells are not used.")
    return notes


def _hold_out(tables: list[_Table], seed: int, val_fraction: float) -> str:
    """Move a seeded share of the training perturbations to val, in every context, and say which."""
    names = sorted({t.group.perturbations[column] for t in tables for column in np.nonzero(t.perturbed(TRAIN))[1]})
    if len(names) == 1:
        raise InputError(
            f"There is one training perturbation ({names[0]!r}), so none can be held out for validation. "
            "Name a val split in a splits file."
        )
    n_held = min(len(names) - 1, max(1, round(val_fraction * len(names))))
    held = sorted(names[i] for i in np.random.default_rng([seed]).permutation(len(names))[:n_held])
    for table in tables:
        moved = table.perturbed(TRAIN) & np.isin(table.group.perturbations, held)  # (C, P)
        table.bits[moved] = VAL
        table.bits[np.ix_(moved.any(axis=1), table.is_control)] |= VAL
    return (
        f"No validation split: held out {n_held} of {len(names)} training perturbations "
        f"({shown(held, limit=50)}), seed {seed}."
    )


def split_table(groups: Sequence[GroupCells], splits: Splits) -> list[SplitRow]:
    """Count each context's cells by split, sorted by dataset, cell type and train, val, test; no empty rows.

    A control is counted in every split it serves; cells that are in no split are not counted.
    """
    names: dict[tuple[str, str, int], set[str]] = {}
    cells: dict[tuple[str, str, int], list[int]] = {}  # -> [perturbed, controls]
    for group in groups:
        mask = splits.masks[group.path]
        for bit in SPLIT_NAMES:
            chosen = (mask & bit) > 0
            counted = _Table.of(_only(group, chosen))
            for row in np.flatnonzero(counted.counts.any(axis=1)):
                key = (group.dataset, group.cell_types[row], bit)
                perturbed = np.where(counted.is_control, 0, counted.counts[row])  # (P,) cells
                total = cells.setdefault(key, [0, 0])
                total[0] += int(perturbed.sum())
                total[1] += int(counted.counts[row].sum() - perturbed.sum())
                names.setdefault(key, set()).update(group.perturbations[i] for i in np.flatnonzero(perturbed))
    return [SplitRow(k[0], k[1], SPLIT_NAMES[k[2]], len(names[k]), *cells[k]) for k in sorted(cells)]


def _only(group: GroupCells, chosen: np.ndarray) -> GroupCells:
    return replace(group, perturbation=group.perturbation[chosen], cell_type=group.cell_type[chosen])
