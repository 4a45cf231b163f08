"""Tables of the results of `distill.py`."""

from __future__ import annotations

import statistics
from typing import Any

from blocks import Block, Table, table

Cells = dict[str, dict[str, Any]]  # of a setting: by domain, by seed

OURS = (
    "soft, gated", "activation, gated", "soft, head only", "activation, head only", "activation with hints, gated"
)  # fmt: skip
KEPT_NAME = "activation with hints, gated"
KEPT = "activation and hints"
CONTROL = {"soft, head only": "matched smoothing", "activation, head only": "simplex head"}


@table("distill", source="distill")
def distill(results: dict[str, Any]) -> Block:
    """Accuracy of students over severity."""
    section = results["sections"]["runs"]
    settings = section["settings"]
    common = f"{settings['rate']:g}"
    found = [_bars(section["cells"], common)]
    for name, per_class in (("mnist", 50), ("cifar10", 100)):
        if cells := _setting(section["cells"], name):
            title = f"{name}, {per_class} labels per class: accuracy (gain over cross-entropy), %"
            found.append(_accuracies(cells, common, f"{title}, all at one learning rate"))
            if all(len(run["runs"]["cross-entropy"]) > 1 for cell in cells.values() for run in cell.values()):
                rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
                found.append(_accuracies(cells, None, f"{title}, each run at the best of {rates} by validation"))
    if sizes := {name: cell for name, cell in section["cells"].items() if name.count("/") == 2}:
        named = {name.removeprefix("mnist/").replace("/", ", n = "): cell for name, cell in sizes.items()}
        found.append(_accuracies(named, common, "mnist, other numbers n of labels per class, all at one learning rate"))
    if cost := results["sections"].get("cost", {}).get("cells"):
        found += _cost(cost)
    made = section["machine"]
    seeds = len(next(iter(section["cells"].values())))
    notes = [
        f"Means ± standard deviations over {seeds} seeds, each with its own teacher (two for CIFAR-10), images and "
        "initial weights. Columns are sorted by the accuracy of the teacher on test images, which is in the heading. "
        "Gains are differences within a seed; the last column is the lowest gain of all runs. "
        f"{made['cpu']}, one thread per process; torch {section['versions']['torch']}."
    ]
    return Block(found, notes, "python benchmarks/distill.py --data DATA --cache CACHE")


def _setting(cells: Cells, name: str) -> Cells:
    """Its domains, from the most accurate teacher to the least."""
    own = {key.split("/")[1]: cell for key, cell in cells.items() if key.startswith(f"{name}/") and key.count("/") == 1}
    return dict(sorted(own.items(), key=lambda item: -_teacher(item[1])))


def _teacher(cell: dict[str, Any]) -> float:
    return statistics.mean(run["teacher"]["test"] for run in cell.values())


def _tests(cell: dict[str, Any], method: str, rate: str | None) -> list[float]:
    """Test accuracy of each seed, at a rate or at the best one."""
    runs = [run["runs"][method] for run in cell.values()]
    return [each[rate or _best(each, cell)]["test"] for each in runs]


def _best(runs: dict[str, Any], cell: dict[str, Any]) -> str:
    tested = {rate: run for rate, run in runs.items() if "test" in run}
    return max(tested, key=lambda rate: (tested[rate]["validation"], rate == "0.003"))


def _gains(cell: dict[str, Any], method: str, rate: str | None, other: str = "cross-entropy") -> list[float]:
    mine, others = _tests(cell, method, rate), _tests(cell, other, rate)
    return [a - b for a, b in zip(mine, others, strict=True)]


def _accuracies(cells: Cells, rate: str | None, title: str) -> Table:
    header = ("", *(f"{name}: {_teacher(cell):.0f}" for name, cell in cells.items()), "mean gain", "lowest gain")
    first = next(iter(next(iter(cells.values())).values()))["runs"]
    every = [run["runs"] for cell in cells.values() for run in cell.values()]
    methods = [name for name in first if all(name in runs and (rate or len(runs[name]) > 1) for runs in every)]
    rows = []
    for method in methods:
        gains = [g for cell in cells.values() for g in _gains(cell, method, rate)]
        figures = []
        for cell in cells.values():
            tests = _tests(cell, method, rate)
            spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
            own = f"{statistics.mean(tests):.1f} ± {spread:.1f}"
            gain = f" ({statistics.mean(_gains(cell, method, rate)):+.1f})"
            figures.append(own + (gain if method != "cross-entropy" else ""))
        total = ("", "") if method == "cross-entropy" else (f"{statistics.mean(gains):+.2f}", f"{min(gains):+.1f}")
        rows.append((f"**{method}**" if method in OURS else method, *figures, *total))
    return Table(title, header, rows)


# --- bars ---------------------------------------------------------------------------------------------------


