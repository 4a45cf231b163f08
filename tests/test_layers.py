"""The walls: imports run downwards, private modules stay in their room, heavy packages load lazily."""

import ast
import functools
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "penult"

# Rooms from the ground up; on one floor, only to a room listed above.
FLOORS = [
    ["_version", "_row_blocks", "_checks", "_extras", "_progress"],
    ["special", "io", "processes"],
    ["distributions", "head", "activations"],
    ["bases"],
    ["_derived", "pair", "moments"],
    ["scores", "realism", "distill", "generate", "data"],
    ["report", "testing"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
RANK = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
SHARED = {"_version", "_row_blocks", "_checks", "_extras", "_progress", "_derived"}  # private files that all rooms use
CORE = {"torch", "safetensors", "penult"} | set(sys.stdlib_module_names)
EXTRAS = {
    "distill": {"lightning", "torchmetrics"},
    "generate": {"lightning"},
    "report": {"jinja2", "markupsafe", "matplotlib", "cycler", "numpy"},
    "cli": {"typer", "rich"},
}
MOST_FILES = 169
MOST_LINES = 480
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def _parsed():
    """Parse every file once, which is no part of the first test."""
    for path in FILES:
        own_imports(path)
        own_imports(path, module_level_only=True)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path):
    return str(path.relative_to(PACKAGE))


def imports(tree, module_level_only=False):
    """Every module or name that a file imports, with penult's own in full: ``penult.room.module.name``."""
    skipped = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        lazy = module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (typing_only and module_level_only) or lazy:
            skipped |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module.partition(".")[0] == "penult":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@functools.cache
def file_of(name):
    """The file of the package that an imported name stands in, or None for another package."""
    parts = name.split(".")
    if parts[0] != "penult":
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return PACKAGE / "__init__.py"


@functools.cache
def own_imports(path, module_level_only=False):
    """Files of the package that a file imports."""
    found = (file_of(name) for name in imports(tree_of(path), module_level_only))
    return {file for file in found if file is not None and file != path}


def test_imports_run_downwards():
    upward = []
    for path in FILES:
        room = room_of(path)
        assert room in RANK, f"{room} is no room of the house"
        for file in own_imports(path):
            other = room_of(file)
            if other != "__init__" and other != room and RANK[other] >= RANK[room]:
                upward.append(f"{name_of(path)} imports {name_of(file)}")
    assert not upward


def test_nothing_imports_the_package_itself():
    whole = [name_of(path) for path in FILES if PACKAGE / "__init__.py" in own_imports(path)]
    assert not whole


def test_private_modules_stay_in_their_room():
    foreign = [
        f"{name_of(path)} imports {name_of(file)}"
        for path in FILES
        for file in own_imports(path)
        if file.name.startswith("_") and file.name != "__init__.py" and room_of(file) not in {room_of(path), *SHARED}
    ]
    assert not foreign


def test_no_circles():
    graph = {path: own_imports(path, module_level_only=True) for path in FILES}
    state = {}

    def visit(path, way):
        if state.get(path) == "done":
            return
        assert path not in way, " -> ".join(map(name_of, [*way[way.index(path) :], path]))
        for file in graph.get(path, ()):
            # A package is imported before its modules, so `from room import name` inside the room is no circle.
            if file.name != "__init__.py" or room_of(file) != room_of(path):
                visit(file, [*way, path])
        state[path] = "done"

    for path in FILES:
        visit(path, [])


def test_heavy_packages_load_lazily():
    heavy = {}
    for path in FILES:
        allowed = CORE | EXTRAS.get(room_of(path), set())
        if names := {name.split(".")[0] for name in imports(tree_of(path), module_level_only=True)} - allowed:
            heavy[name_of(path)] = names
    assert not heavy


def test_the_package_is_not_crowded():
    assert len(FILES) + 1 <= MOST_FILES
    long = {name_of(path): lines for path in FILES if (lines := path.read_text().count("\n")) > MOST_LINES}
    assert not long


def test_no_private_name_stands_in_three_rooms():
    rooms = defaultdict(set)
    for path in FILES:
        if path.name.startswith("_") and not path.name.startswith("__"):
            rooms[path.name].add(room_of(path))
    assert not {name: sorted(where) for name, where in rooms.items() if len(where) > 2}
