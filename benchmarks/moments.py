# ruff: noqa: E402  # thread counts are set before torch loads
"""Classifiers from summed moments of frozen features: classes that come later, ten owners, few rows; and their cost.

Features are those of `moments_features.py`: sentence embeddings of CLINC150 (150 intents, d = 384), and features of
CIFAR-10 by EfficientNet-Lite0 (d = 1280). Settings:

* ``steps``: 15 steps of 10 intents, or 5 steps of 2 classes, in three orders. After each step the rows of its classes
  are gone, and test rows of all classes so far are classified.
* ``owners``: the rows of each class are shared among ten owners in proportions from Dirichlet(.1) or Dirichlet(.5).
* ``few``: 2 to 100 rows of each class.
* ``cost``: peak memory of counting 1,000,000 rows of d = 512 from a folder, and time to add ten classes at d = 1280.

Methods: moments (`penult.Moments` with OAS: the pair of linear discriminant analysis), nearest class mean, ridge
regression of one-hot labels in closed form, logistic regression on all rows at once (the bound), and fine-tuning of one
linear layer step by step without replay (for owners: the mean of the owners' logistic heads). Penalties of ridge and
logistic regression are chosen on the validation rows of CLINC150, and on a tenth of the training rows of CIFAR-10;
nothing is chosen for moments.

Membership: AUC of the pair's density between training rows and test rows; 0.5 if the file tells nothing of single rows.

Example:
    python benchmarks/moments.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/moments.py --data ../shared/data --cache /tmp/penult-cache --only few
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import penult
import tables
from moments_features import PARTS, features
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1
STEPS = {"clinc150": 15, "cifar10": 5}
ORDERS = 3
ALPHAS = 0.1, 0.5
OWNERS, OWNER_SEEDS = 10, 3
FEW = {"clinc150": (2, 5, 20, 100), "cifar10": (10, 50, 200, 1000)}
DECAYS = 1e-5, 1e-4, 1e-3, 1e-2
RIDGES = 1e-4, 1e-3, 1e-2, 1e-1, 1.0
SETTINGS = "steps", "owners", "few", "cost"
# Points by which moments may be below logistic regression on all rows, chosen before measuring.
BARS = {"clinc150": 1.0, "cifar10": 0.0, "memory": 200.0, "adding": 1.0}


class Rows(NamedTuple):
    """Features (N, d) and labels (N,)."""

    h: Tensor
    y: Tensor

    def of(self, mask: Tensor) -> Rows:
        """Return some rows."""
        return Rows(self.h[mask], self.y[mask])


@lru_cache(maxsize=1)
def sets(name: str, data: Path, cache: Path) -> tuple[Rows, Rows]:
    """Training and test rows of a data set."""
    return Rows(*features(name, "train", data, cache)), Rows(*features(name, "test", data, cache))


# --- classifiers --------------------------------------------------------------------------------------------


def logistic(rows: Rows, num_classes: int, decay: float, start: Tensor | None = None, steps: int = 150) -> Tensor:
    """W and b (K, d + 1) of logistic regression with a penalty decay / 2 · ‖W‖², by L-BFGS on standardised features."""
    scale = rows.h.std(0).mean()
    mean = rows.h.mean(0)
    h = (rows.h - mean) / scale
    w = torch.zeros(num_classes, h.shape[1] + 1) if start is None else _standardised(start, mean, scale)
    w.requires_grad_()
    optimiser = torch.optim.LBFGS([w], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(h, w[:, :-1], w[:, -1]), rows.y) + decay / 2 * w[:, :-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    weight = w.detach()[:, :-1] / scale
    return torch.cat([weight, (w.detach()[:, -1] - weight @ mean).unsqueeze(-1)], dim=-1)


def _standardised(w: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """W and b for (h - mean) / scale of those for h."""
    return torch.cat([w[:, :-1] * scale, (w[:, -1] + w[:, :-1] @ mean).unsqueeze(-1)], dim=-1)


class RidgeSums:
    """Sums for ridge regression of one-hot labels, which add up as moments do."""

    def __init__(self, dim: int, num_classes: int) -> None:
        self.gram = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)
        self.cross = torch.zeros(dim + 1, num_classes, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Add rows."""
        h = F.pad(rows.h.double(), (0, 1), value=1.0)
        self.gram += h.T @ h
        self.cross.index_add_(1, rows.y, h.T)

    def solve(self, penalty: float) -> Tensor:
        """W and b (K, d + 1); the penalty is relative to the mean square of the features."""
        ridge = penalty * self.gram.diagonal()[:-1].mean() * torch.ones(len(self.gram), dtype=torch.float64)
        ridge[-1] = 1e-8
        return torch.linalg.solve(self.gram + torch.diag(ridge), self.cross).T.float()


