"""Rewrite the tables of README.md and docs/ from benchmarks/results, so that no figure is typed by hand.

A table stands between two comments, and everything between them is replaced:

    <!-- table: vmf-accuracy -->
    <!-- /table -->

A new one is a function registered under its name with ``@table(name, source)``, where benchmarks/results/<source>.json
is what it reads.

Example:
    python benchmarks/tables.py
    python benchmarks/tables.py --check
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
OPEN = re.compile(r"<!-- table:")


@dataclass(frozen=True)
class Table:
    """One table: a heading, column names, rows of text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Block:
    """What stands between two markers: tables, a line on what they were measured with, the command."""

    tables: list[Table]
    notes: list[str]
    command: str


class TableError(Exception):
    """A table cannot be made; the message says what to do."""


Renderer = Callable[[dict[str, Any]], Block]
_REGISTRY: dict[str, tuple[str, Renderer]] = {}


def table(name: str, source: str) -> Callable[[Renderer], Renderer]:
    """Register the function that makes the block ``name`` from results/<source>.json."""

    def register(render: Renderer) -> Renderer:
        _REGISTRY[name] = (source, render)
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
    seed = section["settings"]["seed"]
    return f"Measured on {made['cpu']}, {made['cores']} cores, one thread used; {used}; seed {seed}."


# --- von Mises-Fisher ---------------------------------------------------------------------------------------

_TOOLS = {
    "penult float64": "**penult**, float64",
    "penult float32": "**penult**, float32",
    "scipy.special.ive": "SciPy `ive` formula, float64",
    "scipy.stats.vonmises_fisher": "`scipy.stats.vonmises_fisher`",
    "ive port float64": "ive ratio (as in common PyTorch ports), float64",
    "ive port float32": "ive ratio (as in common PyTorch ports), float32",
    "TFP (JAX) float64": "TensorFlow Probability (JAX), float64",
    "TFP (JAX) float32": "TensorFlow Probability (JAX), float32",
}
_QUANTITIES = {
    "log_c": "log C", "mean": "A", "variance": "V = A′", "deficit": "1 − A", "mgf": "F",
    "entropy": "entropy", "grad_log_c": "∂ log C/∂κ", "grad_mean": "∂A/∂κ",
}  # fmt: skip
_SAMPLERS = {
    "penult": "penult", "wood": "plain Wood", "wood with shortcut": "Wood, b ≈ (d−1)/4κ",
    "scipy": "scipy.stats", "geomstats": "geomstats",
}  # fmt: skip


