"""Compile with numba, once a machine; where numba is not there, do the same with NumPy or PyTorch, more slowly."""

from __future__ import annotations

import atexit
import importlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

from sest.errors import is_out_of_memory

numba: Any = None
REASON = ""  # why nothing is compiled here; "": everything is
try:
    numba = importlib.import_module("numba")
except ImportError as error:  # not installed, or not made for this Python or this NumPy
    if is_out_of_memory(error):
        raise
    REASON = str(error)

logger = logging.getLogger(__name__)

NOWHERE = "no locator available"  # what numba says where no folder for its cache can be written


def compiled(
    plain: Callable[..., Any] | None, nogil: bool = False, reordered: bool = False, inside: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit`, cached where a folder for it can be written; without one, each process compiles for itself.

    The folder is `__pycache__` beside the source, else the user's cache folder, or NUMBA_CACHE_DIR.

    Args:
        plain: what takes the function's place where numba is not there: the same for whole arrays, never a loop over
            values in Python. None: only compiled functions call it.
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
        if numba is None:
            return plain or function
        try:
            loop = numba.njit(function, cache=True, **options)
        except RuntimeError as error:
            if NOWHERE not in str(error):
                raise
            loop = numba.njit(function, **options)
        loop.plain = plain  # for tests, which hold one against the other
        return loop

    return decorate


@lru_cache(maxsize=1)
def say_slow_loops() -> None:
    """Say, once a process, that nothing is compiled where numba is not there."""
    if REASON:
        logger.info(f"Cells are read and scored more slowly without numba ({REASON}).")


def import_compiled(name: str) -> ModuleType:
    """Import a package that caches what numba compiles; where no folder for it can be written, in one of this process.

    Raises:
        ImportError: it is not installed, or numba is not.
        OSError: not even a temporary folder can be written.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if NOWHERE not in str(error):
            raise
    folder = tempfile.mkdtemp(prefix="sest-numba-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder
    return importlib.import_module(name)
