"""Tables of the results of `outliers.py` and `scores.py`."""

from __future__ import annotations

import statistics
from typing import Any

from blocks import Block, Table, table
from tables_generate import bar, gain, ratio

OURS = "directional, elliptic"
TRIMMED = f"{OURS}, trimmed"
GROUPS = {
    "CIFAR-10, published": ("cifar-resnet32", "cifar-resnet44"),
    "CIFAR-10, fine-tuned": ("cifar-resnet32-ft", "cifar-resnet44-ft"),
    "MNIST, ReLU": ("mnist-relu-0", "mnist-relu-1", "mnist-relu-2"),
    "MNIST, linear": ("mnist-linear-0", "mnist-linear-1", "mnist-linear-2"),
}
NEAR = ("cifar-small-8", "mnist-relu-8")
OTHERS = ("KNN", "ViM")
Cells = dict[str, dict[str, Any]]


@table("outliers", source="outliers")
def outliers(results: dict[str, Any]) -> Block:
    """Separation of outliers from familiar activations."""
    section = results["sections"]["networks"]
    cells, made = section["cells"], section["machine"]
    found = [_bars(cells), _far(cells)]
    found += [_sets(cells, names, title) for title, names in GROUPS.items() if set(names) <= set(cells)]
    notes = [
        "Far sets: AUROC / FPR95, means over sets and networks; mean is over networks. FPR95: the fraction of "
        "outliers that pass the threshold that 95 % of familiar images pass. All scores are fitted to half of the test "
        "images of each network, without labels unless they are named, and compared with the other half. "
        f"{made['cpu']}; torch {section['versions']['torch']}."
    ]
    return Block(found, notes, "python benchmarks/outliers.py --data DATA --cache CACHE")


@table("outliers-more", source="outliers")
def more(results: dict[str, Any]) -> Block:
    """Wrong predictions, near and shifted sets, reference activations that are few or have outliers."""
    section = results["sections"]["networks"]
    cells = section["cells"]
    found = [_misclassified(cells), _near(cells), _dirty(cells), _few(cells)]
    found += [_shifted(own, title) for title, own in _by_data(cells).items()]
    notes = ["Networks and halves as above."]
    return Block(found, notes, "python benchmarks/outliers.py --data DATA --cache CACHE")


def auroc(cell: dict[str, Any], method: str, sets: str = "far", key: str = "auroc") -> float:
    """The mean of a figure over the sets of one network."""
    return statistics.mean(each[key] for each in cell["methods"][method][sets].values())


def _known(cells: Cells) -> dict[str, list[dict[str, Any]]]:
    """Cells of networks that know all classes, by group."""
    groups = {title: [cells[name] for name in names if name in cells] for title, names in GROUPS.items()}
    return {title: found for title, found in groups.items() if found}


def _bars(cells: Cells) -> Table:
    rows: list[tuple[str, ...]] = []
    data = _by_data(cells)
    cifar, mnist = data.get("CIFAR-10", []), data.get("MNIST", [])

    def add(label: str, asked: str, values: list[float]) -> None:
        rows.extend(bar(label, asked, values))

    def over(found: list[dict[str, Any]], other: str, sets: str = "far") -> list[float]:
        return [gain(auroc(cell, OURS, sets), auroc(cell, other, sets)) for cell in found]

    add("CIFAR-10, far: AUROC, over energy", "≥ +0.05", over(cifar, "energy"))
    fpr = [ratio(auroc(cell, OURS, key="fpr95"), auroc(cell, "energy", key="fpr95")) for cell in cifar]
    add("CIFAR-10, far: FPR95, ratio to energy", "≤ 1×", fpr)
    wrong = [cell["methods"][OURS]["misclassified"] - cell["methods"]["energy"]["misclassified"] for cell in cifar]
    add("CIFAR-10, wrong predictions: AUROC, over energy", "≥ −0.02", wrong)
    dirty = [cell["dirtied"]["far"][TRIMMED]["auroc"] - auroc(cell, OURS) for cell in cifar]
    add("CIFAR-10, a tenth outliers in the fit, trimmed: AUROC, over clean", "≥ −0.02", dirty)
    everything = [*cifar, *mnist]
    for other in OTHERS:
        add(f"all networks, far: AUROC, over {other}", "≥ +0", over(everything, other))
    near = [cells[name] for name in NEAR if name in cells]
    for other in ("energy", *OTHERS):
        add(f"held-out classes: AUROC, over {other}", "≥ +0", over(near, other, "near"))
    add("MNIST, far: AUROC, over energy", "≥ +0.02", over(mnist, "energy"))
    return Table("Criteria and results", ("", "mean", "worst network", "criterion", "mean is"), rows)


