"""What a configuration is: options with a default, one line of help and limits; checked, read from TOML, written back.

A default and its explanation are written once, in `sest.config`; the command line reads them.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from sest.errors import InputError, nearest, nearest_file, shown

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
COUNTS = ("auto", "raw", "log1p")
LARGEST_SEED = 2**63 - 1
MAX_TOML = 1_000_000  # bytes of a file
MAX_BARE_DOTS = 8  # dots of a line outside quotes: tomllib takes quadratic time over a dotted key
_TIME = re.compile(r"(?:(\d{1,5})d)?(?:(\d{1,6})h)?(?:(\d{1,7})m)?(?:(\d{1,9})s)?")
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*+"?|' + r"'[^'\n]*+'?|#[^\n]*+")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list"}
KINDS[type(None)] = "nothing"
RENAMED = {  # options that have another name now, by configuration
    "EmbedConfig": {"checkpoint": "weights"},
    "TrainConfig": {"controls": "match_controls"},
    "PredictConfig": {"counts": "list", "cells": "controls"},
}
# What options of several stages have in common: up to the first colon or semicolon, a name means one thing everywhere.
DEVICE = "auto, cpu, cuda or cuda:N"
PRECISION = "number format of the network"
SEED = "seed of random numbers"
PERT_COL = "obs column with the perturbation"
CELL_TYPE_COL = "obs column with the cell type"
GENE_COL = "var column with the names of the genes, or index"
CONTROL = "label of control cells, or a pattern such as 'NT-*'"
LABELS = (
    "what labels are; auto: guides of controls are controls, A+ctrl is A, cells without a perturbation are left out"
)
LAYER = "layer to read instead of X; raw: raw/X"
MAX_STEPS = "optimizer steps in all, a resumed run's earlier ones included"
PRESET = "head, steps, sets and learning rate that fit the data, where no option names them"
MISSING_GENES = "genes that new cells lack: not expressed, or the mean of the cells known"
MODALITY = "part of a MuData file to read, such as rna; default: the only one"
VALUES = "what the values are; auto: found out"
ENCODER = "encoder"
CACHE = "cache of embeddings"
CHECKPOINT = "checkpoint of the run: best, last or checkpoint-step-N"
SPLITS = "splits TOML"
FEATURES = "perturbation features"
N_CELLS = "cells of each perturbation"
GENES = "file of gene names, one a line"
MIXED = "files that were normalised differently"
MAX_TIME = "stop and save before so long is over, such as 3h50m (exit code 142)"
TARGET_SUM = "counts a cell is normalised to before log1p"


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None, most: float | None = None
) -> Any:
    """A field of a configuration: its default, one line with its unit, and what values it takes.

    Where it takes numbers too, `choices` are the words it takes.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "most": most})


@dataclass(frozen=True)
class Config:
    """What every stage's configuration can do: be checked, read from TOML and written as plain values.

    A path may be given where text is wanted, a whole number where a number is, and a number as text where text may
    stand too; it is kept as what it stands for.
    """

    _kinds: ClassVar[dict[str, tuple[type, ...]]]

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            name, kinds = f.name.replace("_", "-"), self.kinds()[f.name]
            value = plain(getattr(self, f.name), kinds)
            object.__setattr__(self, f.name, value)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise InputError(f"{name} is {value!r}; it takes {' or '.join(KINDS[k] for k in kinds)}.")
            choices, least, most = (f.metadata[key] for key in ("choices", "least", "most"))
            if choices and isinstance(value, str) and value not in choices:
                number = "".join(f"{KINDS[k]} or " for k in kinds if k in (int, float))
                raise InputError(
                    f"{name} is {value!r}; it takes {number}one of: {', '.join(choices)}.{nearest(value, choices)}"
                )
            if isinstance(value, (int, float)) and least is not None and not value >= least:
                raise InputError(f"{name} is {value}; it must be at least {least:g}.")
            if isinstance(value, (int, float)) and most is not None and not value <= most:
                raise InputError(f"{name} is {value}; it must be at most {most:g}.")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all fields."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def kinds(cls) -> dict[str, tuple[type, ...]]:
        """The types that each field takes."""
        if "_kinds" not in vars(cls):
            hints = get_type_hints(cls)
            kinds = {n: get_args(hints[n]) if isinstance(hints[n], UnionType) else (hints[n],) for n in cls.names()}
            cls._kinds = {name: tuple(get_origin(kind) or kind for kind in kinds[name]) for name in kinds}
        return cls._kinds

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """Build from plain values.

        Raises:
            InputError: a key that has another name now, an unknown one (with the nearest known one), or a value of the
                wrong kind.
        """
        known = cls.names()
        for key in values:
            if now := RENAMED.get(cls.__name__, {}).get(key):
                raise InputError(f"{where}: {key} is now {now}.")
            if key not in known:
                raise InputError(f"Unknown key '{key}' in {where}.{nearest(key, known)} Known: {shown(known, 60)}.")
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """Plain values for TOML or JSON; fields that are not set are left out."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


def plain(value: Any, kinds: tuple[type, ...]) -> Any:
    """A value as what it stands for: a path as text, "1" as 1 where both may stand, 1 as 1.0, "a, b" as two words.

    Where text may stand beside a list, commas in it mean nothing, and a list of one text is that text.
    """
    if {str, tuple} <= set(kinds) and isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else tuple(value) or None
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    if isinstance(value, (str, list)) and tuple in kinds and str not in kinds:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)
    number = next((kind for kind in (int, float) if kind in kinds), None)
    is_text = isinstance(value, str) and str in kinds
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if number is not None and (is_text or is_whole):
        with suppress(ValueError, OverflowError):
            return number(value)
    return value


def seconds_of(text: str | None, name: str = "max-time") -> float | None:
    """Seconds of a length of time such as 3h50m, 90m, 1d12h or 45s; None of None.

    Raises:
        InputError: it is none, or 0; `name` is that of the option.
    """
    if text is None:
        return None
    found = _TIME.fullmatch(text.strip().lower())
    numbers = [int(part or 0) for part in found.groups()] if found else []
    seconds = float(sum(number * unit for number, unit in zip(numbers, (86_400, 3_600, 60, 1), strict=False)))
    if not seconds:
        raise InputError(f"{name} is {text!r}; it takes a length of time with units, such as 3h50m, 90m, 1d12h or 45s.")
    return seconds


def toml_bytes(path: Path) -> bytes:
    """The bytes of a TOML file.

    Raises:
        InputError: it cannot be read, or is larger than any of ours; without its name.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_TOML + 1)
    except OSError as error:
        close = nearest_file(path) if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"cannot read it: {error.strerror}.{close}") from None
    if len(raw) > MAX_TOML:
        raise InputError(f"larger than {MAX_TOML:,} bytes, which no such file needs. Is it the right file?")
    return raw


def parse_toml(raw: bytes) -> dict[str, Any]:
    """What a TOML file says, which may be anybody's.

    Raises:
        InputError: it is no TOML, or what would take long; without the name of the file.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"not UTF-8 text (at line {bad_line}).") from None
    if '"""' in text or "'''" in text:
        raise InputError("multi-line strings are not used here: put names and paths in plain quotes.")
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


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file's keys. Dashes in keys are underscores.

    Raises:
        InputError: no such file, over 1 MB, or not TOML.
    """
    try:
        values = parse_toml(toml_bytes(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    names = [key.replace("-", "_") for key in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path} has {twice[0]} twice, with dashes and with underscores. Keep one.")
    return dict(zip(names, values.values(), strict=True))
