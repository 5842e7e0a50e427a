"""machine/jit.py: compiled once a machine where the result can be kept, and compiled anyway where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sest.machine.jit import compiled

MODULE = """
from sest.machine.jit import compiled


@compiled(None)
def squares(n):
    total = 0
    for i in range(n):
        total += i * i
    return total


print(squares(5), sum(squares.stats.cache_hits.values()))
"""
NO_FOLDER = """
from numba.core import caching
for kind in (caching.UserProvidedCacheLocator, caching.InTreeCacheLocator, caching.UserWideCacheLocator):
    kind.from_function = classmethod(lambda *arguments: None)
"""


def run(folder: Path, code: str) -> str:
    """What a fresh process prints that runs `code`, with warnings as errors."""
    file = folder / "squares.py"
    if not file.exists() or file.read_text() != code:  # numba before 0.68 goes by when a file was written
        file.write_text(code)
    command = [sys.executable, "-W", "error", str(file)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_the_second_process_loads_what_the_first_one_compiled(tmp_path: Path) -> None:
    assert run(tmp_path, MODULE) == "30 0\n"  # 0 + 1 + 4 + 9 + 16, compiled here
    assert run(tmp_path, MODULE) == "30 1\n"


def test_where_no_folder_takes_the_result_every_process_compiles_for_itself(tmp_path: Path) -> None:
    for _ in range(2):
        assert run(tmp_path, NO_FOLDER + MODULE) == "30 0\n"
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("place", [3, 2**40, -4])
def test_a_place_that_is_not_in_an_array_is_an_error_and_no_access(place: int) -> None:
    @compiled(None)
    def write(values: np.ndarray, place: int) -> None:
        values[place] = 7.0

    values = np.zeros(9)
    with pytest.raises(IndexError):
        write(values[3:6], place)
    assert not values.any()


@pytest.mark.parametrize(
    ("why", "line"),
    [
        ("raise ModuleNotFoundError(\"No module named 'numba'\")", "No module named 'numba'"),
        ('raise ImportError("Numba needs NumPy 2.0 or less. Got NumPy 2.4.")', "Numba needs NumPy 2.0 or less."),
    ],
)
def test_without_numba_the_plain_form_is_taken_and_that_is_said_once(tmp_path: Path, why: str, line: str) -> None:
    (tmp_path / "numba.py").write_text(why)
    code = (
        "import logging, sys\nlogging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from sest.machine.jit import compiled, say_slow_loops\n"
        "print(compiled(len)(sum)([3, 4]), compiled(None)(sum)([3, 4]))\n"
        "say_slow_loops()\nsay_slow_loops()\n"
    )
    numbers, said = run(tmp_path, code).splitlines()
    assert numbers == "2 7" and line in said and "without numba" in said


def test_no_memory_to_import_numba_is_no_lack_of_numba(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('libllvmlite.so: Cannot allocate memory')")
    with pytest.raises(AssertionError, match="Cannot allocate memory"):
        run(tmp_path, "import sest.machine.jit")


def test_a_package_that_numba_compiles_is_imported_where_neither_home_nor_its_folder_can_be_written(
    tmp_path: Path,
) -> None:
    """As umap-learn is: its import fails there without a folder of this process."""
    package = tmp_path / "package_of_others"
    package.mkdir()
    (package / "__init__.py").write_text("from package_of_others.part import double\n")
    (package / "part.py").write_text("import numba\n\n\n@numba.njit(cache=True)\ndef double(n):\n    return 2 * n\n")
    code = (
        "import numba\nfrom numba.core import caching\nnumba.config.CACHE_DIR = ''\n"
        "for kind in (caching.InTreeCacheLocator, caching.UserWideCacheLocator):\n"
        "    kind.from_function = classmethod(lambda *arguments: None)\n"
        "from sest.machine.jit import import_compiled\n"
        "print(import_compiled('package_of_others').double(21), numba.config.CACHE_DIR)\n"
    )
    number, folder = run(tmp_path, code).split()
    assert number == "42" and not Path(folder).exists()  # gone with the process