def _far(cells: Cells) -> Table:
    groups = _known(cells)
    rows = []
    for method in next(iter(cells.values()))["methods"]:
        figures = {
            title: [statistics.mean(auroc(cell, method, key=key) for cell in found) for key in ("auroc", "fpr95")]
            for title, found in groups.items()
        }
        every = [cell for found in groups.values() for cell in found]
        mean = [statistics.mean(auroc(cell, method, key=key) for cell in every) for key in ("auroc", "fpr95")]
        shown = (f"{a:.3f} / {f:.3f}" for a, f in (*figures.values(), mean))
        rows.append((_bold(method), *shown))
    return Table("Far sets, AUROC / FPR95", ("", *groups, "mean"), rows)


def _sets(cells: Cells, names: tuple[str, ...], title: str) -> Table:
    own = [cells[name] for name in names]
    sets = list(own[0]["methods"][OURS]["far"])
    rows = []
    for method in ("msp", "energy", "Mahalanobis, labels", "KNN", "ViM", OURS):
        figures = (statistics.mean(cell["methods"][method]["far"][each]["auroc"] for cell in own) for each in sets)
        rows.append((_bold(method), *(f"{value:.3f}" for value in figures)))
    return Table(f"{title}: AUROC by far set", ("", *sets), rows)


def _misclassified(cells: Cells) -> Table:
    groups = _known(cells)
    rows = []
    for method in next(iter(cells.values()))["methods"]:
        means = (statistics.mean(cell["methods"][method]["misclassified"] for cell in own) for own in groups.values())
        rows.append((_bold(method), *(f"{value:.3f}" for value in means)))
    accuracy = (f"{100 * statistics.mean(cell['accuracy'] for cell in own):.1f} %" for own in groups.values())
    rows.append(("accuracy", *accuracy))
    return Table("Separation of wrong from right predictions, familiar images: AUROC", ("", *groups), rows)


def _near(cells: Cells) -> Table:
    own = {name: cells[name] for name in NEAR if name in cells}
    rows = []
    for method in next(iter(cells.values()))["methods"]:
        figures = []
        for cell in own.values():
            near = next(iter(cell["methods"][method]["near"].values()))
            figures += [f"{near['auroc']:.3f} / {near['fpr95']:.3f}"]
        rows.append((_bold(method), *figures))
    rows.append(("accuracy on the others", *(f"{100 * cell['accuracy']:.1f} %" for cell in own.values())))
    return Table("Two classes held out of training, AUROC / FPR95", ("", *own), rows)


def _dirty(cells: Cells) -> Table:
    groups = _known(cells)
    rows = []
    for method in next(iter(cells.values()))["dirtied"]["far"]:
        if method in ("outliers", "share"):
            continue
        figures = []
        for own in groups.values():
            clean = statistics.mean(auroc(cell, method) for cell in own)
            dirty = statistics.mean(cell["dirtied"]["far"][method]["auroc"] for cell in own)
            figures.append(f"{clean:.3f} → {dirty:.3f}")
        rows.append((_bold(method), *figures))
    return Table(
        "Fits to activations with a tenth of outliers: AUROC on far sets, clean → with outliers",
        ("", *groups),
        rows,
    )