@table("vmf-accuracy", source="vmf")
def accuracy(results: dict[str, Any]) -> Block:
    """Largest errors against mpmath, who breaks where, inverse, divergence and pathwise gradient."""
    section = _section(results, "accuracy")
    cells, bars = section["cells"], section["bars"]
    grid = {int(name.split("=")[1]): cell for name, cell in cells.items() if name.startswith("grid")}
    scattered = [cell for name, cell in cells.items() if name.startswith("random")]
    total = len(grid) * len(section["settings"]["kappas"])
    points = total + sum(cell["penult float64"]["log_c"]["n"] for cell in scattered)

    rows = [
        ("bar, float64", "0", *(tiny(bars["float64"].get(q)) for q in _QUANTITIES)),
        ("bar, float32", "0", *(tiny(bars["float32"]) for _ in _QUANTITIES)),
    ]
    broken: list[tuple[str, ...]] = []
    for key, name in _TOOLS.items():
        if grid[min(grid)][key] == "not installed":
            rows.append((name, "not installed", *("" for _ in _QUANTITIES)))
            continue
        found = [cell[key] for cell in (*grid.values(), *scattered)]
        worst = []
        for quantity in _QUANTITIES:
            entries = [f[quantity] for f in found if quantity in f]
            finite = [e["max"] for e in entries if e["at"] is not None]
            worst.append(tiny(max(finite)) if finite else "–")
        lost = [sum(cell[key][q]["nonfinite"] for cell in grid.values()) for q in ("log_c", "mean") if q in found[0]]
        rows.append((name, f"{' / '.join(map(str, lost))} of {total}", *worst))
        broken.append((name, _where({dim: cell[key]["log_c"].get("where", []) for dim, cell in grid.items()})))
    tables = [
        Table(
            f"Largest error over {points} points, where the result is finite",
            ("tool", "inf or nan, log C / A", *_QUANTITIES.values()),
            rows,
        ),
        Table(f"Where log C is inf, nan or refused, of the {total} points of the grid", ("tool", "where"), broken),
    ]

    rows = []
    for name, entry in cells["inverse"].items():
        rows.append((name, f"{entry['failures']} of {entry['n']}", tiny(entry["error"]), tiny(entry["residual"])))
    tables.append(
        Table(
            "κ from the mean resultant length R",
            ("method", "fails, or off by over 10 %", "error of κ, relative", "error of A(κ)"),
            rows,
        )
    )
    rows = []
    for case, found in cells["divergence"].items():
        for key, name in (("penult", "penult"), ("ive port float64", "difference of log C by `ive`")):
            e = found[key]
            rows.append((case, name, f"{e['nonfinite']} of {e['n']}", str(e["negative"]), tiny(e["error"])))
    tables.append(
        Table(
            "Kullback-Leibler divergence of two laws",
            ("case", "tool", "inf or nan", "negative", "relative error"),
            rows,
        )
    )
    rows = []
    for name, cell in cells.items():
        if name.startswith("gradient"):
            ours, naive = cell["penult"], cell["proposal alone"]
            rows.append(
                (
                    name.removeprefix("gradient ").replace("kappa", "κ"), f"{cell['truth']:.6f}",
                    f"{ours['value']:.6f}", f"{ours['z']:+.1f}",
                    f"{naive['value']:.6f}", f"{naive['z']:+.1f}", f"{100 * naive['bias']:+.2g} %",
                )
            )  # fmt: skip
    tables.append(
        Table(
            "Pathwise gradient dE[t]/dκ from samples, t = μ·x",
            ("law", "exact A′", "penult", "z", "through Wood's proposal alone", "z", "bias"),
            rows,
        )
    )
    notes = [
        "Errors of log C and entropy are absolute over max(1, |value|), the others relative. V and 1 − A of tools "
        "that do not offer them are formed from A by the textbook identities. Bars of divergence and inverse: "
        f"{tiny(bars['divergence'])}; |z| < {bars['gradient_z']:g}. The truth is computed with 70 digits by mpmath, "
        "on the grid by two routes (Bessel functions, and the defining series) that agree to "
        f"{tiny(max(cells['truth'].values()))}.",
        origin(section, ("penult", "torch", "scipy", "numpy", "mpmath", "tensorflow-probability", "jax")),
    ]
    return Block(tables, notes, "python benchmarks/vmf.py --only accuracy")


