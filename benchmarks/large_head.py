# ruff: noqa: E402  # thread counts are set before torch loads
"""Memory and time of a pair with a head of many classes, as large as that of a language model.

W has K rows and d columns, by default 150,000 x 4096 in float32 (2.3 GiB), with random values. A pair holds W by
reference and reads it in blocks; the criterion is that the peak memory of the process stays below 1.3 times W and the
batch. Everything runs in one process on one thread; its peak memory is read after each step.

Example:
    python benchmarks/large_head.py
    python benchmarks/large_head.py --classes 20000 --features 1024 --out /tmp/small.json
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import penult
import tables
from penult.scores import directional, energy, msp
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1
BAR = 1.3
BATCH = 64
MIB = 2**20


def measure(classes: int, features: int) -> dict[str, Any]:
    """Seconds of each step, and the peak of the process over what it took before W, to W and the batch."""
    before = _peak()
    weight = torch.empty(classes, features)
    generator = torch.Generator().manual_seed(0)
    for part in weight.split(4096):
        part.normal_(generator=generator).div_(features**0.5)
    own = weight.numel() * weight.element_size() / MIB
    batch = BATCH * (classes + features) * 4 / MIB  # activations and logits
    held: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "head": lambda: held.update(head=penult.Head(weight)),
        "pair on a sphere": lambda: held.update(
            pair=penult.GenerativePair(held["head"], penult.Sphere(torch.tensor([1.5 * features**0.5])))
        ),
        "prior": lambda: held["pair"].prior,
        f"{BATCH} joint draws": lambda: held.update(h=held["pair"].sample((BATCH,), generator=generator)[0]),
        "log p(h)": lambda: held["pair"].log_prob(held["h"]),
        "energy, msp": lambda: (energy(held["pair"], held["h"]), msp(held["pair"], held["h"])),
        "directional, the first time": lambda: directional(held["pair"], held["h"]),
        "directional": lambda: directional(held["pair"], held["h"]),
    }
    cell: dict[str, Any] = {"mib": short(own), "batch_mib": short(batch), "steps": {}}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        ratio = (_peak() - before) / (own + batch)
        cell["steps"][name] = {"seconds": short(seconds, 2), "peak": short(ratio, 4)}
        print(f"{name}: {seconds:.2f} s, peak {ratio:.3f} of W and the batch", flush=True)
    return cell


def _peak() -> float:
    """The most memory that the process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=150_000, help="number of classes K")
    parser.add_argument("--features", type=int, default=4096, help="number of features d")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "large_head.json", help="results file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "large_head", LAYOUT)
    results["sections"]["cost"] = {
        "settings": {"classes": options.classes, "features": options.features, "batch": BATCH},
        "versions": versions(("torch",)),
        "machine": machine(),
        "bars": {"peak": BAR},
        "cells": {"float32": measure(options.classes, options.features)},
    }
    write(options.out, results)
    tables.show("large-head", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