def accuracy(w: Tensor, rows: Rows, classes: Tensor) -> float:
    """Share of rows that W and b (K, d + 1) classify right among `classes`."""
    logits = F.linear(rows.h, w[classes, :-1], w[classes, -1])
    return float((classes[logits.argmax(-1)] == rows.y).double().mean())


def nearest_mean(means: Tensor) -> Tensor:
    """W and b (K, d + 1) whose largest logit is that of the nearest mean (K, d)."""
    return torch.cat([means, -0.5 * means.square().sum(-1, keepdim=True)], dim=-1).float()


def of_pair(pair: penult.GenerativePair, classes: Tensor, num_classes: int) -> Tensor:
    """W and b (K, d + 1) of the head of a pair; classes that it does not have are zero."""
    w = torch.zeros(num_classes, pair.head.in_features + 1)
    w[classes] = torch.cat([pair.head.weight, pair.head.full_bias.unsqueeze(-1)], dim=-1).float()
    return w


def pair_of(moments: penult.Moments) -> penult.GenerativePair:
    """The pair, without warnings of few rows, which the tables tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return moments.pair()


def membership(pair: penult.GenerativePair, members: Tensor, others: Tensor) -> float:
    """AUC of the density between rows that were counted and rows that were not."""
    one, two = (pair.log_prob(h.to(pair.head.weight)).double() for h in (members[:4000], others[:4000]))
    below = torch.searchsorted(two.sort().values, one) + torch.searchsorted(two.sort().values, one, right=True)
    return float(below.double().mean() / (2 * len(two)))


@lru_cache(maxsize=4)
def penalties(name: str, data: Path, cache: Path) -> tuple[float, float]:
    """Penalties of logistic regression and of ridge regression, chosen on rows apart from the test rows."""
    others, _ = sets(name, data, cache)
    num_classes, dim = int(others.y.max()) + 1, others.h.shape[1]
    if "val" in PARTS[name]:
        held_out = Rows(*features(name, "val", data, cache))
    else:
        order = torch.randperm(len(others.y), generator=torch.Generator().manual_seed(0))
        held_out, others = others.of(order[: len(order) // 10]), others.of(order[len(order) // 10 :])
    classes = torch.arange(num_classes)
    by_decay = {decay: accuracy(logistic(others, num_classes, decay), held_out, classes) for decay in DECAYS}
    sums = RidgeSums(dim, num_classes)
    sums.add(others)
    by_ridge = {penalty: accuracy(sums.solve(penalty), held_out, classes) for penalty in RIDGES}
    return max(by_decay, key=lambda decay: by_decay[decay]), max(by_ridge, key=lambda penalty: by_ridge[penalty])


@lru_cache(maxsize=2)
def bound(name: str, data: Path, cache: Path) -> tuple[Tensor, float]:
    """Logistic regression on all training rows, and the seconds that it takes."""
    train, _ = sets(name, data, cache)
    start = time.process_time()
    w = logistic(train, int(train.y.max()) + 1, penalties(name, data, cache)[0])
    return w, time.process_time() - start


def fine_tuned(w: Tensor, rows: Rows, seed: int, epochs: int = 5) -> Tensor:
    """W and b after epochs of Adam on rows of the classes of one step, as a layer of all classes so far."""
    w = w.clone().requires_grad_()
    scale = float(rows.h.std(0).mean())
    optimiser = torch.optim.Adam([w], lr=0.01 / scale * 0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(rows.y), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(F.linear(rows.h[index], w[:, :-1], w[:, -1]), rows.y[index]).backward()
            optimiser.step()
    return w.detach()


class Clock:
    """Seconds of process time by method."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, method: str, compute: Callable[[], Any]) -> Any:
        """Run a function and add its time to that of the method."""
        start = time.process_time()
        result = compute()
        self.seconds[method] = self.seconds.get(method, 0.0) + time.process_time() - start
        return result


