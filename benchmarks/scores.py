# ruff: noqa: E402  # thread counts are set before torch loads
"""Cost of outlier scores: CPU time of a batch, relative to one evaluation of the head.

The head has K = 1000 classes and d = 512 features, or other sizes; the batch has 10,000 activations, in float32, on one
thread. Each score alternates with ``head(h)`` in one process; the ratio is computed for each round. `directional` is
that of an elliptic sphere, whose chart is an additional triangular matrix. The time to compute its table, once for each
pair, and the time to fit a `Composite` are measured as well. "KNN, plain" is the shortest code for nearest neighbours
in float32, without care for digits.

Example:
    python benchmarks/scores.py
    python benchmarks/scores.py --quick
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import penult
import tables
from penult.scores import KNN, Composite, Mahalanobis, RelativeMahalanobis, ViM, directional, energy, max_logit, msp
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 2
# Largest cost in evaluations of the head at d = 512, K = 1000; that of KNN is relative to the plain code.
BARS = {"Composite": 2.8, "directional": 2.0, "KNN": 1.1}
BATCH, ROUNDS = 10_000, 12
SIZES = ((512, 1000), (64, 10), (2048, 1000))  # d, K


def plain_neighbours(bank: Tensor, k: int = 20) -> Callable[[Tensor], Tensor]:
    """Distances to the k-th nearest row in float32, by products alone."""
    unit = F.normalize(bank)

    def score(h: Tensor) -> Tensor:
        parts = [2 - 2 * (rows @ unit.T).topk(k).values[:, -1] for rows in F.normalize(h).split(1024)]
        return torch.cat(parts).clamp_min(0).sqrt()

    return score


def scores(
    features: int, classes: int
) -> tuple[penult.Head, Tensor, dict[str, Callable[[Tensor], Tensor]], dict[str, float]]:
    """A head, a batch, scores by name, and seconds that are spent once."""
    g = torch.Generator().manual_seed(0)
    head = penult.Head(torch.randn(classes, features, generator=g) / features**0.5, torch.zeros(classes))
    pool = torch.randn(4000, features, generator=g).abs()
    labels = head(pool).argmax(1)
    pair = penult.GenerativePair(head, penult.Sphere.fit(head, pool, shape="elliptic"))
    start = time.process_time()
    directional(pair, pool[:2])
    once = {"table of directional": time.process_time() - start}
    start = time.process_time()
    composite = Composite.fit(head, pool)
    once["fit of Composite"] = time.process_time() - start
    fitted = {
        "Composite": composite,
        "Mahalanobis": Mahalanobis.fit(pool, labels),
        "RelativeMahalanobis": RelativeMahalanobis.fit(pool, labels),
        "KNN": KNN.fit(pool),
        "KNN, plain": plain_neighbours(pool),
        "ViM": ViM.fit(head, pool),
    }
    of_pair = {each.__name__: (lambda h, each=each: each(pair, h)) for each in (directional, energy, max_logit, msp)}
    return head, torch.randn(BATCH, features, generator=g).abs(), of_pair | fitted, once


@torch.no_grad()
def measure(features: int, classes: int, rounds: int) -> dict[str, Any]:
    """Seconds a batch and ratios to the head."""
    head, h, made, once = scores(features, classes)
    cell: dict[str, Any] = {"seconds": {name: short(value, 2) for name, value in once.items()}, "scores": {}}
    for name, score in made.items():
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            pair = []
            for call in (head, score):
                start = time.process_time()
                call(h)
                pair.append(time.process_time() - start)
            times.append((pair[0], pair[1]))
        base, own = (min(each) for each in zip(*times[1:], strict=True))
        ratio = statistics.median(b / a for a, b in times[1:])
        cell["scores"][name] = {"ms": short(1000 * own, 3), "best": short(own / base, 3), "ratio": short(ratio, 3)}
    return cell


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; writes no file without --out")
    parser.add_argument("--out", type=Path, help="results file (default: results/scores.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = options.out or (None if options.quick else HERE / "results" / "scores.json")
    results = load(out, "scores", LAYOUT)
    results["sections"]["cost"] = section = {
        "settings": {"batch": BATCH, "rounds": 3 if options.quick else ROUNDS, "quick": options.quick},
        "versions": versions(("torch",)),
        "machine": machine(),
        "bars": BARS,
        "cells": {},
    }
    for features, classes in SIZES:
        section["cells"][f"d={features} K={classes}"] = measure(features, classes, section["settings"]["rounds"])
        write(out, results)
    tables.show("scores", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
