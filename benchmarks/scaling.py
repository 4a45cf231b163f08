"""Speed of extraction and fits with several processes on one machine.

Data and network are synthetic: random images of 32 x 32, three convolutions, and stored activations of random
numbers. Each process computes on one thread, so that as many processes as there are cores share the machine evenly.
The time is that of the work between two barriers, after one batch that is not counted; the time to start a process is
shown separately. In each round every number of processes is measured; the best of all rounds is reported.

Example:
    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 --images 500 --rows 20000 --out /tmp/small.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAYOUT = 1
BATCH, FEATURES, CLASSES = 50, 512, 100


def one_of_several(place: Path, rank: int, count: int, images: int, rows: int) -> None:
    """Work of one process; the first writes the seconds of each piece to `place`."""
    import torch
    from torch import distributed, nn
    from torch.utils.data import DataLoader, TensorDataset

    import penult
    from penult.processes import Processes

    torch.set_num_threads(1)
    ready = time.time()
    distributed.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=count)
    group = distributed.group.WORLD if count > 1 else None
    processes = Processes(group)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(64, FEATURES, 3, padding=1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.GELU(),
        nn.Linear(FEATURES, CLASSES),
    ).eval()  # fmt: skip
    data = TensorDataset(torch.randn(images, 3, 32, 32), torch.arange(images) % CLASSES)
    head = penult.find_head(model, data[:BATCH][0])
    acts = penult.Activations.open(place.parent / f"acts-{rows}")
    work: dict[str, Callable[[], Any]] = {
        "extract": lambda: penult.extract(
            penult.Tap(model, head), DataLoader(data, batch_size=BATCH), place / "out", group=group
        ),
        "fit of an elliptic sphere": lambda: penult.Sphere.fit(head, acts, shape="elliptic", group=group),
        "fit of a mixture": lambda: penult.distributions.PrincipalMixture.fit(
            _Stored(acts, processes), components=100, dims=24, iterations=10, tolerance=0.0, group=group
        ),
    }
    seconds = {"start": ready - float(os.environ["STARTED"])}
    for name, piece in work.items():
        processes.wait()
        begin = time.perf_counter()
        piece()
        processes.wait()
        seconds[name] = time.perf_counter() - begin
    if rank == 0:
        (place / "seconds.json").write_text(json.dumps(seconds))


class _Stored:
    """This process's rows of stored activations, some at a time."""

    def __init__(self, acts: Any, processes: Any) -> None:
        own = processes.share(len(acts))
        self._acts = acts[own.start : own.stop]

    def __iter__(self) -> Any:
        return (part.activations for part in self._acts.batches(1 << 14))


def together(folder: Path, count: int, images: int, rows: int) -> dict[str, float]:
    """Seconds of each piece of work by so many processes."""
    place = Path(tempfile.mkdtemp(dir=folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "STARTED": str(time.time())}
    command = [sys.executable, __file__, "--one", str(place), str(count), "--images", str(images), "--rows", str(rows)]
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment)
        for rank in range(count)
    ]  # fmt: skip
    if any(process.wait() for process in started):
        raise SystemExit(f"one of {count} processes failed")
    found: dict[str, float] = json.loads((place / "seconds.json").read_text())
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes; the first is the reference"
    )
    parser.add_argument("--images", type=int, default=2000, help="number of images to extract from")
    parser.add_argument("--rows", type=int, default=100_000, help="number of activations to fit to")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; the best is reported")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json", help="results file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # folder and count: this is one of the processes
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        one_of_several(Path(options.one[0]), options.rank, int(options.one[1]), options.images, options.rows)
        return 0

    import torch

    import penult
    import tables
    from record import load, machine, short, versions, write

    torch.set_num_threads(1)
    results = load(options.out, "scaling", LAYOUT)
    with tempfile.TemporaryDirectory() as folder:
        g = torch.Generator().manual_seed(0)
        rows = torch.randn(options.rows, FEATURES, generator=g)
        penult.Activations(rows, torch.zeros(options.rows, CLASSES)).save(
            Path(folder) / f"acts-{options.rows}", shard_size=1 << 26
        )
        del rows
        best: dict[int, dict[str, float]] = {}
        for number in range(options.rounds):
            for count in options.processes:
                seconds = together(Path(folder), count, options.images, options.rows)
                print(f"round {number + 1}, {count} processes: {seconds}", flush=True)
                known = best.setdefault(count, seconds)
                best[count] = {name: min(value, known[name]) for name, value in seconds.items()}
    results["sections"]["scaling"] = {
        "settings": {
            "images": options.images,
            "rows": options.rows,
            "features": FEATURES,
            "rounds": options.rounds,
            "seed": 0,
        },
        "versions": versions(("torch",)),
        "machine": machine(),
        "cells": {
            str(count): {name: short(value, 3) for name, value in seconds.items()} for count, seconds in best.items()
        },
    }
    write(options.out, results)
    tables.show("scaling", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