def _few(cells: Cells) -> Table:
    groups = _known(cells)
    counts = list(next(iter(cells.values()))["few"])
    rows = [
        (
            f"{count} activations",
            *(f"{statistics.mean(cell['few'][count]['auroc'] for cell in own):.3f}" for own in groups.values()),
        )
        for count in counts
    ]
    whole = (f"{statistics.mean(auroc(cell, OURS) for cell in own):.3f}" for own in groups.values())
    rows.append(("5000 activations", *whole))
    return Table(f"Fits to few unlabelled activations: AUROC of {OURS} on far sets", ("", *groups), rows)


def _by_data(cells: Cells) -> dict[str, list[dict[str, Any]]]:
    starts = {"CIFAR-10": "cifar-resnet", "MNIST": "mnist"}
    known = {name: cell for name, cell in cells.items() if name not in NEAR}
    found = {title: [c for name, c in known.items() if name.startswith(start)] for title, start in starts.items()}
    return {title: own for title, own in found.items() if own}


def _shifted(own: list[dict[str, Any]], title: str) -> Table:
    methods = ("msp", "energy", "KNN", "ViM", OURS)
    rows = []
    for each in own[0]["shifted accuracy"]:
        accuracy = statistics.mean(cell["shifted accuracy"][each] for cell in own)
        figures = (
            f"{statistics.mean(cell['methods'][method]['shifted'][each]['auroc'] for cell in own):.3f}"
            for method in methods
        )
        rows.append((each, f"{100 * accuracy:.1f} %", *figures))
    return Table(f"{title}, separation of shifted from familiar images: AUROC", ("", "accuracy", *methods), rows)


def _bold(method: str) -> str:
    return f"**{method}**" if method == OURS else method


@table("scores", source="scores")
def cost(results: dict[str, Any]) -> Block:
    """Cost of a batch, in evaluations of the head."""
    section = results["sections"]["cost"]
    cells, made = section["cells"], section["machine"]
    names = list(next(iter(cells.values()))["scores"])
    rows = [
        (
            f"**{name}**" if name == "Composite" else name,
            *(f"{cell['scores'][name]['ratio']:.2f}" for cell in cells.values()),
        )
        for name in names
    ]
    rows += [
        (f"{name}, seconds", *(f"{cell['seconds'][name]:.2g}" for cell in cells.values()))
        for name in next(iter(cells.values()))["seconds"]
    ]
    bars = section["bars"]
    notes = [
        f"CPU time of a batch of {section['settings']['batch']} relative to one evaluation of the head, median of "
        f"{section['settings']['rounds']} rounds; criteria at d = 512, K = 1000: Composite ≤ {bars['Composite']:g}, "
        f"directional ≤ {bars['directional']:g}, KNN ≤ {bars['KNN']:g} of KNN, plain. Neighbours are those among 4000 "
        f"rows. Fits and tables are not included, but for the last two lines. {made['cpu']}, "
        f"{made['threads_used']} thread; torch {section['versions']['torch']}."
    ]
    return Block(
        [Table("Cost of scores, in evaluations of the head", ("", *cells), rows)], notes, "python benchmarks/scores.py"
    )


# --- networks of many kinds ---------------------------------------------------------------------------------


@table("outliers-kinds", source="outliers_kinds")
def kinds(results: dict[str, Any]) -> Block:
    """Scores on networks of many kinds: near and far means, each network, few rows, false alarms, other rules."""
    section = results["sections"]["networks"]
    judged = {name: cell for name, cell in section["cells"].items() if cell["role"] == "judging"}
    chosen = {name: cell for name, cell in section["cells"].items() if cell["role"] == "choosing"}
    tables_made: list[Table] = []
    for title, cells in (("judging", judged), ("choosing", chosen)):
        if cells:
            tables_made.append(_kind_means(cells, f"AUROC, means over the {len(cells)} networks for {title}"))
    if judged:
        tables_made = [_kind_criteria(judged), *tables_made, _kind_networks(judged), _kind_sizes(judged)]
    if chosen:
        tables_made.append(_kind_rules(chosen))
    splits = section["settings"].get("photograph_splits", 0)
    notes = [
        "Largest number of reference activations unless it says otherwise; no labels. Near and far: means over sets, "
        f"then over networks; mean: of both. imagenet-lite0: {splits} splits. "
        f"{section['machine']['cpu']}; torch {section['versions']['torch']}."
    ]
    return Block(tables_made, notes, "python benchmarks/outliers_kinds.py --data DATA --cache CACHE")


