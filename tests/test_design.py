"""docs/design.md against the code: floors, figure, modules, the head's parameters."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import torch
from conftest import ROOT
from test_rooms import FLOORS

from sest.head.model import HeadSizes, StateTransition, n_parameters

PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"


def rows(header: str) -> list[list[str]]:
    """The cells of the table with this first line."""
    _, found, after = PAGE.partition(f"\n{header}\n")
    assert found, header
    table = after.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def test_the_table_of_the_floors_is_that_of_the_rooms_test() -> None:
    table = [(int(number), tuple(re.findall(r"`(\w+)`", rooms))) for number, rooms in rows("| floor | rooms |")]
    assert table == list(reversed(list(enumerate(FLOORS))))


def test_the_figure_has_the_rooms_on_their_floors() -> None:
    names: dict[float, list[str]] = {}  # height in the figure -> rooms
    for text in ElementTree.parse(ROOT / "docs" / "rooms.svg").iter(f"{SVG}text"):
        if text.get("class") == "room":
            names.setdefault(float(text.attrib["y"]), []).append(str(text.text))
    assert [tuple(names[y]) for y in sorted(names, reverse=True)] == list(FLOORS)


def test_every_module_that_the_page_names_exists() -> None:
    way = [re.findall(r"`([\w/]+\.py)`", row[-1]) for row in rows("| form | what happens to it | modules in `sest/` |")]
    assert all(way), way
    named = [ROOT / "sest" / module for modules in way for module in modules]
    named += [ROOT / path for path in re.findall(r"`((?:sest|tests)/[\w/]+\.py)`", PAGE)]
    assert [str(path) for path in named if not path.is_file()] == []


def test_the_parameters_of_the_head_are_counted() -> None:
    with torch.device("meta"):
        head = StateTransition(HeadSizes(dim=512, n_features=5120, n_genes=18_080))
    parts = {name: f"{n_parameters(part):,}" for name, part in head.named_children()}
    assert {part.strip("`"): count for part, _, count in rows("| part | what it is | parameters |")} == parts
    assert f"**{n_parameters(head):,}** parameters" in PAGE
