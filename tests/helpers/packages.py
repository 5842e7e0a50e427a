"""What is installed, and what needs what."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def canonical(requirement: str) -> str:
    """The name in a line such as "PyYAML>=6.0.2 # why"."""
    return str(canonicalize_name(Requirement(requirement.partition("#")[0].strip()).name))


def needed_by(names: Iterable[str]) -> set[str]:
    """These packages and all that they need here, as far as it is installed."""
    found, todo = set[str](), [canonical(name) for name in names]
    while todo:
        name = todo.pop()
        try:
            needed = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        here = [needs.name for needs in needed if needs.marker is None or needs.marker.evaluate({"extra": ""})]
        found.add(name)
        todo += {canonical(each) for each in here} - found
    return found
