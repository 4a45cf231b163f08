# ruff: noqa: E402  # thread counts are set before torch loads
"""Cost of extraction compared with a bare loop of forward passes, and the growth of its memory with the data.

Two sections:

* ``overhead``: a small convolutional network over random 28 x 28 images. A bare loop (`model(x)` in inference mode,
  results discarded) alternates with a loop as users write it (a forward hook, lists, `torch.cat`), with `Tap`, and
  with `penult.extract` into memory, to disk, and to disk in half precision. Times are CPU times of the process on one
  thread; the ratio to the bare loop is computed for each round.
* ``memory``: peak memory of a separate process that extracts N and 10 N rows to disk, and of one that reads them in
  batches.

Example:
    python benchmarks/extract.py --quick
    python benchmarks/extract.py --only overhead
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import penult
import tables
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1  # of the JSON file
SECTIONS = ("overhead", "memory")
BARS = {"overhead": {"extract": 1.05}, "memory": {"growth": 1.1}}
BATCH = 128


def network(seed: int) -> nn.Module:
    """Three convolutions, 64 features, ten classes; 90 k parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(64, 10),
        ).eval()  # fmt: skip


def bare(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Forward passes and nothing else."""
    with torch.inference_mode():
        for x, _ in batches:
            model(x)


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """What people write: a hook on the last layer, lists, `torch.cat`."""
    features: list[Tensor] = []
    logits, labels = [], []
    handle = model[-1].register_forward_hook(lambda module, args, output: features.append(args[0].cpu()))
    with torch.inference_mode():
        for x, y in batches:
            logits.append(model(x).cpu())
            labels.append(y)
    handle.remove()
    return torch.cat(features), torch.cat(logits), torch.cat(labels)


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of CPU time to the bare loop."""
    model = network(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    count = BATCH * (10 if options.quick else 20)  # short runs take turns often, so that drift hits all alike
    images = torch.rand(count, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    tap = penult.Tap(model, penult.find_head(model, images[:16]))

    def tapped() -> None:
        with torch.inference_mode():
            for x, _ in batches:
                tap(x)

    with tempfile.TemporaryDirectory() as folder:
        names = iter(range(10_000))
        runs: dict[str, Callable[[], object]] = {
            "bare loop": lambda: bare(model, batches),
            "hook and cat, by hand": lambda: by_hand(model, batches),
            "Tap": tapped,
            "extract, in memory": lambda: penult.extract(tap, batches),
            "extract, to disk": lambda: penult.extract(tap, batches, f"{folder}/{next(names)}"),
            "extract, to disk in float16": lambda: penult.extract(
                tap, batches, f"{folder}/{next(names)}", dtype=torch.float16
            ),
        }
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(3 if options.quick else 25):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times[name].append(time.process_time() - start)
    base = times["bare loop"]
    report: dict[str, Any] = {"samples": count, "rounds": len(base)}
    for name, spent in times.items():
        ratios = [mine / theirs for mine, theirs in zip(spent, base, strict=True)]
        report[name] = {
            "seconds": short(min(spent)),
            "ratio": short(statistics.median(ratios)),
            "ratio_of_best": short(min(spent) / min(base)),
        }
    return report


MEMORY = """
import json, sys, torch
from torch import nn
import penult

task, folder, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])

def loader():
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, 1000):
        yield torch.randn(1000, 16, generator=generator), torch.randint(10, (1000,), generator=generator)

if task == "extract":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 10))
    tap = penult.Tap(model, penult.find_head(model, torch.randn(8, 16)))
    assert len(penult.extract(tap, loader(), folder)) == rows
else:
    total = torch.zeros(256, dtype=torch.float64)
    for part in penult.Activations.open(folder).batches(4096):
        total += part.activations.sum(0, dtype=torch.float64)
    assert total.isfinite().all()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps(peak / 1024))
"""


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory in MiB of processes that extract and read N and 10 N rows of 256 features."""
    rows = 20_000 if options.quick else 60_000
    report: dict[str, Any] = {"rows": rows, "features": 256}
    with tempfile.TemporaryDirectory() as folder:
        for task in ("extract", "read"):
            for factor in (1, 10):
                command = [sys.executable, "-c", MEMORY, task, f"{folder}/{factor}", str(factor * rows)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                report[f"{task}, {factor} N"] = short(float(json.loads(done.stdout)))
        report["data_mib"] = short(sum(f.stat().st_size for f in Path(folder, "10").iterdir()) / 2**20)
    return report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds; writes no file")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="only this section (repeatable; default: all)"
    )
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/extract.json)")
    parser.add_argument("--seed", type=int, default=0, help="seed of network and images (default: 0)")
    options = parser.parse_args(arguments)
    options.only = tuple(options.only or SECTIONS)
    if options.out is None and not options.quick:
        options.out = HERE / "results" / "extract.json"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    options = parse(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "extract", LAYOUT)
    for name in options.only:
        measure = {"overhead": overhead, "memory": memory}[name]
        results["sections"][name] = {
            "settings": {"seed": options.seed, "quick": options.quick},
            "versions": versions(("torch", "safetensors")),
            "machine": machine(),
            "bars": BARS[name],
            "cells": measure(options),
        }
        write(options.out, results)
    for name in options.only:
        tables.show(f"extract-{name}", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
