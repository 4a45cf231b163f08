"""Outlier scores on networks of many kinds: the recommended score next to those of other authors.

The networks of `outliers_caches.py` are for choosing rules or for judging them; nothing is chosen by the second. Scores
are fitted to 200, 1000 and 5000 reference activations, or as many as there are. Measured for each network:

* ``sets``: AUROC of near and far outliers against familiar activations, for each score and number of rows,
* ``wrong``: AUROC of wrong against right predictions,
* ``dirty``: mean far AUROC with a tenth of outliers among the reference activations, and with a trimmed fit,
* ``alarms``: the false-alarm rate at 5 % over 50 random halves of familiar activations that nothing was fitted to,
* ``rules``: other ways to combine the three parts of `penult.scores.Composite`, on the networks for choosing only.

Computing activations needs the packages that `outliers_caches.py` names; reading them needs those of penult.

Example:
    python benchmarks/outliers_kinds.py --data ../shared/data --cache /tmp/penult-kinds
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import penult
import tables
from outliers_caches import ROLES, path_of, write_cache
from outliers_peers import PEERS, Peer
from penult.scores import Composite, directional
from record import load, machine, short, versions, write

HERE = Path(__file__).parent
LAYOUT = 1
SIZES = (200, 1000, 5000)
DEFAULT, DIRECTION = "Composite", "directional, OAS"
TRIM = 0.2
ALARM, SPLITS = 0.05, 50
PHOTOGRAPH_SPLITS = 10
# Most outliers of a set that are tested; the last sixth of each set is kept to contaminate reference activations.
MOST_TESTED, KEPT = 500, 6

Tensors = dict[str, Tensor]


def auroc(familiar: Tensor, outliers: Tensor) -> float:
    """Return the probability that an outlier scores higher than a familiar row; ties count half."""
    ordered = familiar.double().sort().values
    values = outliers.double()
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return float(below.double().mean() / 2 / len(ordered))


def direction(weight: Tensor, bias: Tensor, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit an elliptic sphere with OAS shrinkage."""
    head = penult.Head(weight, bias)
    return partial(
        directional, penult.GenerativePair(head, penult.Sphere.fit(head, rows, shape="elliptic", shrinkage="oas"))
    )


def composite(weight: Tensor, bias: Tensor, rows: Tensor, trim: float = 0.0) -> Composite:
    """Fit the recommended score."""
    return Composite.fit(penult.Head(weight, bias), rows, trim=trim)


SCORES: dict[str, Peer] = {**PEERS, DIRECTION: direction, DEFAULT: composite}


def set_names(tensors: Tensors) -> list[str]:
    """Return the names of the sets of outliers."""
    return [key for key in tensors if key.startswith(("near/", "far/"))]


