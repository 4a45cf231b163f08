"""Tables of the results of `realism.py`."""

from __future__ import annotations

from typing import Any

from blocks import Block, Table, bound, plain, table, tiny


@table("realism", source="realism")
def realism(results: dict[str, Any]) -> Block:
    """Two-sample tests of every base on every network."""
    section = results["sections"]["realism"]
    cells, bars = section["cells"], section["bars"]
    small = [name for name in cells if name != "efficientnet-lite0"]
    header = ("AUC of LR / MLP / kNN", *small)
    laws = list(dict.fromkeys(law for name in small for law in _first(cells[name])["laws"]))
    rows = [("real against real", *(_aucs(_runs(cells[name], None)) for name in small))]
    rows += [(law, *(_aucs(_runs(cells[name], law)) for name in small)) for law in laws]
    found = [_realism_bars(cells, small, bars), Table("Separation from real activations; 0.5 is none", header, rows)]

    first = _first(cells[small[0]])["laws"]
    columns = ("", "floats", "fit, CPU s", *small)
    rows = [("real against real", "–", "–", *(f"{_mean(_runs(cells[n], None), 'energy'):.4f}" for n in small))]
    for law in laws:
        at = next(name for name in small if law in _first(cells[name])["laws"])
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
            *(_effective(runs, law) for law in _PRIORS),
        ))  # fmt: skip
    header = ("network", "accuracy", "confidence", "T*", "zeros in h", "tilt identity", "cos(mean, w)", "centered",
              *(f"classes, {law}" for law in _PRIORS))  # fmt: skip
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
        header = ("efficientnet-lite0", "floats", "fit, CPU s", "AUC of LR / MLP / kNN", "confidence of samples")
        title = f"K = 1000, d = 1280, fitted to {facts['fitted']} activations; tests of all classes together"
        found.append(Table(title, header, rows))
    found += _rare_and_em(results)
    made = section["machine"]
    used = ", ".join(f"{name} {version}" for name, version in section["versions"].items() if name != "python")
    notes = [
        f"Means over {len(next(iter(cells.values())))} splits of the test activations, "
        f"{section['settings']['per_class']} per class. {made['cpu']}, one thread per process; {used}."
    ]
    return Block(found, notes, "python benchmarks/realism.py --data DATA --cache CACHE")


_PRIORS = ("sphere", "elliptic", "gaussian", "gaussian, marginal ML", "mixture")  # whose implied prior is shown


def _runs(cell: dict[str, Any], law: str | None) -> list[dict[str, Any]]:
    """Return the results of each split for a base, or for real activations."""
    if law is None:
        return [run["network"] for run in cell.values()]
    return [run["laws"][law] for run in cell.values() if law in run["laws"]]


def _first(cell: dict[str, Any]) -> dict[str, Any]:
    run: dict[str, Any] = next(iter(cell.values()))
    return run


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
    """Return the criteria, each with the figure of the worst network."""
    cifar = [name for name in small if name.startswith("cifar")]
    off = max(abs(_auc(_runs(cells[n], None), t) - 0.5) for n in small for t in ("logistic", "mlp", "knn"))
    rows = [("real against real: farthest from 0.5", f"{off:.3f}", bound(off, bars["real"]))]
    names = {"logistic": "LR", "mlp": "MLP", "knn": "kNN"}

    def add(label: str, law: str, asked: dict[str, float], among: list[str]) -> None:
        if not among:
            return
        for test, bar in asked.items():
            if test == "floats":
                most = max(run["floats"] for n in among for run in _runs(cells[n], law))
                rows.append((f"{label}: floats", f"{most}", bound(most, bar)))
            else:
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
        rows.append(("the same, distributions that are not rectified: smallest MLP", f"{least:.3f}", "shown"))
    add("goal on CIFAR, `mixture, 16/64`", "mixture, 16/64", bars["goal"], cifar)
    return Table("Criteria and results, on the worst network", ("", "measured", "criterion"), rows)


def _rare_and_em(results: dict[str, Any]) -> list[Table]:
    found = []
    if cells := results["sections"].get("rare", {}).get("cells"):
        rows = [
            (f"a class of prior {p}", f"{s:.3g} s per sample" if s >= 1 else f"{1e3 * s:.3g} ms per sample")
            for p, s in cells["seconds_a_draw"].items()
        ]
        rows += [
            (f"{kind}, {one['draws']} samples of 1000 classes at d = 1280 (smallest prior {one['least_prior']:g})",
             f"{one['seconds']:.3g} s") for kind, one in cells["thousand_classes"].items()
        ]  # fmt: skip
        found.append(Table("Cost of class samples of a marginal, CPU time", ("", ""), rows))
    if cells := results["sections"].get("em", {}).get("cells"):
        rows = [
            (
                name,
                *(f"{cell[who]['nats']:.2f} nats, {cell[who]['seconds']:.3g} s" for who in ("penult", "scikit-learn")),
            )
            for name, cell in cells.items()
        ]
        header = ("components in dimensions", "penult", "scikit-learn GaussianMixture")
        found.append(Table("EM: held-out log likelihood in the principal subspace, CPU time", header, rows))
    return found
