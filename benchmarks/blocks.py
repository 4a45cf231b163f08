"""Tables of results, the format of their numbers, and the registry of tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "REGISTRY",
    "Block",
    "Renderer",
    "Table",
    "TableError",
    "bound",
    "chance",
    "origin",
    "plain",
    "power",
    "section",
    "table",
    "tiny",
]


@dataclass(frozen=True)
class Table:
    """One table: a heading, column names, rows of text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Block:
    """Contents between two markers: tables, notes on the measurement, and the command."""

    tables: list[Table]
    notes: list[str]
    command: str


class TableError(Exception):
    """A table cannot be made; the message says what to do."""


Renderer = Callable[[dict[str, Any]], Block]
REGISTRY: dict[str, tuple[str, Renderer]] = {}


def table(name: str, source: str) -> Callable[[Renderer], Renderer]:
    """Register the function that makes the block ``name`` from results/<source>.json."""

    def register(render: Renderer) -> Renderer:
        REGISTRY[name] = (source, render)
        return render

    return register


# --- numbers ------------------------------------------------------------------------------------------------


def tiny(value: float | None) -> str:
    """An error: two digits, 3.4e-16; zero is 0."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def plain(value: float, digits: int = 3) -> str:
    """A number of a few digits without exponent, 1234567 as 1.23 M."""
    for size, unit in ((1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return plain(value / (1e6 if unit == " M" else 1e3), digits) + unit
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def power(value: float) -> str:
    """A concentration: 0, 10, 1e-8."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def bound(value: float, bar: float | None, *, most: bool = True) -> str:
    """The bar of a figure and whether it is met."""
    if bar is None:
        return "–"
    met = value <= bar if most else value >= bar
    return f"{'≤' if most else '≥'} {bar:g}, {'met' if met else '**missed**'}"


def chance(value: float) -> str:
    """A p-value; the unmistakable ones in bold."""
    if value < 1e-300:
        return "**< 1e-300**"
    return f"**{tiny(value)}**" if value < 1e-4 else f"{value:.2g}"


def origin(section: dict[str, Any], packages: Iterable[str]) -> str:
    """The line on machine and versions."""
    made = section["machine"]
    used = ", ".join(f"{name} {section['versions'][name]}" for name in packages)
    settings = section["settings"]
    seeds = f"seed {settings['seed']}" if "seed" in settings else f"seeds 0 to {settings['seeds'] - 1}"
    return f"Measured on {made['cpu']}, {made['cores']} cores, one thread used; {used}; {seeds}."


def section(results: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the results.

    Raises:
        TableError: If it was not measured.
    """
    try:
        found: dict[str, Any] = results["sections"][name]
    except KeyError:
        raise TableError(f"the results hold no section {name!r}; run: python benchmarks/vmf.py --only {name}") from None
    return found