@table("vmf-sampling", source="vmf")
def sampling(results: dict[str, Any]) -> Block:
    """Cost of draws and whether they follow the law."""
    section = _section(results, "sampling")
    bars = section["bars"]
    costs, versus, laws = [], [], []
    for cell in section["cells"].values():
        dim, batch = str(cell["dim"]), "laws" in cell
        shown = f"{cell['n']} × {dim}, κ = {cell.get('kappa', 0):g}"
        if batch:
            shown = f"{cell['n']} × {cell['laws']} laws × {dim}"
        costs.append(
            (
                shown, f"{cell['randn_ms']:.0f} ms", f"{cell['penult']['ms']:.0f} ms",
                f"{cell['ratio_best']:.2f}", f"{cell['ratio_median']:.2f}",
                bound(cell["ratio_best"], bars["randn_batch" if batch else "randn"].get(dim)),
                plain(cell["penult"]["per_second"]),
            )
        )  # fmt: skip
        peers = {peer: cell.get(peer) for peer in ("wood", "scipy", "geomstats")}
        ratio = peers["scipy"]["over_penult"]
        versus.append(
            (
                shown, *(_over(peer) for peer in peers.values()),
                "–" if batch else bound(ratio, bars["scipy"][dim], most=False),
            )
        )  # fmt: skip
        if not batch:
            found = cell["law"]
            laws.append(
                (
                    f"d = {dim}, κ = {cell['kappa']:g}",
                    *(chance(found[s]["p"]) if s in found else "not installed" for s in _SAMPLERS),
                )
            )
        else:
            laws.append((f"d = {dim}, {cell['laws']} laws", chance(cell["law"]["penult"]["p"]), "–", "–", "–", "–"))
    tables = [
        Table(
            "Cost of `VonMisesFisher.sample` beside `torch.randn` of the same size, float32, one thread",
            ("draws", "randn", "penult", "ratio, best", "ratio, median", "bar", "draws a second"),
            costs,
        ),
        Table(
            "Times of other samplers over penult's",
            ("draws", "plain Wood in torch", "scipy.stats", "geomstats", "bar, scipy.stats"),
            versus,
        ),
        Table(
            "Do the cosines follow the exact law? p-values (Kolmogorov-Smirnov)", ("d, κ", *_SAMPLERS.values()), laws
        ),
    ]
    notes = [
        "`*` extrapolated by a line through two smaller sizes; for a batch, a loop over a few of the laws scaled "
        "up. “b ≈ (d−1)/4κ” is Wood's scheme with the large-κ shortcut that common PyTorch ports take above κ = 10; "
        "it samples another law unless κ is much larger than d. Bold: p < 1e-4.",
        origin(section, ("penult", "torch", "scipy", "numpy", "geomstats")),
    ]
    return Block(tables, notes, "python benchmarks/vmf.py --only sampling")


@table("vmf-summary", source="vmf")
def summary(results: dict[str, Any]) -> Block:
    """One line for each tool: where it breaks, how accurate it is, what a draw costs."""
    section, speed = _section(results, "accuracy"), _section(results, "sampling")
    cells = section["cells"]
    grid = [cell for name, cell in cells.items() if name.startswith("grid")]
    found = [cell for name, cell in cells.items() if name.startswith(("grid", "random"))]
    total = len(grid) * len(section["settings"]["kappas"])
    single = [cell for cell in speed["cells"].values() if "laws" not in cell]
    dims = sorted({cell["dim"] for cell in single})

    def worst(tool: str, quantity: str) -> str:
        entries = [cell[tool][quantity] for cell in found if quantity in cell[tool]]
        finite = [e["max"] for e in entries if e["at"] is not None]
        return tiny(max(finite)) if finite else "–"

    def times(sampler: str | None) -> list[str]:
        if sampler is None:
            return ["–" for _ in dims]
        spans = []
        for dim in dims:
            peers = [cell[sampler] for cell in single if cell["dim"] == dim]
            if sampler == "penult":
                spans.append("1")
            elif "not installed" in peers:
                spans.append("not installed")
            else:
                low, high = (plain(f(p["over_penult"] for p in peers), 2) for f in (min, max))
                spans.append(f"{low}–{high}" if low != high else low)
        return spans

    rows = []
    for name, tool, sampler in (
        ("**penult**, float32", "penult float32", "penult"),
        ("**penult**, float64", "penult float64", None),
        ("`scipy.stats.vonmises_fisher`", "scipy.stats.vonmises_fisher", "scipy"),
        ("ive ratio and plain Wood sampler (as in common PyTorch ports), float32", "ive port float32", "wood"),
        ("TensorFlow Probability (JAX), float32", "TFP (JAX) float32", None),
        ("TensorFlow Probability (JAX), float64", "TFP (JAX) float64", None),
        ("geomstats (sampler only)", None, "geomstats"),
    ):
        if tool is None:
            accuracies = ("–", "–", "–")
        elif grid[0][tool] == "not installed":
            accuracies = ("not installed", "–", "–")
        else:
            lost = sum(cell[tool]["log_c"]["nonfinite"] for cell in grid)
            accuracies = (f"{lost} of {total}", worst(tool, "log_c"), worst(tool, "grad_mean"))
        rows.append((name, *accuracies, *times(sampler)))
    header = ("", "log C inf, nan or refused", "error of log C", "error of ∂A/∂κ", *(f"time, d = {d}" for d in dims))
    notes = [
        f"Largest errors where finite, d from 2 to {max(section['settings']['dims'])}, κ = 0 and from 1e-8 to 1e6; "
        "time of a draw over penult's, one CPU thread, κ from 1 to 1000. An error of 1 is 100 %.",
    ]
    return Block(
        [Table("The von Mises-Fisher law, here and elsewhere", header, rows)], notes, "python benchmarks/vmf.py"
    )