def judged_outliers(rows: Tensor) -> Tensor:
    """Return the outliers of a set that scores are tested on; none of them is among `contaminating` ones."""
    return rows[: min(MOST_TESTED, len(rows) - len(rows) // KEPT)]


def contaminating(rows: Tensor) -> Tensor:
    """Return the outliers of a set that may be put among reference activations."""
    return rows[len(rows) - len(rows) // KEPT :]


def separations(tensors: Tensors, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Return the AUROC of each set."""
    familiar = score(tensors["test"])
    return {key: auroc(familiar, score(judged_outliers(tensors[key]))) for key in set_names(tensors)}


def mean_of(values: dict[str, float], kind: str) -> float | None:
    """Return the mean over near or far sets, or None where there are none."""
    chosen = [value for key, value in values.items() if key.startswith(kind)]
    return short(statistics.mean(chosen)) if chosen else None


@torch.no_grad()
def measure(tensors: Tensors, role: str) -> dict[str, Any]:
    """Return all figures of one network and one split."""
    weight, bias = tensors["weight"], tensors["bias"]
    generator = torch.Generator().manual_seed(0)
    pool = tensors["pool"][torch.randperm(len(tensors["pool"]), generator=generator, device="cpu")]
    right = (tensors["test"] @ weight.T + bias).argmax(-1) == tensors["test_labels"]
    cell: dict[str, Any] = {"role": role, "dimension": weight.shape[1], "classes": len(weight)}
    cell |= {"accuracy": short(float(right.double().mean())), "sets": {}, "wrong": {}}
    sizes = sorted({min(size, len(pool)) for size in SIZES})
    for size in sizes:
        fitted = {name: fit(weight, bias, pool[:size]) for name, fit in SCORES.items()}
        cell["sets"][str(size)] = {
            name: {key: short(value) for key, value in separations(tensors, score).items()}
            for name, score in fitted.items()
        }
    for name, score in fitted.items():
        values = score(tensors["test"])
        cell["wrong"][name] = short(auroc(values[right], values[~right])) if 0 < right.sum() < len(right) else None
    values = fitted[DEFAULT](tensors["test"])
    cell["alarms"] = false_alarms(values)
    cell["dirty"] = dirtied(tensors, pool[: sizes[-1]], cell["sets"][str(sizes[-1])][DEFAULT])
    if role == "choosing":
        cell["rules"] = rules(tensors, pool[: sizes[-1]])
    return cell


def false_alarms(values: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of the false-alarm rate over random halves, calibration and judged."""
    rates = []
    for seed in range(SPLITS):
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed), device="cpu")
        calibration, judged = values[order].chunk(2)
        rank = min(len(calibration), int(-(-(len(calibration) + 1) * (1 - ALARM) // 1)))
        threshold = calibration.sort().values[rank - 1]
        rates.append(float((judged > threshold).double().mean()))
    return {"mean": short(statistics.mean(rates)), "deviation": short(statistics.stdev(rates))}


def dirtied(tensors: Tensors, pool: Tensor, clean: dict[str, float]) -> dict[str, float | None]:
    """Return the mean far AUROC with clean rows, with a tenth of outliers, and with these and a trimmed fit."""
    spare = torch.cat([contaminating(tensors[key]) for key in set_names(tensors) if key.startswith("far/")])
    order = torch.randperm(len(spare), generator=torch.Generator().manual_seed(1), device="cpu")
    rows = torch.cat([pool, spare[order][: len(pool) // 9]])
    found: dict[str, float | None] = {"clean": mean_of(clean, "far"), "share": short(1 - len(pool) / len(rows))}
    for name, trim in (("dirty", 0.0), ("trimmed", TRIM)):
        score = composite(tensors["weight"], tensors["bias"], rows, trim)
        found[name] = mean_of(separations(tensors, score), "far")
    return found


# --- rules --------------------------------------------------------------------------------------------------


def rules(tensors: Tensors, pool: Tensor) -> dict[str, dict[str, float | None]]:
    """Return near and far means of rules that combine the parts; they see reference rows only."""
    weight, bias = tensors["weight"], tensors["bias"]
    score = composite(weight, bias, pool)
    halves = pool.chunk(2)
    crossed = [composite(weight, bias, half).parts(other) for half, other in (halves, halves[::-1])]
    parts = torch.cat([(values - values.mean(0)) / values.std(0) for values in crossed])
    confidence = float((pool @ weight.T + bias).softmax(-1).amax(-1).mean())
    correlation = torch.corrcoef(parts.T)
    inverse = torch.linalg.solve(correlation, torch.ones(3, dtype=correlation.dtype, device="cpu"))
    overlap = max(0.0, float(correlation[2, :2].max()))
    ordered = parts.sort(0).values

    def p_values(z: Tensor) -> Tensor:
        above = [len(ordered) - torch.searchsorted(ordered[:, i].contiguous(), z[:, i].contiguous()) for i in range(3)]
        return (torch.stack(above, -1) + 1.0) / (len(ordered) + 1)

    combine: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda z: z.sum(-1),
        "D + M": lambda z: z[:, :2].sum(-1),
        "D + M + P/2": lambda z: z[:, 0] + z[:, 1] + z[:, 2] / 2,
        "D + M + positive part of P": lambda z: z[:, 0] + z[:, 1] + z[:, 2].clamp(min=0),
        "D + M + P times mean confidence squared": lambda z: z[:, 0] + z[:, 1] + confidence**2 * z[:, 2],
        "D + M + P times (1 - its correlation)": lambda z: z[:, 0] + z[:, 1] + (1 - overlap) * z[:, 2],
        "weights from the inverse correlation": lambda z: z @ inverse.to(z.dtype).clamp(min=0),
        "log-sum-exp": lambda z: z.logsumexp(-1),
        "max(D, M) + P": lambda z: z[:, :2].amax(-1) + z[:, 2],
        "p-values, Fisher": lambda z: -p_values(z).log().sum(-1) + 1e-6 * z.sum(-1),
        "p-values, harmonic": lambda z: (1 / p_values(z)).sum(-1) + 1e-6 * z.sum(-1),
        "sum, negative parts at -1": lambda z: z.clamp(min=-1).sum(-1),
    }
    found: dict[str, dict[str, float | None]] = {}
    cached = {key: score.parts(judged_outliers(tensors[key])) for key in set_names(tensors)}
    familiar = score.parts(tensors["test"])
    for name, rule in combine.items():
        values = {key: auroc(rule(familiar), rule(z)) for key, z in cached.items()}
        found[name] = {kind: mean_of(values, kind) for kind in ("near", "far")}
    head = penult.Head(weight, bias)
    base = penult.Gaussian.fit(head, pool, shrinkage="oas")
    single = separations(tensors, partial(penult.scores.density, penult.GenerativePair(head, base)))
    found["one base: density of a Gaussian"] = {kind: mean_of(single, kind) for kind in ("near", "far")}
    return found


# --- runs ---------------------------------------------------------------------------------------------------


def photograph_split(tensors: Tensors, seed: int) -> Tensors:
    """Divide the photographs into halves to fit and to test, so that half of the classes are unseen by the fit."""
    order = torch.randperm(len(tensors["pool"]), generator=torch.Generator().manual_seed(seed), device="cpu")
    fit, test = order.chunk(2)
    split = dict(tensors)
    for suffix in ("", "_labels"):
        split[f"pool{suffix}"], split[f"test{suffix}"] = (tensors[f"pool{suffix}"][rows] for rows in (fit, test))
    for key in set_names(tensors):
        split[key] = tensors[key].roll(20 * seed, 0)
    return split


def averaged(cells: list[Any]) -> Any:
    """Return figures averaged over splits, entry by entry."""
    first = cells[0]
    if isinstance(first, dict):
        return {key: averaged([cell[key] for cell in cells]) for key in first}
    return short(statistics.mean(cells)) if isinstance(first, float) else first


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for activations")
    parser.add_argument("--only", action="append", choices=ROLES, help="only this network (repeatable)")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--splits", type=int, default=PHOTOGRAPH_SPLITS, help="splits of the photographs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "outliers_kinds.json", help="results file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "outliers_kinds", LAYOUT)
    section: dict[str, Any] = results["sections"].setdefault("networks", {"cells": {}})
    section.setdefault("settings", {}).update({"trim": TRIM, "alarm": ALARM, "splits": SPLITS})
    section |= {"versions": versions(("torch",)), "machine": machine()}
    for name in options.only or ROLES:
        digest = path_of(name, options.data, options.cache).stem
        if not options.fresh and section["cells"].get(name, {}).get("cache") == digest:
            continue
        start = time.perf_counter()
        tensors = load_file(write_cache(name, options.data, options.cache))
        if name.startswith("imagenet"):
            splits = [measure(photograph_split(tensors, seed), ROLES[name]) for seed in range(options.splits)]
            cell = averaged(splits)
            section["settings"]["photograph_splits"] = options.splits
        else:
            cell = measure(tensors, ROLES[name])
        section["cells"][name] = cell | {"cache": digest}
        write(options.out, results)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    tables.show("outliers-kinds", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
