# ruff: noqa: E402  # thread counts are set before torch loads
"""Error of the estimated class prior under label shift, by the documented recipe and by others.

Published CIFAR-10 networks on the original test pictures (biases of the head are right), on copies saved as JPEG of
quality 75 (they are off), and with biases disturbed by N(0, 1). For each seed, 2000 labelled pictures calibrate the
head, and their activations are the bank of the pair; windows of 1500 other pictures are unshifted, or have class shares
drawn from Dirichlet(1). The error is the L1 distance of the estimate to the shares of the window.

Methods: `calibrate(biases=True)` and `estimate_prior` (the recipe), the same with a temperature alone, and black-box
shift estimation by hard predictions (BBSE; Lipton, Wang and Smola, ICML 2018).

Example:
    python benchmarks/label_shift.py --data ../shared/data --cache /tmp/penult-cache
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import networks
import penult
import tables
from outliers_sets import QUALITY, compressed
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1
NETWORKS = "cifar-resnet32", "cifar-resnet44"
CONDITIONS = "original", "jpeg", "disturbed"
SHIFTS = "none", "dirichlet"
SEEDS, CALIBRATION, WINDOW = 8, 2000, 1500
BARS = {"original": 0.04, "jpeg": 0.07, "disturbed": 0.07}


def stored(name: str, jpeg: bool, data: Path, cache: Path) -> penult.Activations:
    """Activations of the 10,000 test pictures, or of their JPEG copies, extracted once into a folder."""
    if not jpeg:
        return networks.activations(name, data, cache, progress=True)
    network = networks.model(name, data, cache)
    batches = networks.loader(name, data)
    first = next(iter(batches))[0]
    tap = penult.Tap(network, penult.find_head(network, first[:16]))
    copies = ((compressed(images), labels) for images, labels in batches)
    folder = cache / f"{name}-test-jpeg{QUALITY}"
    if (folder / penult.io.INDEX_NAME).exists():
        return penult.Activations.open(folder)
    return penult.extract(tap, copies, progress=True).save(folder)


def window(labels: Tensor, rows: Tensor, shift: str, generator: torch.Generator) -> Tensor:
    """Numbers of the rows of a window, without repetition."""
    if shift == "none":
        return rows[:WINDOW]
    num_classes = int(labels.max()) + 1
    # Normalised standard exponential variates follow Dirichlet(1).
    shares = -torch.rand(num_classes, generator=generator).log()
    counts = torch.multinomial(shares, WINDOW, replacement=True, generator=generator).bincount(minlength=num_classes)
    return torch.cat([rows[labels[rows] == y][: int(count)] for y, count in enumerate(counts)])


def by_expectation_maximisation(head: penult.Head, reference: Tensor, h: Tensor) -> Tensor:
    """Estimate of the pair of a calibrated head and a bank of reference activations."""
    pair = penult.GenerativePair(head, penult.Marginal.fit(head, reference, kind="bank"))
    return pair.estimate_prior(h).probs


def by_confusion(predicted: Tensor, labels: Tensor, window_predicted: Tensor, num_classes: int) -> Tensor:
    """BBSE: weights that carry the joint shares of prediction and label to the window's predictions."""
    joint = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    ones = torch.ones(len(labels), dtype=torch.float64)
    joint.index_put_((predicted, labels), ones, accumulate=True)
    shares = window_predicted.bincount(minlength=num_classes).double() / len(window_predicted)
    weights = torch.linalg.lstsq(joint / len(labels), shares[:, None]).solution[:, 0].clamp_min(0)
    estimate = weights * labels.bincount(minlength=num_classes)
    return estimate / estimate.sum()


def measure(name: str, condition: str, data: Path, cache: Path) -> dict[str, Any]:
    """Mean L1 errors over the seeds, by shift and method."""
    acts = stored(name, condition == "jpeg", data, cache)
    head = networks.head(name, data, cache).clone()
    h, labels = acts.activations, acts.labels
    assert labels is not None
    errors: dict[str, dict[str, list[float]]] = {shift: {} for shift in SHIFTS}
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        disturbed = head
        if condition == "disturbed":
            disturbed = head.with_bias(head.full_bias + torch.randn(head.num_classes, generator=generator))
        logits = disturbed(h)
        order = torch.randperm(len(labels), generator=generator)
        known, others = order[:CALIBRATION], order[CALIBRATION:]
        heads = {
            kind: disturbed.calibrate(logits[known], labels[known], biases=kind == "recipe")
            for kind in ("recipe", "temperature")
        }
        for shift in SHIFTS:
            rows = window(labels, others, shift, generator)
            truth = labels[rows].bincount(minlength=head.num_classes) / len(rows)
            estimates = {kind: by_expectation_maximisation(own, h[known], h[rows]) for kind, own in heads.items()}
            estimates["bbse"] = by_confusion(
                logits[known].argmax(1), labels[known], logits[rows].argmax(1), head.num_classes
            )
            for method, estimate in estimates.items():
                errors[shift].setdefault(method, []).append(float((estimate - truth).abs().sum()))
    return {
        "accuracy": short(float((logits.argmax(1) == labels).double().mean())),
        "errors": {
            shift: {method: short(statistics.fmean(values), 3) for method, values in by_method.items()}
            for shift, by_method in errors.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder of trained weights and activations")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "label_shift.json", help="results file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "label_shift", LAYOUT)
    section = results["sections"].setdefault("error", {"cells": {}})
    section |= {
        "settings": {
            "seed": 0, "seeds": SEEDS, "calibration": CALIBRATION, "window": WINDOW, "quality": QUALITY,
        },
        "versions": versions(("torch",)),
        "machine": machine(),
        "bars": BARS,
    }  # fmt: skip
    for name in NETWORKS:
        for condition in CONDITIONS:
            key = f"{name} {condition}"
            if key not in section["cells"]:
                section["cells"][key] = measure(name, condition, options.data, options.cache)
                write(options.out, results)
    tables.show("label-shift", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
