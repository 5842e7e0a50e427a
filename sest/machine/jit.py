"""Compile with numba, once a machine."""

from __future__ import annotations

import atexit
import importlib
import shutil
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba

NOWHERE = "no locator available"  # what numba says where no folder for its cache can be written


def compiled(
    nogil: bool = False, reordered: bool = False, inside: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit`, cached where a folder for it can be written; without one, each process compiles for itself.

    The folder is `__pycache__` beside the source, else the user's cache folder, or NUMBA_CACHE_DIR.

    Args:
        nogil: other threads run meanwhile.
        reordered: sums may be taken in another order, and so by several lanes of the processor at once.
        inside: the function stays inside its arrays whatever numbers they hold, by what it checks itself or by how it
            computes places. Of any other, every place is checked (IndexError): a file's numbers must not decide where
            memory is written.
    """
    options: dict[str, Any] = {
        "nogil": nogil,
        "fastmath": {"reassoc", "nsz"} if reordered else False,
        "boundscheck": not inside,
    }

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(function, cache=True, **options)
        except RuntimeError as error:
            if NOWHERE not in str(error):
                raise
            return numba.njit(function, **options)

    return decorate


def import_compiled(name: str) -> ModuleType:
    """Import a package that caches what numba compiles; where no folder for it can be written, in one of this process.

    Raises:
        ImportError: it is not installed.
        OSError: not even a temporary folder can be written.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if NOWHERE not in str(error):
            raise
    folder = tempfile.mkdtemp(prefix="sest-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    return importlib.import_module(name)
