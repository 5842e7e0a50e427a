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


@compiled()
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
    @compiled()
    def write(values: np.ndarray, place: int) -> None:
        values[place] = 7.0

    values = np.zeros(9)
    with pytest.raises(IndexError):
        write(values[3:6], place)
    assert not values.any()


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