@table("vmf-evaluation", source="vmf")
def evaluation(results: dict[str, Any]) -> Block:
    """Nanoseconds for one value."""
    section = _section(results, "evaluation")
    bars, columns, rows = section["bars"], ("F", "A", "F and gradient", "A and gradient", "scipy.special.ive"), []
    for name, cell in section["cells"].items():
        if name == "setup":
            continue
        dim = int(name.split("=")[1])
        bar = bars["ns_from_64"] if dim >= 64 else bars["ns_below_42"]
        rows.append((str(dim), *(f"{cell[c]['ns']:.0f}" for c in columns), bound(cell["F"]["ns"], bar)))
    size = next(iter(section["cells"].values()))["n"]
    tables = [
        Table(
            f"Nanoseconds for one value, float64, one thread, {size / 1e6:g} million values at a time",
            ("d", *columns[:-1], "`scipy.special.ive` alone", "bar for F"),
            rows,
        )
    ]
    once = section["cells"]["setup"]
    rows = [
        (f"first use of a further dimension, {label.replace('>=', '≥')}", f"{ms:.2f} ms", bound(ms, bars["setup_ms"]))
        for label, ms in once["new_dimension_ms"].items()
    ]
    rows.append(("first use of any dimension in a process", f"{once['first_of_process_ms']:.1f} ms", "–"))
    tables.append(Table("Setup of a dimension, once for each", ("", "time", "bar"), rows))
    notes = [origin(section, ("penult", "torch", "scipy", "numpy"))]
    return Block(tables, notes, "python benchmarks/vmf.py --only evaluation")


@table("families", source="families")
def families(results: dict[str, Any]) -> Block:
    """Where each family carries its head."""
    section = results["sections"]["families"]
    found, refused = [], []
    for name, cell in section["cells"].items():
        if "refused" in cell:
            refused.append((name, cell["refused"].split(" If W and b are known")[0].split(" For a sigmoid head")[0]))
            continue
        place = f"`{cell['path']}`" + ("" if cell["bias"] else ", no bias") + (", tied" if cell["tied"] else "")
        before = cell["before"] + (f" ({cell['folded']} folded)" if cell["folded"] else "")
        axes = "a " + cell["axes"][-1] if len(cell["axes"]) == 2 else "a pixel" if len(cell["axes"]) > 2 else "a sample"
        each = axes + {"same": "", "mean": ", mean", "picked": ", one token picked"}.get(cell["positions"], ", resized")
        found.append((name, place, cell["kind"], before, f"**{cell['support']}**", each, tiny(cell["softmax_error"])))
    header = ("family", "head", "by", "just before", "support", "one softmax", "error")
    shown = [Table("Where model families carry their heads", header, found)]
    shown.append(Table("Refused, and why", ("family", "reason"), refused))
    used = ", ".join(f"{name} {version}" for name, version in section["versions"].items() if name != "python")
    notes = [
        f"Error: largest difference between the softmax of head(h), through `Tap`, and the model's, float32. {used}."
    ]
    return Block(shown, notes, "python benchmarks/families.py")