def _bars(cells: Cells, rate: str) -> Table:
    """Return the criteria, each with the domain that misses it most or meets it least."""
    rows: list[tuple[str, str, str, str]] = []

    def add(label: str, asked: float, among: dict[str, list[float]]) -> None:
        if among:
            at = min(among, key=lambda name: statistics.mean(among[name]))
            least = statistics.mean(among[at])
            good = sum(statistics.mean(each) >= asked for each in among.values())
            verdict = "met" if least >= asked else "missed" + (f"; {good} of {len(among)} meet it" if good else "")
            rows.append((label, f"{least:+.2f} ({at})", f"≥ {asked:+g}", verdict))

    mnist, cifar = _setting(cells, "mnist"), _setting(cells, "cifar10")
    for method, asked in (
        ("activation, gated", 1.0), ("soft, gated", 1.5), ("activation, head only", 1.0), ("soft, head only", 1.5)
    ):  # fmt: skip
        gains = {name: _gains(cell, method, rate) for name, cell in mnist.items()}
        add(f"MNIST, {method}: over cross-entropy, worst domain", asked, gains)
        add(
            f"MNIST, {method}: worst run",
            -1.0,
            {f"{n}, seed {i}": [g] for n, all_ in gains.items() for i, g in enumerate(all_)},
        )
    hard = {name: cell for name, cell in mnist.items() if _teacher(cell) <= 60}
    for method, asked in (("activation, gated", -1.0), ("soft, gated", -1.5)):
        others = {name: _gains(cell, method, rate, "hinton, w=.9") for name, cell in mnist.items()}
        add(
            f"MNIST, {method}: over Hinton, teacher at or below 60 %",
            20,
            {n: g for n, g in others.items() if n in hard},
        )
        add(f"MNIST, {method}: over Hinton", 5, {n: g for n, g in others.items() if n == "usps"})
        add(f"MNIST, {method}: over Hinton", asked, {n: g for n, g in others.items() if n == "none"})
    if hard:
        over = [g for cell in hard.values() for g in _gains(cell, "activation, gated", rate, "fitnets")]
        add("MNIST, activation, gated: over FitNets, teacher at or below 60 %", 0.8, {"mean of domains": over})
    for method, control in CONTROL.items():
        over = [g for cell in mnist.values() for g in _gains(cell, method, rate, control)]
        add(f"MNIST, {method}: over {control}", 0.4, {"mean of domains": over} if over else {})
    for method in OURS[:4]:
        gains = {name: _gains(cell, method, rate) for name, cell in cifar.items()}
        add(f"CIFAR-10, {method}: over cross-entropy, worst domain", 0.0, gains)
        add(
            f"CIFAR-10, {method}: over cross-entropy",
            0.5,
            {"mean of domains": [g for all_ in gains.values() for g in all_]} if gains else {},
        )
    for method in OURS[:2]:
        over_hinton = {n: _gains(c, method, rate, "hinton, w=.9") for n, c in cifar.items() if n != "none"}
        add(f"CIFAR-10, {method}: over Hinton, shifted", 5.0, over_hinton)
    rows += _next_bar(mnist, rate)
    title = "Criteria and results: differences in percentage points of accuracy, at one learning rate"
    return Table(title, ("", "measured", "criterion", ""), rows)


def _next_bar(cells: Cells, rate: str) -> list[tuple[str, str, str, str]]:
    """Return the criteria of the form with hints: better than Hinton without a shift, and than FitNets under each."""
    if "none" not in cells or KEPT_NAME not in next(iter(cells["none"].values()))["runs"]:
        return []
    plain = statistics.mean(_gains(cells["none"], KEPT_NAME, rate, "hinton, w=.9"))
    over = {n: statistics.mean(_gains(c, KEPT_NAME, rate, "fitnets")) for n, c in cells.items() if n != "none"}
    at = min(over, key=lambda name: over[name])
    return [
        (f"MNIST, {KEPT_NAME}: over Hinton (none)", f"{plain:+.2f}", "> 0", "met" if plain > 0 else "missed"),
        (f"MNIST, {KEPT_NAME}: over FitNets, worst shift", f"{over[at]:+.2f} ({at})", "> 0",
         "met" if over[at] > 0 else "missed"),
        (f"MNIST, {KEPT_NAME}: over FitNets, mean of shifts", f"{statistics.mean(over.values()):+.2f}", "> 0",
         "met" if statistics.mean(over.values()) > 0 else "missed"),
    ]  # fmt: skip


def _cost(cost: dict[str, Any]) -> list[Table]:
    base = cost["step_ms"]["cross-entropy"]
    rows = [(name, f"{ms:.2f} ms", f"{ms / base:.2f}") for name, ms in cost["step_ms"].items()]
    found = [Table("One training step, batch 64", ("", "time", "ratio to cross-entropy"), rows)]
    asked = cost["total_s"]["hinton: the teacher sees every batch"]
    rows = [(name, f"{s:.2f} s", f"{s / asked:.2f}") for name, s in cost["total_s"].items()]
    size = cost["parameters"]
    title = f"A whole distillation, {size['student']:,} parameters from a teacher of {size['teacher']:,}"
    return [*found, Table(title, ("", "time", "ratio to Hinton"), rows)]


@table("distill-tries", source="distill_tries")
def tries(results: dict[str, Any]) -> Block:
    """Gains over cross-entropy on validation images."""
    section = results["sections"]["tries"]
    cells: Cells = section["cells"]
    rows = []
    for what in dict.fromkeys(name for cell in cells.values() for run in cell.values() for name in run):
        figures = []
        for cell in cells.values():
            gains = [run[what] - run["cross-entropy"] for run in cell.values() if what in run]
            first = statistics.mean(run["cross-entropy"] for run in cell.values())
            figures.append("–" if not gains else f"{first if what == 'cross-entropy' else statistics.mean(gains):+.1f}")
        rows.append((f"**{what}**" if what == KEPT else what, *figures))
    title = "Variants: gains over cross-entropy (accuracy in the first row) on validation images, percentage points"
    seeds = len(next(iter(cells.values())))
    notes = [f"Means over {seeds} seeds that are not those of the other tables. Bold: the variant that was chosen."]
    return Block(
        [Table(title, ("", *cells), rows)], notes, "python benchmarks/distill_tries.py --data DATA --cache CACHE"
    )