def kind_mean(cell: dict[str, Any], method: str, kind: str, size: str | None = None) -> float | None:
    """Return the mean AUROC over the near or far sets of one network; None where there are none."""
    sets = cell["sets"][size or max(cell["sets"], key=int)][method]
    values = [value for key, value in sets.items() if key.startswith(kind)]
    return statistics.mean(values) if values else None


def kinds_mean(cells: Cells, method: str, kind: str) -> float:
    """Return the mean over networks that have near or far sets."""
    values = [kind_mean(cell, method, kind) for cell in cells.values()]
    return statistics.mean(value for value in values if value is not None)


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kind_means(cells: Cells, title: str) -> Table:
    first = next(iter(cells.values()))
    methods = list(next(iter(first["sets"].values())))
    rows = []
    for method in methods:
        near, far = (kinds_mean(cells, method, kind) for kind in ("near", "far"))
        wrong = statistics.mean(cell["wrong"][method] for cell in cells.values() if cell["wrong"][method] is not None)
        rows.append(((near + far) / 2, (method, *map(_three, (near, far, (near + far) / 2, wrong)))))
    rows.sort(key=lambda row: -row[0])
    return Table(title, ("score", "near", "far", "mean", "wrong answers"), [row for _, row in rows])


def _kind_criteria(cells: Cells) -> Table:
    """Compare the figures of the recommended score with those that were asked for before the measurement."""
    first = next(iter(cells.values()))
    methods = [method for method in next(iter(first["sets"].values())) if method != "Composite"]
    own = {kind: kinds_mean(cells, "Composite", kind) for kind in ("near", "far")}
    others = {kind: {method: kinds_mean(cells, method, kind) for method in methods} for kind in ("near", "far")}
    rows = []

    def add(name: str, figure: str, asked: str, met: bool) -> None:
        rows.append((name, figure, asked, "met" if met else "**missed**"))

    for kind in ("near", "far"):
        best = max(methods, key=lambda method: others[kind][method])
        bound = others[kind][best] - 0.005
        add(f"mean of {kind} sets", _three(own[kind]), f"≥ {bound:.3f} ({best} − .005)", own[kind] >= bound)
    both = {method: (others["near"][method] + others["far"][method]) / 2 for method in methods}
    best, mean = max(methods, key=lambda method: both[method]), (own["near"] + own["far"]) / 2
    add("mean of both", _three(mean), f"> {both[best]:.3f} ({best})", mean > both[best])
    gaps, failed = [], []
    for name, cell in cells.items():
        for kind in ("near", "far"):
            value_of_own = kind_mean(cell, "Composite", kind)
            if value_of_own is not None:
                peers = [value for method in methods if (value := kind_mean(cell, method, kind)) is not None]
                gaps.append((value_of_own - max(peers), f"{name}, {kind}"))
        sets = cell["sets"][max(cell["sets"], key=int)]
        for key, value in sets["Composite"].items():
            if key.startswith("far") and value < 0.5 and max(sets[method][key] for method in methods) >= 0.8:
                failed.append(f"{name}: {key.removeprefix('far/')}")
    lowest, where = min(gaps)
    below = sum(gap < -0.02 for gap, _ in gaps)
    add(
        "worst network, against its best other score",
        f"{lowest:+.3f} ({where}); {below} below",
        "≥ −.02",
        lowest >= -0.02,
    )
    add("far sets below .5 where another has .8", ", ".join(failed) or "none", "none", not failed)
    small = [cell for cell in cells.values() if cell["dimension"] <= 128 and "200" in cell["sets"]]
    if small:
        few = statistics.mean(kind_mean(cell, "Composite", "far", "200") or 0.0 for cell in small)
        add(f"200 rows, far, {len(small)} networks of d ≤ 128", _three(few), "≥ .940", few >= 0.94)
    losses = [(cell["dirty"]["clean"] - cell["dirty"]["trimmed"], name) for name, cell in cells.items()]
    loss, (worst, where) = statistics.mean(loss for loss, _ in losses), max(losses)
    add("a tenth outliers, trimmed: loss", f"{loss:.3f}; worst {worst:.3f} ({where})", "≤ .01", loss <= 0.01)
    wrong = [(cell["wrong"]["Composite"] - cell["wrong"]["msp"], name) for name, cell in cells.items()]
    gain_wrong, (worst, where) = statistics.mean(value for value, _ in wrong), min(wrong)
    figure = f"{gain_wrong:+.3f}; worst {worst:+.3f} ({where})"
    add("wrong from right answers, against msp", figure, "≥ −.03", gain_wrong >= -0.03)
    alarms = [cell["alarms"]["mean"] for cell in cells.values()]
    inside = min(alarms) >= 0.04 and max(alarms) <= 0.06
    add("false alarms at 5 %, lowest and highest", f"{min(alarms):.4f}, {max(alarms):.4f}", "4–6 %", inside)
    return Table("Figures asked and measured, networks for judging", ("figure", "Composite", "asked", "result"), rows)