@table("extract-overhead", source="extract")
def extract_overhead(results: dict[str, Any]) -> Block:
    """CPU time of extraction over a bare loop."""
    section = results["sections"]["overhead"]
    cells, bar = section["cells"], section["bars"]["extract"]
    rows = [
        (name, f"{cell['ratio']:.3f}", f"{cell['ratio_of_best']:.3f}",
         bound(cell["ratio"], bar) if name.startswith("extract") else "–")
        for name, cell in cells.items() if isinstance(cell, dict)
    ]  # fmt: skip
    header = ("", "median ratio", "ratio of the best", "bar")
    title = "CPU time over a bare loop of forward passes"
    what = (
        f"{cells['samples']} random images of 28 × 28 in batches of 128, three convolutions, {cells['rounds']} rounds."
    )
    notes = [what, origin(section, ("penult", "torch", "safetensors"))]
    return Block([Table(title, header, rows)], notes, "python benchmarks/extract.py --only overhead")


@table("extract-memory", source="extract")
def extract_memory(results: dict[str, Any]) -> Block:
    """Peak memory of extraction and reading."""
    section = results["sections"]["memory"]
    cells, bar = section["cells"], section["bars"]["growth"]
    rows = []
    for task, what in (("extract", "`extract` to disk"), ("read", "`Activations.batches`")):
        one, ten = cells[f"{task}, 1 N"], cells[f"{task}, 10 N"]
        rows.append((what, f"{one:.0f} MiB", f"{ten:.0f} MiB", f"{ten / one:.2f}", bound(ten / one, bar)))
    header = ("", f"{cells['rows']} rows", f"{10 * cells['rows']} rows", "ratio", "bar")
    title = f"Peak memory of a process, PyTorch included; the larger set takes {cells['data_mib']:.0f} MiB on disk"
    return Block([Table(title, header, rows)], [origin(section, ("penult", "torch"))], "python benchmarks/extract.py")


@table("realism", source="realism")
def realism(results: dict[str, Any]) -> Block:
    """Two-sample tests of every base on every network."""
    section = results["sections"]["realism"]
    cells, bars = section["cells"], section["bars"]
    small = [name for name in cells if name != "efficientnet-lite0"]
    header = ("AUC of LR / MLP / kNN", *small)
    laws = list(dict.fromkeys(law for name in small for law in cells[name]["0"]["laws"]))
    rows = [("real against real", *(_aucs(_runs(cells[name], None)) for name in small))]
    rows += [(law, *(_aucs(_runs(cells[name], law)) for name in small)) for law in laws]
    found = [_realism_bars(cells, small, bars), Table("Told from real activations; 0.5 is not at all", header, rows)]

    first = cells[small[0]]["0"]["laws"]
    columns = ("", "floats", "fit, CPU s", *small)
    rows = [("real against real", "–", "–", *(f"{_mean(_runs(cells[n], None), 'energy'):.4f}" for n in small))]
    for law in laws:
        at = next(name for name in small if law in cells[name]["0"]["laws"])
        one = first.get(law) or cells[at]["0"]["laws"][law]
        energies = [_mean(_runs(cells[name], law), "energy") for name in small]
        rows.append(
            (law, plain(one["floats"]), tiny(one["seconds"]), *("–" if e is None else f"{e:.4f}" for e in energies))
        )
    found.append(Table("Size, cost of the fit, and energy coefficient (0 is a perfect match)", columns, rows))

    rows = []
    for name, runs in cells.items():
        facts = [run["network"] for run in runs.values()]
        known = facts[0]["accuracy"] is not None
        rows.append((
            name, f"{_average(facts, 'accuracy'):.3f}" if known else "–", f"{_average(facts, 'confidence'):.3f}",
            f"{_average(facts, 'temperature'):.2f}" if known else "–", f"{facts[0]['zeros']:.1%}",
            f"{_average(facts, 'tilt_identity'):.2f}" if facts[0]["tilt_identity"] is not None else "–",
            *(f"{run:.2f}" for run in facts[0]["alignment"]),
            *(_effective(runs, law) for law in ("sphere", "elliptic", "gaussian", "mixture")),
        ))  # fmt: skip
    header = ("network", "accuracy", "confidence", "T*", "zeros in h", "tilt identity", "cos(mean, w)", "centered",
              *(f"classes, {law}" for law in ("sphere", "elliptic", "gaussian", "mixture")))  # fmt: skip
    found.append(Table("The networks; and the effective number of classes that a base implies", header, rows))

    if large := cells.get("efficientnet-lite0"):
        facts = next(iter(large.values()))["network"]
        rows = []
        for law, one in next(iter(large.values()))["laws"].items():
            runs = _runs(large, law)
            rows.append(
                (law, plain(one["floats"]), tiny(one["seconds"]), _aucs(runs), f"{_average(runs, 'confidence'):.3f}")
            )
        rows.append(("real activations", "–", "–", _aucs(_runs(large, None)), f"{facts['confidence']:.3f}"))
        header = ("efficientnet-lite0", "floats", "fit, CPU s", "AUC of LR / MLP / kNN", "confidence of draws")
        title = f"K = 1000, d = 1280, fitted to {facts['fitted']} activations; tests of all classes together"
        found.append(Table(title, header, rows))
    found += _rare_and_em(results)
    made = section["machine"]
    used = ", ".join(f"{name} {version}" for name, version in section["versions"].items() if name != "python")
    notes = [
        f"Means over {len(next(iter(cells.values())))} splits of the test activations, "
        f"{section['settings']['per_class']} a class. {made['cpu']}, one thread a process; {used}."
    ]
    return Block(found, notes, "python benchmarks/realism.py --data DATA --cache CACHE")