def floats(method: str, dim: int, num_classes: int, rows: int) -> int:
    """Numbers that are kept between steps, or sent by one owner; a symmetric matrix counts by its half."""
    half = dim * (dim + 1) // 2
    return {
        "moments": num_classes * (dim + 1) + half,
        "nearest mean": num_classes * (dim + 1),
        "ridge": num_classes * (dim + 1) + half,
        "logistic, all rows": rows * dim,
    }.get(method, num_classes * (dim + 1))


# --- settings -----------------------------------------------------------------------------------------------


def steps(name: str, order_seed: int, data: Path, cache: Path) -> dict[str, Any]:
    """Accuracies of classes that come in steps: after the last step, and on average over steps."""
    train, test = sets(name, data, cache)
    num_classes, dim = int(train.y.max()) + 1, train.h.shape[1]
    decay, penalty = penalties(name, data, cache)
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(order_seed))
    clock, curves = Clock(), {}
    moments: Any = 0
    ridge, tuned, joint = RidgeSums(dim, num_classes), torch.zeros(num_classes, dim + 1), None
    seen = torch.empty(0, dtype=torch.long)
    for number, new in enumerate(order.split(num_classes // STEPS[name])):
        rows = train.of(torch.isin(train.y, new))
        seen = torch.cat([seen, new]).sort().values
        moments = clock("moments", lambda rows=rows, so_far=moments: so_far + penult.Moments.of(*rows, num_classes))
        pair = clock("moments", lambda merged=moments: pair_of(merged))
        clock("ridge", lambda rows=rows: ridge.add(rows))
        solved = clock("ridge", lambda: ridge.solve(penalty))
        all_rows = train.of(torch.isin(train.y, seen))
        joint = clock(
            "logistic, all rows", lambda rows=all_rows, start=joint: logistic(rows, num_classes, decay, start)
        )
        tuned = clock("fine-tuning", lambda rows=rows, w=tuned, n=number: fine_tuned(w, rows, n))
        heads = {
            "moments": of_pair(pair, moments.classes, num_classes),
            "nearest mean": nearest_mean(moments.means),
            "ridge": solved,
            "logistic, all rows": joint,
            "fine-tuning": tuned,
        }
        asked = test.of(torch.isin(test.y, seen))
        for method, w in heads.items():
            curves.setdefault(method, []).append(accuracy(w, asked, seen))
    return {
        method: {
            "accuracy": short(curve[-1]),
            "mean": short(statistics.fmean(curve)),
            "floats": floats(method, dim, num_classes, len(train.y)),
        }
        | ({"seconds": short(clock.seconds[method], 3)} if method in clock.seconds else {})
        | ({"membership": short(membership(pair, train.h, test.h), 3)} if method == "moments" else {})
        for method, curve in curves.items()
    }


def split(labels: Tensor, alpha: float, seed: int) -> Tensor:
    """Number of the owner of each row: for each class, shares of the owners from Dirichlet(alpha)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    owner = torch.empty_like(labels)
    for y in labels.unique():
        index = (labels == y).nonzero().flatten()
        ends = np.cumsum(generator.dirichlet([alpha] * OWNERS)) * len(index)
        owner[index] = torch.as_tensor(np.searchsorted(ends[:-1], np.arange(len(index)), side="right"))
    return owner


def owners(name: str, alpha: float, seed: int, data: Path, cache: Path) -> dict[str, Any]:
    """Accuracies of ten owners who share no rows."""
    train, test = sets(name, data, cache)
    num_classes, dim = int(train.y.max()) + 1, train.h.shape[1]
    decay, penalty = penalties(name, data, cache)
    classes, clock = torch.arange(num_classes), Clock()
    owner = split(train.y, alpha, seed)
    parts = [train.of(owner == number) for number in range(OWNERS)]
    parts = [part for part in parts if len(part.y)]
    moments = [clock("moments", lambda part=part: penult.Moments.of(*part, num_classes)) for part in parts]
    merged = clock("moments", lambda: sum(moments))
    pair = clock("moments", lambda: pair_of(merged))
    ridge = RidgeSums(dim, num_classes)
    for part in parts:
        clock("ridge", lambda part=part: ridge.add(part))
    solved = clock("ridge", lambda: ridge.solve(penalty))
    joint, clock.seconds["logistic, all rows"] = bound(name, data, cache)
    own = [clock("mean of heads", lambda part=part: logistic(part, num_classes, decay, steps=60)) for part in parts]
    shares = [len(part.y) / len(train.y) for part in parts]
    heads = {
        "moments": of_pair(pair, merged.classes, num_classes),
        "nearest mean": nearest_mean(merged.means),
        "ridge": solved,
        "logistic, all rows": joint,
        "mean of heads": torch.stack([w * share for w, share in zip(own, shares, strict=True)]).sum(0),
    }
    results = {
        method: {
            "accuracy": short(accuracy(w, test, classes)),
            "floats": floats(method, dim, num_classes, len(train.y))
            * (1 if method == "logistic, all rows" else OWNERS),
        }
        | ({"seconds": short(clock.seconds[method], 3)} if method in clock.seconds else {})
        for method, w in heads.items()
    }
    results["one owner alone"] = {"accuracy": short(statistics.fmean(accuracy(w, test, classes) for w in own))}
    results["moments"]["membership"] = short(membership(pair, train.h, test.h), 3)
    single = [
        (part, pair_of(m)) for part, m in zip(parts, moments, strict=True) if len(m.classes) > 1 and len(part.y) > 20
    ]
    results["moments"]["membership_of_an_owner"] = short(
        statistics.fmean(membership(one, part.h, test.h) for part, one in single), 3
    )
    results["moments"]["fewest_rows"] = min(len(part.y) for part in parts)
    return results


def few(name: str, count: int, data: Path, cache: Path) -> dict[str, Any]:
    """Accuracies of `count` rows of each class."""
    train, test = sets(name, data, cache)
    num_classes = int(train.y.max()) + 1
    decay, penalty = penalties(name, data, cache)
    classes = torch.arange(num_classes)
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))
    chosen = torch.cat([order[train.y[order] == y][:count] for y in classes])
    rows = train.of(chosen)
    moments = penult.Moments.of(*rows, num_classes)
    pair = pair_of(moments)
    ridge = RidgeSums(train.h.shape[1], num_classes)
    ridge.add(rows)
    heads = {
        "moments": of_pair(pair, moments.classes, num_classes),
        "nearest mean": nearest_mean(moments.means),
        "ridge": ridge.solve(penalty),
        "logistic, all rows": logistic(rows, num_classes, decay),
    }
    results = {method: {"accuracy": short(accuracy(w, test, classes))} for method, w in heads.items()}
    results["moments"] |= {"membership": short(membership(pair, rows.h, test.h), 3), "rows": len(rows.y)}
    return results


_MEMORY = """
import sys, torch
import penult
from penult.activations import Activations
torch.set_num_threads(1)
def peak():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024
import threading, time
penult.Moments.of(torch.zeros(4, 2), torch.arange(4) % 2)
before, highest, done = peak(), 0.0, False
def watch():
    global highest
    while not done:
        highest = max(highest, peak())
        time.sleep(0.01)
thread = threading.Thread(target=watch); thread.start()
start = time.process_time()
moments = penult.Moments.of(Activations.open(sys.argv[1]))
seconds = time.process_time() - start
done = True; thread.join()
assert len(moments) == int(sys.argv[2])
print(highest - before, seconds)
"""


def memory(rows: int = 1_000_000, dim: int = 512, num_classes: int = 10) -> dict[str, Any]:
    """Peak memory in MiB above the imports, and seconds, of counting rows of a folder; on Linux."""
    with tempfile.TemporaryDirectory() as folder:
        generator, part = torch.Generator().manual_seed(0), 50_000
        parts = []
        for number in range(rows // part):
            h = torch.randn(part, dim, generator=generator)
            y = torch.randint(num_classes, (part,), generator=generator)
            path = Path(folder) / str(number)
            penult.Activations(h, torch.zeros(part, num_classes), y).save(path)
            parts.append(penult.Activations.open(path))
        whole = Path(folder) / "whole"
        penult.Activations.concatenate(parts).save(whole)
        run = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(whole), str(rows)], capture_output=True, text=True, check=True
        )
    mebibytes, seconds = map(float, run.stdout.split())
    return {"rows": rows, "features": dim, "mebibytes": short(mebibytes, 3), "seconds": short(seconds, 3)}


def adding(dim: int = 1280, rows: int = 100, old: int = 100, new: int = 10) -> dict[str, Any]:
    """Seconds to add ten classes of 100 rows each to moments of 100 classes, with the new pair."""
    generator = torch.Generator().manual_seed(0)

    def some(first: int, count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(first, first + count).repeat(rows)
        return torch.randn(len(y), dim, generator=generator), y

    moments = penult.Moments.of(*some(0, old), old)
    h, y = some(old, new)
    times: dict[str, list[float]] = {"sums": [], "pair": []}
    for _ in range(5):
        start = time.perf_counter()
        grown = moments + penult.Moments.of(h, y, old + new)
        middle = time.perf_counter()
        grown.pair()
        times["sums"].append(middle - start)
        times["pair"].append(time.perf_counter() - middle)
    return {"features": dim, "classes": old, "new": new} | {
        f"{part}_seconds": short(min(values), 3) for part, values in times.items()
    }


def jobs(only: str | None, data: Path, cache: Path) -> dict[str, dict[str, Callable[[], dict[str, Any]]]]:
    """All measurements by setting and key."""
    every: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {setting: {} for setting in SETTINGS}
    every["cost"] = {"memory": memory, "adding": adding}
    for name in STEPS:
        for seed in range(ORDERS):
            every["steps"][f"{name} {seed}"] = lambda name=name, seed=seed: steps(name, seed, data, cache)
        for alpha in ALPHAS:
            for seed in range(OWNER_SEEDS):
                every["owners"][f"{name} {alpha} {seed}"] = lambda name=name, alpha=alpha, seed=seed: owners(
                    name, alpha, seed, data, cache
                )
        for count in FEW[name]:
            every["few"][f"{name} {count}"] = lambda name=name, count=count: few(name, count, data, cache)
    return {setting: cells for setting, cells in every.items() if only in (None, setting)}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the features")
    parser.add_argument("--only", choices=SETTINGS, help="measure one setting")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "moments.json", help="results file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = load(options.out, "moments", LAYOUT)
    for setting, cells in jobs(options.only, options.data, options.cache).items():
        section = results["sections"].setdefault(setting, {"cells": {}})
        section |= {
            "settings": {"steps": STEPS, "orders": ORDERS, "owners": OWNERS, "seeds": OWNER_SEEDS},
            "versions": versions(("torch",)),
            "machine": machine(),
            "bars": BARS,
        }
        for key, measure in cells.items():
            if key not in section["cells"]:
                print(f"{setting}: {key}", file=sys.stderr)
                section["cells"][key] = measure()
                write(options.out, results)
    if set(results["sections"]) == set(SETTINGS):
        tables.show("moments", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
