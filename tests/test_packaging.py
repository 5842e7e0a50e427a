"""What is shipped, what it needs, and which way imports point."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"sest": "sest", "sest.cli": "cli", "sest.cache": "cache"}  # package -> folder
SLOW_IMPORTS = {"torch", "anndata", "zarr", "pandas", "scipy", "h5py"}  # 0.1 to 3 s each


def _modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    """Each module of `package`, without its subpackages, parsed."""
    paths = sorted((ROOT / FOLDERS[package]).glob("*.py"))
    assert paths, f"no modules in {FOLDERS[package]}/"
    for path in paths:
        yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imported(package: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names a module imports, inside functions too: `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_an_init_is_in_the_packages_list(project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == FOLDERS


def test_every_file_in_a_package_is_python_or_declared_as_data(project: dict[str, Any]) -> None:
    """setuptools ships only *.py unless told otherwise, so any other file would be missing from the wheel."""
    declared = project["tool"]["setuptools"].get("package-data", {})
    for package, folder in FOLDERS.items():
        shipped = {p for pattern in ["*.py", *declared.get(package, [])] for p in (ROOT / folder).glob(pattern)}
        files = {p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert files == shipped


def test_the_cache_imports_neither_torch_nor_the_rest_of_sest() -> None:
    for path, tree in _modules("sest.cache"):
        for name in _imported("sest.cache", tree):
            assert not _is_in(name, "torch"), f"{path.name} imports {name}"
            assert name == "sest" or not _is_in(name, "sest") or _is_in(name, "sest.cache"), (
                f"{path.name} imports {name}"
            )


def test_the_science_does_not_import_the_command_line() -> None:
    for path, tree in _modules("sest"):
        if path.name != "__main__.py":  # `python -m sest` is the command
            assert not [name for name in _imported("sest", tree) if _is_in(name, "sest.cli")], path.name


def test_training_does_not_import_the_encoder() -> None:
    tree = ast.parse((ROOT / "sest" / "train.py").read_text(encoding="utf-8"))
    assert not [name for name in _imported("sest", tree) if _is_in(name, "sest.encoder")]


def test_torch_load_appears_in_exactly_one_file() -> None:
    """Pickles from elsewhere are read in one place, which knows what to refuse."""
    places = set()
    for package in FOLDERS:
        for path, tree in _modules(package):
            loads = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            if {"torch.load", "torch.serialization.load"} & {*loads, *_imported(package, tree)}:
                places.add(path.relative_to(ROOT).as_posix())
    assert len(places) == 1, places


def test_cli_and_cache_cannot_be_imported_by_themselves(tmp_path: Path) -> None:
    code = """
import importlib.util, sest.cli, sest.cache
assert importlib.util.find_spec("cli") is None and importlib.util.find_spec("cache") is None
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_the_command_line_imports_nothing_slow_before_a_command_runs() -> None:
    code = f"import sys; from sest.cli.main import app; print(*sorted({SLOW_IMPORTS!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_third_party_import_is_a_declared_dependency(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    optional = ("eval", "hub", "sinkhorn", "tensorboard", "wandb")
    needed = [*project["project"]["dependencies"], *(package for extra in optional for package in extras[extra])]
    declared = {_canonical(re.split(r"[<>=!;\[ ]", requirement)[0]) for requirement in needed}
    distributions = metadata.packages_distributions()
    for package in FOLDERS:
        for path, tree in _modules(package):
            for top in {name.split(".")[0] for name in _imported(package, tree)}:
                if top != "sest" and top not in sys.stdlib_module_names:
                    names = {_canonical(name) for name in distributions.get(top, [top])}
                    assert names & declared, f"{path.name} imports {top}, which pyproject.toml does not name"


def test_every_extra_an_error_message_names_exists(project: dict[str, Any]) -> None:
    extras = set(project["project"]["optional-dependencies"])
    for folder in FOLDERS.values():
        for path in (ROOT / folder).glob("*.py"):
            assert set(re.findall(r"sest\[(\w+)\]", path.read_text(encoding="utf-8"))) <= extras, path.name


def test_the_installed_version_is_that_of_the_source() -> None:
    """An old install left beside a new checkout fails here and not in stranger ways."""
    import sest

    assert metadata.version("sest") == sest.__version__


def _canonical(name: str) -> str:
    """PEP 503: `tomli_w`, `Tomli-W` -> `tomli-w`."""
    return re.sub(r"[-_.]+", "-", name).lower()
