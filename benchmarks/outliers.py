"""Outlier scores: separation of images of other kinds from familiar ones, by a classifier's activations.

Scores of a pair (`penult.scores.directional` on spheres of several shapes, the energy and other functions of the
logits, densities) are compared with scores that are fitted to familiar activations (Mahalanobis distances, nearest
neighbours, ViM), on the networks and images of `outliers_setting.py`. Scores are fitted to one half of the familiar
test images, with labels only if a method needs them. The other half is compared with

* ``far``: other data, textures, photographs, noise, scrambled images,
* ``near``: images of two classes that were held out of training, for two networks,
* ``shifted``: familiar images under a domain shift; the accuracy on them is measured, too,
* ``selection``: far images of other kinds, used to make choices. The fraction of a trimmed fit was also chosen by the
  far sets of ``cifar-resnet32`` and ``mnist-relu-0``.

Also measured: the separation of wrong from right predictions on the familiar half; the loss caused by a tenth of
outliers among the reference activations, with and without a trimmed fit; and fits to few activations.

Each network takes seconds if its activations are in the cache. Results are stored network by network.

Example:
    python benchmarks/outliers.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/outliers.py --data ../shared/data --cache /tmp/penult-cache --only cifar-resnet32 --fresh
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import penult
import tables
from outliers_setting import (
    CONTAMINATING,
    FAMILIAR,
    FAR,
    HELD_OUT,
    NETWORKS,
    SELECTION,
    SHIFTED,
    TESTED,
    features,
    halves,
)
from outliers_setting import head as head_of
from penult.scores import KNN, Mahalanobis, RelativeMahalanobis, ViM, density, directional, energy, max_logit, msp
from record import load, machine, short, versions, write

HERE = Path(__file__).parent
LAYOUT = 1
CONTAMINATION = 0.1  # share of the pool
TRIM = 0.2
FEW = (100, 300, 1000)  # activations of a fit
SMALL_SHRINKAGE, LARGE_SHRINKAGE = 0.005, 0.1
OURS = "directional, elliptic"

Score = Callable[[Tensor], Tensor]
Shape = Literal["round", "centered", "elliptic"]


@dataclass(frozen=True)
class Pool:
    """What scores are fitted to.

    Attributes:
        head: The network's head.
        rows: Familiar activations (N, d), with some outliers among them where a fit has to survive that.
        labels: (N,); outliers bear those that the network gives them.
    """

    head: penult.Head
    rows: Tensor
    labels: Tensor


def sphere(pool: Pool, shape: Shape = "elliptic", **options: float) -> Score:
    """`directional` on a sphere that is fitted to a pool."""
    base = penult.Sphere.fit(pool.head, pool.rows, shape=shape, **options)
    return partial(directional, penult.GenerativePair(pool.head, base))


def with_norm(pool: Pool) -> Score:
    """`directional`, and how far the log of the chart's radius is from its mean, as a normal law has it."""
    base = penult.Sphere.fit(pool.head, pool.rows, shape="elliptic")
    pair = penult.GenerativePair(pool.head, base)
    logs = torch.linalg.vector_norm(base.read(pool.rows), dim=-1).log()
    mean, deviation = logs.mean(), logs.std()

    def score(h: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(base.read(h), dim=-1).log()
        return directional(pair, h) + ((radius - mean) / deviation).square() / 2

    return score


def by_head(function: Callable[[penult.GenerativePair, Tensor], Tensor], pool: Pool) -> Score:
    """A score that only the head counts for."""
    return partial(function, penult.GenerativePair(pool.head, penult.Sphere(1.0)))


def by_density(pool: Pool) -> Score:
    """The negative density of a pair on a Gaussian."""
    return partial(density, penult.GenerativePair(pool.head, penult.Gaussian.fit(pool.head, pool.rows)))


METHODS: dict[str, Callable[[Pool], Score]] = {
    "msp": partial(by_head, msp),
    "max logit": partial(by_head, max_logit),
    "energy": partial(by_head, energy),
    "Mahalanobis, labels": lambda pool: Mahalanobis.fit(pool.rows, pool.labels),
    "relative Mahalanobis, labels": lambda pool: RelativeMahalanobis.fit(pool.rows, pool.labels),
    "KNN": lambda pool: KNN.fit(pool.rows),
    "ViM": lambda pool: ViM.fit(pool.head, pool.rows),
    "density, Gaussian": by_density,
    "directional, no data": lambda pool: partial(directional, penult.GenerativePair(pool.head)),
    "directional, round": partial(sphere, shape="round"),
    "directional, centered": partial(sphere, shape="centered"),
    OURS: sphere,
    f"{OURS}, trimmed": partial(sphere, trim=TRIM),
    f"{OURS}, and norm": with_norm,
    f"{OURS}, shrinkage {SMALL_SHRINKAGE}": partial(sphere, shrinkage=SMALL_SHRINKAGE),
    f"{OURS}, shrinkage {LARGE_SHRINKAGE}": partial(sphere, shrinkage=LARGE_SHRINKAGE),
}
DIRTIED = ("energy", "KNN", "ViM", "Mahalanobis, labels", OURS, f"{OURS}, trimmed")


def measure(name: str, data: Path, cache: Path) -> dict[str, Any]:
    """Everything about one network."""
    network = NETWORKS[name]
    far, shifted, selection = FAR[network.data], SHIFTED[network.data], SELECTION[network.data]
    near = (HELD_OUT,) if network.held_out else ()
    head = head_of(name, data, cache)
    familiar = features(name, FAMILIAR, data, cache)
    fit, test = halves(len(familiar))
    rows, labels = familiar.activations[fit], familiar.labels[fit]
    held, right = familiar.activations[test], familiar.predicted[test] == familiar.labels[test]
    strange = {each: features(name, each, data, cache) for each in (*far, *near, *shifted, *selection)}
    tested = {each: acts.activations[:TESTED] for each, acts in strange.items()}
    clean = Pool(head, rows, labels)
    found: dict[str, Any] = {
        "accuracy": short(float(right.double().mean())),
        "confidence": short(float(head(held).softmax(-1).amax(-1).mean())),
        "pool": len(rows),
        "methods": {},
    }
    for method, make in METHODS.items():
        start = time.process_time()
        score = make(clean)
        seconds = time.process_time() - start
        own = score(held)
        cell: dict[str, Any] = {"seconds": short(seconds, 2), "misclassified": short(auroc(own[right], own[~right]))}
        for title, sets in (("far", far), ("near", near), ("shifted", shifted), ("selection", selection)):
            cell[title] = {each: rates(own, score(tested[each])) for each in sets}
        found["methods"][method] = cell
    found["shifted accuracy"] = {
        each: short(float((acts.predicted == acts.labels)[:TESTED].double().mean()))
        for each, acts in strange.items()
        if each in shifted
    }
    found["dirtied"] = {
        title: dirtied(clean, held, {each: strange[each].activations for each in sets})
        for title, sets in (("far", far), ("selection", selection))
    }
    few = {}
    for count in FEW:
        score = sphere(Pool(head, rows[:count], labels[:count]))
        own = score(held)
        few[str(count)] = mean_of([rates(own, score(tested[each])) for each in far])
    found["few"] = few
    return found


def dirtied(clean: Pool, held: Tensor, strange: dict[str, Tensor]) -> dict[str, Any]:
    """Mean figures of methods that are fitted to a pool of which a share are outliers of the same kinds, other ones."""
    spare = torch.cat([rows[-CONTAMINATING:] for rows in strange.values()])
    count = round(len(clean.rows) * CONTAMINATION / (1 - CONTAMINATION))
    spare = spare[torch.randperm(len(spare), generator=torch.Generator().manual_seed(0))[:count]]
    said = clean.head(spare).argmax(-1)
    pool = Pool(clean.head, torch.cat([clean.rows, spare]), torch.cat([clean.labels, said]))
    found: dict[str, Any] = {"outliers": len(spare), "share": short(len(spare) / len(pool.rows), 3)}
    for method in DIRTIED:
        score = METHODS[method](pool)
        own = score(held)
        found[method] = mean_of([rates(own, score(rows[:TESTED])) for rows in strange.values()])
    return found


def rates(familiar: Tensor, strange: Tensor) -> dict[str, float]:
    """AUROC, and the share of strange ones below a threshold that 95 % of familiar ones are below (FPR95)."""
    threshold = torch.quantile(familiar.double(), 0.95)
    return {"auroc": short(auroc(familiar, strange)), "fpr95": short(float((strange <= threshold).double().mean()))}


def auroc(low: Tensor, high: Tensor) -> float:
    """The chance that one of `high` is above one of `low`."""
    which = torch.cat([torch.zeros(len(low)), torch.ones(len(high))])
    return float(roc_auc_score(which.numpy(), torch.cat([low, high]).double().numpy()))


def mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of figures over sets."""
    return {key: short(sum(each[key] for each in found) / len(found)) for key in found[0]}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks and activations")
    parser.add_argument(
        "--only", action="append", choices=NETWORKS, help="only this network (repeatable; default: all)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "outliers.json", help="results file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "outliers", LAYOUT)
    section: dict[str, Any] = results["sections"].setdefault("networks", {"cells": {}})
    section |= {"settings": {"tested": TESTED, "contamination": CONTAMINATION, "trim": TRIM}}
    section |= {"versions": versions(("torch", "scikit-learn")), "machine": machine()}
    for name in options.only or NETWORKS:
        if options.fresh or name not in section["cells"]:
            start = time.perf_counter()
            section["cells"][name] = measure(name, options.data, options.cache)
            write(options.out, results)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    tables.show("outliers", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
