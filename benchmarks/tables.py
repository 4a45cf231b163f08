"""Rewrite the tables of README.md and docs/ from benchmarks/results, so that no figure is typed by hand.

A table is placed between two comments, and everything between them is replaced:

    <!-- table: vmf-accuracy -->
    <!-- /table -->

A new table is a function that is registered under its name with ``@table(name, source)`` of `blocks.py` and reads
benchmarks/results/<source>.json.

Example:
    python benchmarks/tables.py
    python benchmarks/tables.py --check
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tables_distill  # noqa: F401
import tables_gan  # noqa: F401
import tables_generate  # noqa: F401
import tables_heads  # noqa: F401  (registers its tables)
import tables_moments  # noqa: F401
import tables_outliers  # noqa: F401
import tables_realism  # noqa: F401
import tables_vmf  # noqa: F401
from blocks import REGISTRY, Block, TableError

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
OPEN = re.compile(r"<!-- table:")


def markdown(block: Block) -> str:
    """Return a block as Markdown."""
    lines: list[str] = [""]
    for one in block.tables:
        lines += [f"**{one.title}**", "", _row(one.header), _row("---" for _ in one.header)]
        lines += [*map(_row, one.rows), ""]
    for note in block.notes:
        lines += [note, ""]
    return "\n".join([*lines, f"Command: `{block.command}`", "", ""])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def show(name: str, results: dict[str, Any]) -> None:
    """Print a block on the terminal."""
    from rich.console import Console
    from rich.table import Table as Grid

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    block = REGISTRY[name][1](results)
    for one in block.tables:
        grid = Grid(title=_bare(one.title), title_justify="left")
        for column in one.header:
            grid.add_column(_bare(column))
        for row in one.rows:
            grid.add_row(*map(_bare, row))
        console.print(grid)
    for note in block.notes:
        console.print(_bare(note), highlight=False)


def _bare(text: str) -> str:
    return text.replace("**", "").replace("`", "").replace("[", "\\[")


def rewritten(text: str, folder: Path, where: Path) -> str:
    """Return a page with its tables made again from the results.

    Raises:
        TableError: If a marker is not closed, a name is unknown or its results are missing.
    """
    if len(OPEN.findall(text)) != len(BLOCK.findall(text)):
        raise TableError(f"{where}: a table is not closed; end it with <!-- /table -->")

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in REGISTRY:
            raise TableError(f"{where}: no table is called {name!r}; there are {', '.join(sorted(REGISTRY))}")
        source, render = REGISTRY[name]
        path = folder / f"{source}.json"
        if not path.exists():
            raise TableError(f"{path} does not exist; run: python benchmarks/{source}.py")
        block = render(json.loads(path.read_text(encoding="utf-8")))
        return match[1] + markdown(block) + match[4]

    return BLOCK.sub(fill, text)


def pages(root: Path) -> list[Path]:
    """Return README.md and the Markdown pages under docs/."""
    readme = [root / "README.md"] if (root / "README.md").exists() else []
    docs = root / "docs"
    return readme + [p for p in sorted(docs.rglob("*.md")) if "_build" not in p.relative_to(docs).parts]


def main(arguments: list[str] | None = None) -> int:
    """Rewrite, or check, every page."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change no file; exit with 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository (default: that of this script)")
    options = parser.parse_args(arguments)
    stale = []
    for page in pages(options.root):
        text = page.read_text(encoding="utf-8")
        try:
            fresh = rewritten(text, options.root / "benchmarks" / "results", page.relative_to(options.root))
        except TableError as reason:
            print(reason, file=sys.stderr)
            return 2
        if fresh == text:
            continue
        stale.append(page.relative_to(options.root))
        if not options.check:
            aside = page.with_name(f".{page.name}.{secrets.token_hex(4)}.tmp")
            aside.write_text(fresh, encoding="utf-8")
            os.replace(aside, page)
    for page in stale:
        print(f"{page}: {'out of date; run: python benchmarks/tables.py' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
