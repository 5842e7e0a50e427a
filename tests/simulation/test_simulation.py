"""The options of a simulated screen: what they add up to, and which of them cannot be."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.screens import TINY
from sest.errors import InputError
from sest.simulation.simulation import Simulation


def test_cells_are_counted_with_their_controls() -> None:
    assert TINY.n_cells == 2 * (20 + 6 * 5)
    assert Simulation(cell_types=("one",)).n_cells == 400 + 40 * 100


@pytest.mark.parametrize(("given", "names"), [(["a", "b"], ("a", "b")), ("a", ("a",)), ("a, b", ("a", "b"))])
def test_cell_types_may_be_a_list_or_text_with_commas(given: object, names: tuple[str, ...]) -> None:
    sim = Simulation.from_values({"cell_types": given}, "a call")
    assert sim == Simulation(cell_types=names) and hash(sim) == hash(Simulation(cell_types=names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_perturbations": 31}, "31 perturbations need 124 genes"),
        ({"n_controls": 0}, "n-controls is 0; it must be at least 1"),
        ({"n_genes": 2e3}, "n-genes is 2000.0; it takes a whole number"),
        ({"cell_types": ("a", "a")}, "cell_types must be distinct"),
        ({"cell_types": ()}, "cell_types must be distinct"),
        ({"cell_types": 2}, "cell-types is 2; it takes a list"),
        ({"n_features": 4}, "n_features 4 cannot hold 8 programs"),
        ({"expressed_genes": 120}, "expressed_genes is 120"),
        ({"knockdown": 1.0}, "knockdown is 1.0"),
        ({"null_fraction": 1.5}, "null-fraction is 1.5"),
        ({"effect_size": -1.0}, "effect-size is -1.0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_a_misspelt_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"Unknown key 'n_gene' in a call\. Did you mean 'n_genes'"):
        Simulation.from_values({"n_gene": 3}, "a call")


def test_every_option_says_what_it_is_and_importing_them_is_fast() -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(Simulation))
    code = (
        "import sys, sest.simulation.simulation; "
        "print(sorted({'torch', 'anndata', 'zarr', 'h5py', 'scipy', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
