"""The product as syntax trees: every module of sest, sest.cache and sest.cli, and the names it uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {"sest": "sest", "sest.cache": "cache", "sest.cli": "cli"}  # package -> where it lies; rooms are below sest/


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name; `__init__` by that of its package."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):  # does not follow the links sest/cache and sest/cli
            parts = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too: `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def used(path: Path) -> frozenset[str]:
    """What a module imports, and the dotted names it reads of that, whatever it calls it: `import os as o; o.path.sep`
    gives `os`, `os.path` and `os.path.sep`."""
    meant: dict[str, str] = {}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            meant |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names = set(imported(path))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute):
            root, *rest = ast.unparse(node).split(".")
            names.add(".".join([meant.get(root, root), *rest]))
    return frozenset(names)