def _runs(cell: dict[str, Any], law: str | None) -> list[dict[str, Any]]:
    """What each split found for a base, or for real activations."""
    if law is None:
        return [run["network"] for run in cell.values()]
    return [run["laws"][law] for run in cell.values() if law in run["laws"]]


def _average(runs: list[dict[str, Any]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def _mean(runs: list[dict[str, Any]], key: str) -> float | None:
    return _average(runs, key) if runs else None


def _auc(runs: list[dict[str, Any]], test: str) -> float:
    return sum(run["auc"][test] for run in runs) / len(runs)


def _aucs(runs: list[dict[str, Any]]) -> str:
    return " / ".join(f"{_auc(runs, test):.2f}" for test in ("logistic", "mlp", "knn")) if runs else "–"


def _effective(runs: dict[str, Any], law: str) -> str:
    found = _runs(runs, law)
    return plain(_average(found, "effective_classes")) if found else "–"


def _realism_bars(cells: dict[str, Any], small: list[str], bars: dict[str, Any]) -> Table:
    """What was asked, and the worst network's figure."""
    cifar = [name for name in small if name.startswith("cifar")]
    off = max(abs(_auc(_runs(cells[n], None), t) - 0.5) for n in small for t in ("logistic", "mlp", "knn"))
    rows = [("real against real: farthest from 0.5", f"{off:.3f}", bound(off, bars["real"]))]
    names = {"logistic": "LR", "mlp": "MLP", "knn": "kNN"}

    def add(label: str, law: str, asked: dict[str, float], among: list[str]) -> None:
        for test, bar in asked.items():
            if test == "floats":
                most = max(run["floats"] for n in among for run in _runs(cells[n], law))
                rows.append((f"{label}: floats", f"{most}", bound(most, bar)))
            elif among:
                worst = max(_auc(_runs(cells[n], law), test) for n in among)
                rows.append((f"{label}: {names[test]}", f"{worst:.3f}", bound(worst, bar)))

    add("CIFAR, `mixture`", "mixture", bars["mixture"], cifar)
    add("CIFAR, `bank`", "bank", bars["bank"], cifar)
    add("CIFAR, full Gaussian", "gaussian", bars["gaussian"], cifar)
    if "mnist-relu" in cells:
        add("MNIST with ReLU, rectified `mixture`", "mixture", bars["rectified"], ["mnist-relu"])
        least = min(
            _auc(_runs(cells["mnist-relu"], law), "mlp") for law in ("sphere", "elliptic", "gaussian", "mixture, plain")
        )
        rows.append(("the same, laws that are not rectified: least MLP", f"{least:.3f}", "shown"))
    add("goal on CIFAR, `mixture, 16/64`", "mixture, 16/64", bars["goal"], cifar)
    return Table("Asked and measured: the worst network, each the mean of its splits", ("", "AUC", "bar"), rows)


def _rare_and_em(results: dict[str, Any]) -> list[Table]:
    found = []
    if cells := results["sections"].get("rare", {}).get("cells"):
        rows = [(f"a class of prior {p}", f"{1e3 * s:.3g} ms a draw") for p, s in cells["seconds_a_draw"].items()]
        rows += [
            (f"{kind}, {one['draws']} draws of 1000 classes at d = 1280 (least prior {one['least_prior']:g})",
             f"{one['seconds']:.3g} s") for kind, one in cells["thousand_classes"].items()
        ]  # fmt: skip
        found.append(Table("What class draws of a marginal cost, CPU time", ("", ""), rows))
    if cells := results["sections"].get("em", {}).get("cells"):
        rows = [
            (
                name,
                *(f"{cell[who]['nats']:.2f} nats, {cell[who]['seconds']:.3g} s" for who in ("penult", "scikit-learn")),
            )
            for name, cell in cells.items()
        ]
        header = ("components in dimensions", "penult", "scikit-learn GaussianMixture")
        found.append(Table("Expectation maximisation: held-out log likelihood in the plane, CPU time", header, rows))
    return found


def _section(results: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        section: dict[str, Any] = results["sections"][name]
    except KeyError:
        raise TableError(f"the results hold no section {name!r}; run: python benchmarks/vmf.py --only {name}") from None
    return section


def _where(failures: dict[int, list[float]]) -> str:
    """Dimensions and concentrations at which a tool fails, zero apart."""
    if not any(failures.values()):
        return "nowhere"
    parts = []
    if all(0.0 in kappas for kappas in failures.values()):
        parts.append("κ = 0 in every d")
    for dim, kappas in failures.items():
        rest = [k for k in kappas if k > 0 or not parts]
        if rest:
            parts.append(f"d = {dim}: κ {'≤' if len(rest) > 1 else '='} {power(max(rest))}")
    return "; ".join(parts)


def _over(peer: Any) -> str:
    if peer is None:
        return "–"
    if peer == "not installed":
        return peer
    return f"{plain(peer['over_penult'], 2)}×{'*' if peer.get('scaled_from') else ''}"


# --- output -------------------------------------------------------------------------------------------------


def markdown(block: Block) -> str:
    """A block as Markdown."""
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
    block = _REGISTRY[name][1](results)
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
    """A page with its tables made anew.

    Raises:
        TableError: If a marker is not closed, a name is unknown or its results are missing.
    """
    if len(OPEN.findall(text)) != len(BLOCK.findall(text)):
        raise TableError(f"{where}: a table is not closed; end it with <!-- /table -->")

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in _REGISTRY:
            raise TableError(f"{where}: no table is called {name!r}; there are {', '.join(sorted(_REGISTRY))}")
        source, render = _REGISTRY[name]
        path = folder / f"{source}.json"
        if not path.exists():
            raise TableError(f"{path} does not exist; run: python benchmarks/{source}.py")
        block = render(json.loads(path.read_text(encoding="utf-8")))
        return match[1] + markdown(block) + match[4]

    return BLOCK.sub(fill, text)


def pages(root: Path) -> list[Path]:
    """README.md and the Markdown pages under docs/."""
    readme = [root / "README.md"] if (root / "README.md").exists() else []
    docs = root / "docs"
    return readme + [p for p in sorted(docs.rglob("*.md")) if "_build" not in p.relative_to(docs).parts]


def main(arguments: list[str] | None = None) -> int:
    """Rewrite, or check, every page."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: the one of this script)")
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
