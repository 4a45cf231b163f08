"""What the documentation shows is what the library does; Sphinx itself is not needed here."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import penult

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:\w+):: (penult[\w.]*)", flags=re.MULTILINE)
EXECUTED = "file_format: mystnb"


def run(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def static_code(page):
    text = page.read_text(encoding="utf-8")
    return "" if EXECUTED in text else "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def found(name):
    """The object of a dotted name; a function hides a module of the same name, as it does on import."""
    module, _, last = name.rpartition(".")
    if not module:
        return importlib.import_module(name)
    parent = found(module)
    return getattr(parent, last) if hasattr(parent, last) else importlib.import_module(name)


def rooms():
    names = [name for _, name, _ in pkgutil.iter_modules(penult.__path__) if not name.startswith("_")]
    return ["penult", *(f"penult.{name}" for name in names)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    out = run(tmp_path, example)
    assert len(out.splitlines()) >= 5
    assert not list(tmp_path.iterdir())


def test_examples_are_short():
    assert len(EXAMPLES) >= 2
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES)


@pytest.mark.parametrize("page", [page for page in PAGES if static_code(page)], ids=lambda path: path.stem)
def test_code_that_sphinx_does_not_execute_runs(page, tmp_path):
    (tmp_path / "page.py").write_text(static_code(page), encoding="utf-8")
    run(tmp_path, "page.py")


def test_the_first_page_has_code():
    code = static_code(DOCS / "index.md")
    assert "penult.find_head" in code
    assert len([line for line in code.splitlines() if line]) <= 14


def documented():
    names = [
        name for page in sorted((DOCS / "api").glob("*.md")) for name in DIRECTIVE.findall(page.read_text("utf-8"))
    ]
    assert len(set(names)) == len(names), "a name is documented twice"
    return names


@pytest.mark.parametrize("room", rooms())
def test_every_public_name_is_documented_once(room):
    module, names = importlib.import_module(room), documented()
    for name in module.__all__:
        value = getattr(module, name)
        there = [each for each in names if each.rpartition(".")[2] == name and found(each) is value]
        if room == "penult" and value is sys.modules.get(f"penult.{name}"):
            continue  # a room: its own names are looked for
        assert len(there) == 1, f"{room}.{name} stands in docs/api {len(there)} times: {there}"


def test_pages_are_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            listed |= {page.parent / f"{line}.md" for line in block.splitlines() if line and not line.startswith(":")}
    assert listed == set(PAGES)


def test_citation_and_changelog_belong_to_this_version():
    assert f"version: {penult.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert penult.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")