def _kind_networks(cells: Cells) -> Table:
    rows = []
    for name, cell in cells.items():
        line = [name, f"{cell['accuracy']:.3f}"]
        for kind in ("near", "far"):
            peers = {
                method: kind_mean(cell, method, kind)
                for method in next(iter(cell["sets"].values()))
                if method != "Composite"
            }
            known = {method: value for method, value in peers.items() if value is not None}
            if known:
                best = max(known, key=lambda method: known[method])
                line += [_three(kind_mean(cell, "Composite", kind)), f"{known[best]:.3f} ({best})"]
            else:
                line += ["", ""]
        alarms, dirty = cell["alarms"], cell["dirty"]
        line += [f"{alarms['mean']:.3f} ± {alarms['deviation']:.3f}"]
        rows.append((*line, _three(dirty["clean"]), _three(dirty["dirty"]), _three(dirty["trimmed"])))
    header = ("network", "accuracy", "near", "best other", "far", "best other", "false alarms at 5 %")
    title = "Composite on each network for judging, next to the best other score of that network"
    return Table(title, (*header, "far, clean", "a tenth outliers", "trimmed"), rows)


def _kind_sizes(cells: Cells) -> Table:
    rows = []
    for name, cell in cells.items():
        for size in cell["sets"]:
            figures = [
                _three(kind_mean(cell, method, kind, size))
                for method in ("Composite", "directional, OAS", "Mahalanobis++", "KNN")
                for kind in ("near", "far")
            ]
            rows.append((name, size, *figures))
    header = [f"{method}, {kind}" for method in ("Composite", "D", "Mahalanobis++", "KNN") for kind in ("near", "far")]
    return Table("By the number of reference activations", ("network", "rows", *header), rows)


def _kind_rules(cells: Cells) -> Table:
    rows = []
    for rule in next(iter(cells.values()))["rules"]:
        near, far = (
            statistics.mean(
                cell["rules"][rule][kind] for cell in cells.values() if cell["rules"][rule][kind] is not None
            )
            for kind in ("near", "far")
        )
        rows.append((rule, *map(_three, (near, far, (near + far) / 2))))
    title = "Rules for D, M and P, means over the networks for choosing"
    return Table(title, ("rule", "near", "far", "mean"), rows)
