"""The rooms of sest/: what each may import, read from the syntax tree; see docs/design.md for why they are these."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from helpers.source_tree import ROOT, imported, modules, parsed, used

# From the ground up: a room imports only rooms on the floors below its own.
FLOORS = (
    ("errors",),
    ("cache", "progress", "outputs", "options", "hub", "untrusted", "baselines"),
    ("config", "files", "head", "machine", "datasets"),
    ("cells", "se", "notebook"),
    ("encoder", "data", "blend"),
    ("embedding", "runs", "evaluation", "simulation"),
    ("training", "prediction"),
    ("facts",),
    ("report", "compat", "describe"),
    ("pipeline",),
    ("api",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 10, 400, 80
# The one place of what is easy to get wrong. A name covers what is below it: `pickle` covers pickle.load.
ONLY_IN = {
    "torch.load": "sest/untrusted/",
    "torch.serialization": "sest/untrusted/",
    "pickle": "sest/untrusted/",
    "os.replace": "cache/disk.py",
    "os.rename": "cache/disk.py",
    "os.fsync": "cache/disk.py",
}
NOWHERE = ("os.renames", "os.fdatasync", "os.sync", "shutil.move", "marshal", "shelve", "joblib", "cloudpickle", "dill")


def room_of(name: str) -> str:
    """The room (or module of the top level) of a dotted name below `sest`; "" for sest itself."""
    return name.split(".")[1] if "." in name else ""


@cache
def arrows() -> dict[str, dict[str, set[str]]]:
    """Room -> rooms it imports -> the modules that do. `sest` itself offers every room and belongs to none."""
    known, found = modules(), dict[str, dict[str, set[str]]]()
    for name, path in known.items():
        here = room_of(name)
        for target in imported(path):
            if target in known and here and room_of(target) not in ("", here) and here != "__main__":
                found.setdefault(here, {}).setdefault(room_of(target), set()).add(name)
    return found


def reach(room: str) -> set[str]:
    """The rooms a room imports, also through others."""
    seen, todo = set[str](), [room]
    while todo:
        for other in arrows().get(todo.pop(), {}):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def test_every_room_has_a_floor() -> None:
    assert {room_of(name) for name in modules()} - {"", "__main__"} == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    up = {other: who for other, who in arrows().get(room, {}).items() if FLOOR[other] >= FLOOR[room]}
    assert up == {}


@pytest.mark.parametrize("room", ["head", "data", "runs", "training"])
def test_what_a_training_step_runs_never_reaches_the_encoder(room: str) -> None:
    assert reach(room) & {"se", "encoder", "embedding"} == set()


def test_the_head_imports_only_errors_and_the_cache_no_torch() -> None:
    assert set(arrows()["head"]) <= {"errors"}
    for name, path in modules().items():
        if name.startswith("sest.cache"):
            assert not [target for target in imported(path) if target.split(".")[0] == "torch"], name


def test_the_library_does_not_import_its_command_line() -> None:
    assert {room for room, others in arrows().items() if "cli" in others} == set()


@pytest.mark.parametrize("name", [*ONLY_IN, *NOWHERE])
def test_what_is_easy_to_get_wrong_is_in_one_place(name: str) -> None:
    places = {
        path.relative_to(ROOT).as_posix()
        for path in modules().values()
        if any(use == name or use.startswith(f"{name}.") for use in used(path))
    }
    assert {place for place in places if not place.startswith(ONLY_IN.get(name, "nowhere"))} == set()
    assert places or name in NOWHERE, f"nothing uses {name} any more"


def test_a_name_is_known_whatever_a_module_calls_it(tmp_path: Path) -> None:
    for i, text in enumerate((
        "import os\nos.replace(a, b)",
        "import os as system\nsystem.replace(a, b)",
        "from os import replace as put\nput(a, b)",
        "def later():\n    import os\n    return os.replace",
    )):  # fmt: skip
        path = tmp_path / f"{i}.py"
        path.write_text(text)
        assert "os.replace" in used(path), text


def is_rename(call: ast.Call) -> bool:
    """Whether it looks like `path.rename(other)` or `path.replace(other)`; strings replace one thing by another."""
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return method in ("rename", "replace") and len(call.args) == 1 and not call.keywords and not _is_none(call.args[0])


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None  # what an index is renamed to


@pytest.mark.parametrize("name", modules())
def test_paths_are_renamed_by_nothing_but_the_durable_writes(name: str) -> None:
    path = modules()[name]
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call) and is_rename(node)]
    assert [f"line {call.lineno}: {ast.unparse(call)}" for call in calls] == [] or name == "sest.cache.disk"


def test_a_rename_is_known_by_how_it_is_called() -> None:
    lines = {
        "path.rename(other)": True,
        "(folder / name).replace(folder / 'other')": True,
        "text.replace('a', 'b')": False,
        "dataclasses.replace(config, seed=1)": False,
        "table.rename(columns={'a': 'b'})": False,
        "index.rename(None)": False,
        "replace(config)": False,
    }
    for line, expected in lines.items():
        call = ast.parse(line, mode="eval").body
        assert isinstance(call, ast.Call) and is_rename(call) == expected, line


def test_a_room_holds_at_most_ten_modules() -> None:
    for room in {path.parent for path in modules().values()}:
        names = [path.name for path in room.glob("*.py") if not path.name.startswith("__")]
        assert len(names) <= MOST_MODULES or room.name == "cli", f"{room.name}: {len(names)} modules"


@pytest.mark.parametrize("name", modules())
def test_no_module_and_no_function_is_long(name: str) -> None:
    path = modules()[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert n_lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {n_lines} lines"


def where_tested(name: str) -> Path:
    """tests/<room>/test_<module>.py"""
    _, *rooms, module = name.split(".")
    return ROOT.joinpath("tests", *rooms, f"test_{module}.py")


TESTED = [name for name, path in modules().items() if not path.name.startswith("__")]


@pytest.mark.parametrize("name", TESTED)
def test_every_module_has_a_test_module_of_its_name_in_the_same_room(name: str) -> None:
    assert where_tested(name).is_file(), where_tested(name).relative_to(ROOT)


def test_every_test_module_in_a_room_is_named_after_a_module_of_it() -> None:
    """`test_<module>_<what>.py` too, where one file would be long. At the top level stand tests of the whole."""
    stray = set()
    for room in FLOOR:
        named = tuple(f"test_{name.split('.')[-1]}" for name in TESTED if room_of(name) == room)
        for path in (ROOT / "tests" / room).glob("test_*.py"):
            if path.stem not in named and not path.stem.startswith(tuple(f"{name}_" for name in named)):
                stray.add(f"{room}/{path.name}")
    assert stray == set()
