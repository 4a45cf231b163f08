"""Imports run downwards only, and heavy packages load lazily."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "penult"

# Rooms from the ground up; on one floor, only to a room listed above.
FLOORS = [
    ["special", "io", "processes"],
    ["distributions", "head", "activations"],
    ["bases"],
    ["pair"],
    ["scores", "realism", "distill", "generate", "data"],
    ["report", "testing"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
RANK = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
CORE = {"torch", "safetensors", "penult"} | set(sys.stdlib_module_names)
EXTRAS = {
    "distill": {"lightning", "torchmetrics"},
    "generate": {"lightning"},
    "report": {"jinja2", "markupsafe", "matplotlib", "cycler", "numpy"},
    "cli": {"typer", "rich"},
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree, module_level_only=False):
    """Every module that a file imports, with penult's own as ``penult.room``."""
    skipped = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        lazy = module_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if typing_only or lazy:
            skipped |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module == "penult":
                yield from (f"penult.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in RANK, f"{room} is no room of the house"
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "penult" and len(parts) > 1 and parts[1] not in (room, "__version__"):
            assert RANK[parts[1]] < RANK[room], f"{room} imports {parts[1]}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_load_lazily(path):
    allowed = CORE | EXTRAS.get(room_of(path), set())
    heavy = {name.split(".")[0] for name in imports(ast.parse(path.read_text()), module_level_only=True)} - allowed
    assert not heavy
