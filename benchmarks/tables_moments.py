"""Tables of the results of `moments.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from blocks import Block, Table, bound, origin, plain, table

NAMES = {"clinc150": "CLINC150, d = 384", "cifar10": "CIFAR-10, d = 1280"}
JOINT = "logistic, all rows"


def _cells(section: dict[str, Any], start: str) -> list[dict[str, Any]]:
    return [cell for key, cell in section["cells"].items() if key.startswith(f"{start} ")]


def _percent(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 and len(set(values)) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _seconds(cells: list[dict[str, Any]]) -> str:
    return f"{statistics.fmean(cell['seconds'] for cell in cells):.1f}" if "seconds" in cells[0] else "–"


def _behind(cells: list[dict[str, Any]], bar: float) -> str:
    """Points by which moments are below logistic regression on all rows, against the bar."""
    behind = 100 * statistics.fmean(cell[JOINT]["accuracy"] - cell["moments"]["accuracy"] for cell in cells)
    return f"{behind:+.1f} points: {bound(behind, bar)}"


@table("moments", source="moments")
def moments(results: dict[str, Any]) -> Block:
    """Accuracy, size, time and membership of classifiers from summed moments and of others."""
    sections = results["sections"]
    bars = sections["steps"]["bars"]
    tables = [_steps(sections["steps"], bars), _owners(sections["owners"], bars), _few(sections["few"])]
    memory, adding = sections["cost"]["cells"]["memory"], sections["cost"]["cells"]["adding"]
    total = adding["sums_seconds"] + adding["pair_seconds"]
    rows = [
        (
            f"count {memory['rows']:,} rows of d = {memory['features']} from a folder",
            f"{memory['mebibytes']:.0f} MiB above the imports, {memory['seconds']:.0f} s",
            bound(memory["mebibytes"], bars["memory"]),
        ),
        (
            f"add {adding['new']} classes of 100 rows to {adding['classes']} at d = {adding['features']}",
            f"{total:.2f} s, {adding['pair_seconds']:.2f} s of it for the pair",
            bound(total, bars["adding"]),
        ),
    ]
    tables.append(Table("Cost", ("task", "measured", "bar"), rows))
    settings = sections["steps"]["settings"]
    notes = [
        f"Means of {settings['orders']} orders of the classes, or of {settings['seeds']} splits, ± their standard "
        "deviation. Bound: logistic regression on all rows; its difference to moments is in the column of the bar. "
        "Membership: AUC of the pair's density between training and test rows. Floats: kept between steps, or sent by "
        f"all owners together. {origin(sections['steps'], ('penult', 'torch'))}"
    ]
    return Block(tables, notes, "python benchmarks/moments.py --data DATA --cache CACHE")


def _steps(section: dict[str, Any], bars: dict[str, float]) -> Table:
    rows = []
    for name, shown in NAMES.items():
        cells = _cells(section, name)
        for method in cells[0]:
            own = [cell[method] for cell in cells]
            ours = method == "moments"
            rows.append((
                f"{shown}, {section['settings']['steps'][name]} steps", f"**{method}**" if ours else method,
                _percent(cell["accuracy"] for cell in own), _percent(cell["mean"] for cell in own),
                plain(own[0]["floats"]), _seconds(own),
                f"{own[0]['membership']:.2f}" if ours else "–", _behind(cells, bars[name]) if ours else "–",
            ))  # fmt: skip
    header = ("features", "method", "last step, %", "mean of steps, %", "floats", "seconds", "membership", "bar")
    return Table("Classes that come in steps", header, rows)


def _owners(section: dict[str, Any], bars: dict[str, float]) -> Table:
    rows = []
    for name, shown in NAMES.items():
        for alpha in ("0.1", "0.5"):
            cells = _cells(section, f"{name} {alpha}")
            for method in cells[0]:
                own = [cell[method] for cell in cells]
                ours = method == "moments"
                single = statistics.fmean(cell["membership_of_an_owner"] for cell in own) if ours else 0.0
                rows.append((
                    f"{shown}, Dirichlet({alpha})", f"**{method}**" if ours else method,
                    _percent(cell["accuracy"] for cell in own),
                    plain(own[0]["floats"]) if "floats" in own[0] else "–",
                    _seconds(own),
                    f"{own[0]['membership']:.2f}; file of one owner {single:.2f}" if ours else "–",
                    _behind(cells, bars[name]) if ours else "–",
                ))  # fmt: skip
    header = ("features", "method", "accuracy, %", "floats", "seconds", "membership", "bar")
    return Table("Ten owners", header, rows)


def _few(section: dict[str, Any]) -> Table:
    rows = []
    for name, shown in NAMES.items():
        for key, cell in section["cells"].items():
            start, _, count = key.partition(" ")
            if start == name:
                rows.append((
                    shown, count, *(f"{100 * one['accuracy']:.1f}" for one in cell.values()),
                    f"{cell['moments']['membership']:.2f}",
                ))  # fmt: skip
    methods = tuple(next(iter(section["cells"].values())))
    return Table("Few rows", ("features", "rows a class", *methods, "membership"), rows)
