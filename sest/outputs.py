"""Where a command may write, and what tables for other programs are like: one rule for all of them.

What exists is refused unless it is to be replaced; what the command reads is refused always, whatever name it goes by.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sest.errors import InputError, shown

if TYPE_CHECKING:
    import pandas as pd

Place = str | os.PathLike[str]
LONGEST_NAME = 230  # bytes, of the 255 that file systems take: what is written aside has a longer name
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # how text begins that spreadsheets compute (OWASP)


def check_output(
    path: Place,
    *,
    inputs: Iterable[Place | None] = (),
    force: bool = False,
    suffixes: Collection[str] = (),
    made: Collection[str] | None = None,
) -> None:
    """Refuse a place that cannot or must not be written to; to be called before any work.

    Args:
        path: the file to write; with `made`, the folder.
        inputs: files and folders that the command reads, and what else it writes. None stands for one not given.
        force: a file that exists is to be replaced, or a folder that holds nothing but `made`.
        suffixes: how the name may end; none: in any way.
        made: names in the folder that is written, which may be there already if it is empty.

    Raises:
        InputError: the place is an input, a part of one or around one; it exists; or nothing can be made there.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{path} does not end in {shown(suffixes)}. Give a name that does.")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise InputError(f"The name {path.name[:60]}... is too long: at most {LONGEST_NAME} bytes. Give a shorter one.")
    for other in inputs:
        if other is not None:
            _refuse_input(path, other)
    refuse_inside_store(path)
    if made is None:
        _check_file(path, force)
    else:
        _check_folder(path, force, made)


def to_csv(table: pd.DataFrame, path: Place | None = None) -> str | None:
    """Write a table without its index; as text where there is no `path`.

    Text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    table = table.copy(deep=False)
    for name in table.columns:
        if table[name].dtype.kind not in "biuf":
            plain = {text: f"'{text}" for text in table[name].unique() if str(text).startswith(FORMULA)}
            if plain:
                table[name] = table[name].astype(object).map(lambda text, plain=plain: plain.get(text, text))
    return table.to_csv(path, index=False)


def is_same(path: Place, other: Place) -> bool:
    """Whether two names lead to one file or folder: through links of both kinds, and where neither exists yet."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(other)
    except ValueError:  # no path at all, such as text with a null in it
        return False


def refuse_inside_store(path: Place) -> None:
    """Refuse a place in a cache or another Zarr store: its folders are those of its arrays.

    Raises:
        InputError: it is in one.
    """
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / "zarr.json").is_file():
            raise InputError(f"{path} would lie in {folder}, a Zarr store. Give a place outside of it.")


def _refuse_input(path: Path, other: Place) -> None:
    if is_same(path, other):
        name = "" if str(path) == os.fspath(other) else f" as {os.fspath(other)}"
        raise InputError(f"{path} is used by this command already{name}, and never replaced. Give another name.")
    if not (path.exists() and os.path.exists(other)):
        return
    here, there = Path(os.path.realpath(path)), Path(os.path.realpath(other))
    if there in here.parents:
        raise InputError(f"{path} is a part of {other}, which this command reads: never replaced. Give another name.")
    if here in there.parents:
        raise InputError(f"{path} holds {other}, which this command reads: never replaced. Give another name.")


def _check_file(path: Path, force: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file to write.")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file, and not replaced. Give another name.")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists. Pass --force to replace it, or give another name.")
    if not path.parent.is_dir():
        raise InputError(f"No folder {path.parent} to write {path.name} in. Create it first.")
    _check_permission(path, path.parent)


def _check_folder(path: Path, force: bool, made: Collection[str]) -> None:
    if os.path.lexists(path):
        held = sorted(os.listdir(path)) if path.is_dir() else []
        if not path.is_dir():
            raise InputError(f"{path} exists and is not an empty folder. Give another name.")
        if other := [name for name in held if name not in made]:
            raise InputError(
                f"{path} exists and is not an empty folder: it holds {shown(other)}, which is never replaced. "
                "Give another name."
            )
        if held and not force:
            raise InputError(
                f"{path} exists and is not an empty folder. Pass --force to replace what is in it, or give another "
                "name."
            )
    _check_permission(path, next(folder for folder in path.absolute().parents if folder.exists()))


def _check_permission(path: Path, folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"Cannot write to {folder}. Choose another place for {path.name}.")
