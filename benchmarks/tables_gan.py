"""Tables of the adversarial generators measured by `generate.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from blocks import Block, Table, table
from tables_generate import (
    CHOSEN,
    COMMAND,
    SMALL,
    Cells,
    bar,
    gain,
    held_against,
    of_setting,
    ratio,
    rows_of,
    shown,
    values_of,
)

COLUMNS = {
    "accuracy": "accuracy", "frechet": "Fréchet", "class_frechet": "class Fréchet", "precision": "precision",
    "recall": "recall", "coverage": "coverage", "cas": "CAS", "nearness": "nearness",
}  # fmt: skip
FEW = {name: COLUMNS[name] for name in ("accuracy", "frechet", "class_frechet", "precision", "recall", "coverage")}
TITLES = {
    "mnist": "MNIST", "mnist-usps": "USPS, with a classifier of MNIST", "cifar10": "CIFAR-10, with published ResNets",
}  # fmt: skip
ISOLATED = "hinge:", "hinge,", "non-saturating"


@table("generate-gan", source="generate")
def adversarial(results: dict[str, Any]) -> Block:
    """Quality of the images of adversarial generators."""
    section = results["sections"]["test"]
    made, settings = section["machine"], section["settings"]
    found = [_bars(section)]
    for setting, title in TITLES.items():
        cells = {name: cell for name, cell in _gans(section["cells"], setting).items() if name != SMALL}
        if cells:
            steps = settings["steps"][setting]
            found.append(
                rows_of(cells, section["references"][setting], f"{title}, {steps} steps", ours="gan", columns=COLUMNS)
            )
    notes = [
        "Means ± standard deviations over two classifiers and two seeds of the generator each for `gan`, and for "
        "pseudo-labels of USPS; over two runs for others. `gan` uses hinge loss, except on CIFAR-10; all others use "
        "the non-saturating loss with the penalty R1, unless hinge is named. *Sure*: only images that the classifier "
        f"assigns to their class with p > {settings['confident']}; *confident*: only activations that its head "
        f"assigns to their class with this p. {made['cpu']}, one thread per run; torch {section['versions']['torch']}."
    ]
    return Block(found, notes, COMMAND)


@table("generate-small", source="generate")
def small(results: dict[str, Any]) -> Block:
    """Distributions with fewer parameters, or fitted to fewer images, for one generator."""
    section = results["sections"]["test"]
    cell = section["cells"][f"mnist/{SMALL}"]
    first = next(iter(cell.values()))
    groups = {
        "Size of p(h)": [name for name in first["rows"] if "pictures" not in name and ">" not in name],
        "Number of unlabelled images that p(h) is fitted to": [name for name in first["rows"] if "pictures" in name],
        "Confident samples": [name for name in first["rows"] if ">" in name],
    }
    found = []
    for title, names in groups.items():
        rows = [
            (name, *(shown(key, values_of(cell, name, key)) for key in FEW), f"{first['floats'][name] / 1e3:.1f} k")
            for name in names
        ]
        found.append(Table(title, ("", *FEW.values(), "floats of p(h)"), rows))
    notes = [
        "MNIST, the generator of the table above, two classifiers with a generator each; test images. Only p(h) "
        "differs between rows. Floats are those of p(h), without the head."
    ]
    return Block(found, notes, COMMAND)


@table("generate-isolated", source="generate")
def isolated(results: dict[str, Any]) -> Block:
    """Conditions under which hinge loss collapses."""
    section = results["sections"]["test"]
    cells = {name: cell for name, cell in of_setting(section["cells"], "mnist").items() if name.startswith(ISOLATED)}
    rows = [
        (name, *(shown(key, values_of(cell, row, key)) for key in FEW))
        for name, cell in cells.items()
        for row in ("plain", "bank")
        if row in next(iter(cell.values()))["rows"]
    ]
    notes = ["MNIST, 1500 steps, without feature consistency; two classifiers with a generator each."]
    return Block([Table("Hinge loss, one part changed at a time", ("", *FEW.values()), rows)], notes, COMMAND)


@table("generate-gan-choices", source="generate")
def choices(results: dict[str, Any]) -> Block:
    """Candidates for the options, on the selection split."""
    section = results["sections"]["selection"]
    cells = _gans(section["cells"], "mnist")
    found = [rows_of(cells, section["references"]["mnist"], "MNIST, selection images: options", "gan", columns=COLUMNS)]
    return Block(found, ["Two seeds each."], f"{COMMAND} --share selection")


def _gans(cells: Cells, setting: str) -> Cells:
    return {name: cell for name, cell in of_setting(cells, setting).items() if name.startswith("gan")}


def _bars(section: dict[str, Any]) -> Table:
    """Return the criteria, each with the mean and the worst run; runs are compared with the baseline of their seeds."""
    rows: list[tuple[str, ...]] = []
    mnist, usps, cifar = (_gans(section["cells"], name) for name in TITLES)
    against = partial(held_against, "gan")

    def add(label: str, asked: str, values: list[float]) -> None:
        rows.extend(bar(label, asked, values))

    def own(cells: Cells, row: str, key: str) -> list[float]:
        return values_of(cells["gan"], row, key) if "gan" in cells else []

    one = "gan, one-hot, labels"
    add("MNIST, bank: Fréchet, ratio to one-hot with labels", "≤ 0.8×", against(mnist, one, "frechet", ratio))
    add("MNIST, bank: coverage, over one-hot with labels", "≥ +0.05", against(mnist, one, "coverage", gain))
    add("MNIST, bank: CAS, over one-hot with labels", "≥ −0.01", against(mnist, one, "cas", gain))
    add("MNIST, bank, confident: accuracy", "≥ 0.95", own(mnist, "bank, confident", "accuracy"))
    for key, asked, how, what in (
        ("frechet", "≤ 1.1×", ratio, "Fréchet, ratio to the bank"),
        ("accuracy", "≥ −0.02", gain, "accuracy, over the bank"),
        ("coverage", "≥ −0.04", gain, "coverage, over the bank"),
    ):
        add(f"MNIST, {CHOSEN}: {what}", asked, against(mnist, "gan", key, how, CHOSEN, "bank"))
    for other in ("gan, one-hot, 100 labels", "gan, one-hot, labels of a 100-label classifier"):
        add(f"MNIST, bank: CAS, over {other[5:]}", "≥ +0.1", against(mnist, other, "cas", gain))
    pseudo = "gan, one-hot, pseudo-labels"
    add("USPS, bank: Fréchet, ratio to one-hot with pseudo-labels", "≤ 0.6×", against(usps, pseudo, "frechet", ratio))
    add("USPS, bank: coverage, over one-hot with pseudo-labels", "≥ +0.15", against(usps, pseudo, "coverage", gain))
    add("USPS, bank, confident: accuracy", "≥ 0.94", own(usps, "bank, confident", "accuracy"))
    add("CIFAR-10, bank: Fréchet, ratio to one-hot with labels", "≤ 1×", against(cifar, one, "frechet", ratio))
    add("CIFAR-10, bank: coverage, over one-hot with labels", "≥ +0", against(cifar, one, "coverage", gain))
    seconds = [run["seconds"] for cells in (mnist, usps) for run in cells.get("gan", {}).values()]
    add("digits: training, two runs in parallel", "≤ 120s", seconds)
    return Table("Criteria and results", ("", "mean", "worst run", "criterion", "mean is"), rows)
