"""Tables of the results of `generate.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from blocks import Block, Table, table

Cells = dict[str, dict[str, Any]]  # by model, by seeds

COLUMNS = {
    "accuracy": "accuracy", "frechet": "Fréchet", "class_frechet": "class Fréchet", "precision": "precision",
    "recall": "recall", "density": "density", "coverage": "coverage", "cas": "CAS", "nearness": "nearness",
}  # fmt: skip
SPREAD = ("accuracy", "frechet", "coverage", "cas")  # columns with a standard deviation
CHOSEN = "mixture, 100 in 24"  # of the mixtures, by the selection images
SMALL = "gan, how small"
COMMAND = "python benchmarks/generate.py --data DATA --cache CACHE"


@table("generate", source="generate")
def generate(results: dict[str, Any]) -> Block:
    """Quality of generated images."""
    section = results["sections"].get("test") or results["sections"]["selection"]
    made, settings = section["machine"], section["settings"]
    found = [_bars(section)] if "test" in results["sections"] else []
    for setting, title in (("mnist", "MNIST"), ("mnist-usps", "USPS, with a classifier of MNIST")):
        cells = _autoencoders(section["cells"], setting)
        if cells:
            steps, each = settings["steps"][setting], settings["each"]
            found.append(
                rows_of(cells, section["references"][setting], f"{title}, {steps} steps, {each} images per class")
            )
    judges = ", ".join(
        f"{100 * ref['judge']:.1f} % ({name})" for name, ref in section["references"].items() if "mnist" in name
    )
    notes = [
        "Means ± standard deviations over two classifiers and two seeds of the generator each; two seeds for baselines "
        "that do not depend on the classifier. The evaluator is an independent network with a test accuracy of "
        f"{judges}; Fréchet distances are in its feature space, so that only their ratios have a meaning. *Sure*: only "
        f"images that the classifier assigns to their class with p > {settings['confident']}; *confident*: only "
        "activations that its head assigns to their class with this p; *rejected*: images that it assigns to another "
        "class are replaced. "
        f"{made['cpu']}, one thread per run; torch {section['versions']['torch']}."
    ]
    return Block(found, notes, COMMAND)


@table("generate-choices", source="generate")
def choices(results: dict[str, Any]) -> Block:
    """Candidates for the options, on the selection split."""
    section = results["sections"]["selection"]
    cells = _autoencoders(section["cells"], "mnist")
    found = [rows_of(cells, section["references"]["mnist"], "MNIST, selection images: options of autoencoder and p(h)")]
    notes = ["Two seeds each. The options of the other tables were chosen by these figures only."]
    return Block(found, notes, f"{COMMAND} --share selection")


def of_setting(cells: Cells, name: str) -> Cells:
    """Cells of a setting, by model."""
    return {key.split("/", 1)[1]: cell for key, cell in cells.items() if key.split("/")[0] == name}


def _autoencoders(cells: Cells, name: str) -> Cells:
    adversarial = "gan", "hinge", "non-saturating"
    return {model: cell for model, cell in of_setting(cells, name).items() if not model.startswith(adversarial)}


def held_against(
    ours: str,
    cells: Cells,
    other: str,
    key: str,
    how: Callable[[float, float], float],
    row: str = "bank",
    base: str = "plain",
) -> list[float]:
    """Figures of one model's row held against those of another's, run by run, with the same seeds."""
    if ours not in cells or other not in cells:
        return []
    found = []
    for seeds, run in cells[ours].items():
        seed = seeds.split("-")[1]
        beside = cells[other].get(seeds) or cells[other].get(f"{seed}-{seed}")
        if beside and row in run["rows"]:
            found.append(how(run["rows"][row][key], beside["rows"][base][key]))
    return found


def ratio(a: float, b: float) -> float:
    """The first in units of the second."""
    return a / b


def gain(a: float, b: float) -> float:
    """How much more the first is."""
    return a - b


def bar(label: str, asked: str, values: list[float]) -> list[tuple[str, ...]]:
    """Return a row with a criterion and its result, or no row without values."""
    if not values:
        return []
    sign, limit = asked.split()
    number = float(limit.rstrip("×s").replace("+", "").replace("−", "-"))
    least = sign == "≥"
    mean, worst = statistics.mean(values), (min if least else max)(values)
    met = mean >= number if least else mean <= number
    unit = "×" if limit.endswith("×") else " s" if limit.endswith("s") else ""
    plus = "+" if "+" in limit or "−" in limit else ""
    verdict = "met" if met else "**missed**"
    return [(label, f"{mean:{plus}.3g}{unit}", f"{worst:{plus}.3g}{unit}", asked, verdict)]


def values_of(cell: dict[str, Any], row: str, key: str) -> list[float]:
    """A figure of all runs."""
    return [run["rows"][row][key] for run in cell.values() if row in run["rows"]]


def rows_of(
    cells: Cells, reference: dict[str, Any], title: str, ours: str = "vae", columns: dict[str, str] = COLUMNS
) -> Table:
    """Every row of every model, ours last; figures are means over runs."""
    rows: list[tuple[str, ...]] = [("real images", *(shown(key, [reference["row"][key]]) for key in columns), "")]
    for model in sorted(cells, key=lambda name: (name.startswith(ours) and "one-hot" not in name, name)):
        cell = cells[model]
        for row in next(iter(cell.values()))["rows"]:
            label = model if row == "plain" else f"{model}, {row}"
            label = label.replace("pictures that the classifier is sure of", "sure")
            floats = next(iter(cell.values())).get("floats", {}).get(row.removesuffix(", confident"))
            bold = model == ours and row in ("bank", CHOSEN)
            figures = (shown(key, values_of(cell, row, key)) for key in columns)
            rows.append(
                (f"**{label}**" if bold else label, *figures, "" if floats is None else f"{floats / 1e3:.0f} k")
            )
    return Table(title, ("", *columns.values(), "floats of p(h)"), rows)


def shown(key: str, values: list[float]) -> str:
    """A mean, with a deviation over runs where the column has one."""
    digits = 0 if "frechet" in key and statistics.mean(values) >= 20 else 1 if "frechet" in key else 3
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if key in SPREAD and len(values) > 1 else text


# --- bars ---------------------------------------------------------------------------------------------------


def _bars(section: dict[str, Any]) -> Table:
    """Return the criteria, each with the mean and the worst run; runs are compared with the baseline of their seeds."""
    rows: list[tuple[str, ...]] = []
    mnist, usps = (_autoencoders(section["cells"], name) for name in ("mnist", "mnist-usps"))
    against = partial(held_against, "vae")

    def add(label: str, asked: str, values: list[float]) -> None:
        rows.extend(bar(label, asked, values))

    one = "one-hot, labels"
    add("MNIST, bank: Fréchet, ratio to one-hot with labels", "≤ 0.6×", against(mnist, one, "frechet", ratio))
    add("MNIST, bank: coverage, ratio to one-hot with labels", "≥ 2×", against(mnist, one, "coverage", ratio))
    add("MNIST, bank: CAS, over one-hot with labels", "≥ +0.02", against(mnist, one, "cas", gain))
    if "vae" in mnist:
        cell = mnist["vae"]
        add("MNIST, bank: accuracy", "≥ 0.92", values_of(cell, "bank", "accuracy"))
        add("MNIST, bank, confident: accuracy", "≥ 0.96", values_of(cell, "bank, confident", "accuracy"))
        add(
            "MNIST, held-out bank: Fréchet, ratio to its own bank",
            "≤ 1.2×",
            against(mnist, "vae", "frechet", ratio, "bank, held-out", "bank"),
        )
        add(
            f"MNIST, {CHOSEN}: Fréchet, ratio to the bank",
            "≤ 1.15×",
            against(mnist, "vae", "frechet", ratio, CHOSEN, "bank"),
        )
        add(
            f"MNIST, {CHOSEN}: accuracy, over the bank",
            "≥ −0.03",
            against(mnist, "vae", "accuracy", gain, CHOSEN, "bank"),
        )
        add(
            f"MNIST, {CHOSEN}: coverage, over the bank",
            "≥ −0.06",
            against(mnist, "vae", "coverage", gain, CHOSEN, "bank"),
        )
        add(f"MNIST, {CHOSEN}: floats, thousands", "≤ 40", [run["floats"][CHOSEN] / 1e3 for run in cell.values()])
    for other in ("one-hot, 100 labels", "one-hot, labels of a 100-label classifier"):
        add(f"MNIST, bank: CAS, over {other}", "≥ +0.1", against(mnist, other, "cas", gain))
    pseudo = "one-hot, pseudo-labels"
    add("USPS, bank: Fréchet, ratio to one-hot with pseudo-labels", "≤ 0.6×", against(usps, pseudo, "frechet", ratio))
    add("USPS, bank: coverage, over one-hot with pseudo-labels", "≥ +0.15", against(usps, pseudo, "coverage", gain))
    if "vae" in usps:
        add("USPS, bank, confident: accuracy", "≥ 0.94", values_of(usps["vae"], "bank, confident", "accuracy"))
    seconds = [run["seconds"] for cells in (mnist, usps) for run in cells.get("vae", {}).values()]
    add("training, two runs in parallel", "≤ 60s", seconds)
    return Table("Criteria and results", ("", "mean", "worst run", "criterion", "mean is"), rows)
