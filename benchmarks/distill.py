"""Distillation under domain shift: penult's targets, compared with common methods and two controls.

The other methods are cross-entropy, Hinton, DKD, FitNets and SimKD. The setting is a teacher trained on one domain, a
small student, and few labelled images of another domain (`distill_setting.py`). For each seed, every method starts
from the same student and gets the same images in the same order; the seed is also the number of the teacher, and
gains are differences within a seed. All methods run at one learning rate; then each run is repeated at three rates,
of which validation images choose the best. Test images are used once for each reported figure, and not to choose
anything.

Each run is stored in the cache; a benchmark that was stopped continues with the missing runs.

Example:
    python benchmarks/distill.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/distill.py --data ../shared/data --cache /tmp/penult-cache --only mnist/usps --only cost
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penult
import tables
from distill_baselines import BASELINES, FitNets, Hinton, MatchedSmoothing, SimplexHead, soft_loss
from distill_setting import (
    RATE,
    SETTINGS,
    Method,
    Setting,
    Student,
    accuracy,
    begin,
    head,
    outputs,
    shares,
    source_activations,
    teacher,
    train,
)
from penult.distill import ActivationLoss, Gate, SoftTargetLoss, class_soft_targets, pseudo_labels, targets
from penult.distill._span_head import SpanHead
from record import load, machine, short, versions, write

HERE = Path(__file__).parent
LAYOUT = 1
SEEDS = (0, 1, 2)
RATES = (1e-3, RATE, 1e-2)
SIZES = {"mnist": {"none": (10, 500), "texture": (10, 500)}}  # other sizes of the distillation set, per class


# --- penult's methods ---------------------------------------------------------------------------------------


@final
class Taught:
    """A student taught by one of penult's losses.

    Args:
        loss: The loss.
        targets: One row a picture of the distillation set.
        labels: In place of those of the pictures; None for these.
    """

    def __init__(self, loss: SoftTargetLoss | ActivationLoss, targets: Tensor, labels: Tensor | None = None) -> None:
        self.criterion, self.targets, self.labels = loss, targets, labels

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the loss says."""
        y = y if self.labels is None else self.labels[rows]
        features = student.features(x)
        given = features if isinstance(self.criterion, ActivationLoss) else student.head(features)
        return self.criterion(given, y, self.targets[rows])

    def parameters(self) -> list[nn.Parameter]:
        """The projector's, if there is one."""
        return list(self.criterion.parameters())

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.criterion.predict(student.features(x)) if isinstance(self.criterion, ActivationLoss) else student(x)


@dataclass(frozen=True)
class Knowledge:
    """What is known of a teacher, and what it makes of the distillation set.

    Attributes:
        pair: Of its head, with the radius of source activations.
        alone: Of its head alone, with the radius by the confidence rule.
        activations: Of the pictures, (N, d).
        logits: (N, K).
        labels: (N,).
        source: Activations (M, d) of the teacher's own domain.
        seed: Of the run.
    """

    pair: penult.GenerativePair
    alone: penult.GenerativePair
    activations: Tensor
    logits: Tensor
    labels: Tensor
    source: Tensor
    seed: int


def _soft(k: Knowledge, width: int, **options: Any) -> Method:
    return Taught(SoftTargetLoss(), targets(k.pair, k.labels, "soft", **options))


def _activation(k: Knowledge, width: int, **options: Any) -> Method:
    return Taught(ActivationLoss(k.pair, width), targets(k.pair, k.labels, "activation", **options))


def _hinted(k: Knowledge, width: int) -> Method:
    made = targets(k.pair, k.labels, "hinted", activations=k.activations)
    return Taught(ActivationLoss(k.pair, width, hint=5.0), made)


def _sharp(build: Callable[..., Method], k: Knowledge, width: int) -> Method:
    gate = Gate.fit(k.pair, k.activations, k.labels, sharpness=4.0)
    return build(k, width, activations=k.activations, gate=gate)


def _unlabelled(k: Knowledge, width: int) -> Method:
    labels = pseudo_labels(k.pair, k.activations)
    gate = Gate.fit(k.pair, k.activations)
    return Taught(SoftTargetLoss(), targets(k.pair, labels, activations=k.activations, gate=gate), labels)


OURS: dict[str, Callable[[Knowledge, int], Method]] = {
    "soft, head only": lambda k, width: _soft(k, width),
    "activation, head only": lambda k, width: _activation(k, width),
    "soft, gated": lambda k, width: _soft(k, width, activations=k.activations),
    "activation, gated": lambda k, width: _activation(k, width, activations=k.activations),
    "activation with hints, gated": _hinted,
    "soft, gated, sharpness 4": partial(_sharp, _soft),
    "activation, gated, sharpness 4": partial(_sharp, _activation),
    "soft, head only, radius by confidence": lambda k, width: _soft(replace(k, pair=k.alone), width),
    "activation, head only, radius by confidence": lambda k, width: _activation(replace(k, pair=k.alone), width),
}
CONTROLS: dict[str, Callable[[Knowledge, int], Method]] = {
    "matched smoothing": lambda k, width: MatchedSmoothing(class_soft_targets(k.pair)),
    "simplex head": lambda k, width: SimplexHead(
        k.pair.head.num_classes, width, float(SpanHead.of(k.pair).radius), seed=k.seed
    ),
}
MORE: dict[str, Callable[[Knowledge, int], Method]] = {
    "fitnets, centered hints": lambda k, width: FitNets(k.activations - k.activations.mean(0), k.pair.head, width),
}
UNLABELLED: dict[str, Callable[[Knowledge, int], Method]] = {
    "hinton, no labels": lambda k, width: Hinton(k.logits, 1.0),
    "soft, gated, no labels": _unlabelled,
}
METHODS: dict[str, Callable[[Knowledge, int], Method]] = {
    **{name: lambda k, width, build=build: build(k.activations, k.logits, k.labels, k.pair.head, width)
       for name, build in BASELINES.items()},
    **MORE, **CONTROLS, **OURS, **UNLABELLED,
}  # fmt: skip


ONE_RATE = (*UNLABELLED, *(name for name in OURS if "confidence" in name or "sharpness" in name))  # variants


def knowledge(setting: Setting, seed: int, images: Tensor, labels: Tensor, data: Path, cache: Path) -> Knowledge:
    """Look at the pictures of a distillation set through the teacher of a seed."""
    own = head(setting, seed, data, cache)
    source = source_activations(setting, seed, data, cache)
    base = penult.Sphere.fit(own, source.activations, ambient=False)
    seen = outputs(teacher(setting, seed, data, cache), own, images)
    return Knowledge(
        penult.GenerativePair(own, base), penult.GenerativePair(own), *seen, labels, source.activations, seed
    )


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The runs of one domain and seed.

    Attributes:
        setting: Name of the setting.
        domain: Name of the domain.
        seed: Of the student and the pictures, and the number of the teacher.
        per_class: Pictures of a class, where not those of the setting.
    """

    setting: str
    domain: str
    seed: int
    per_class: int | None = None

    @property
    def name(self) -> str:
        """Name of its section, and with the seed of its file."""
        return f"{self.setting}/{self.domain}" + (f"/{self.per_class}" if self.per_class else "")


def run_group(group: Group, rates: tuple[float, ...], data: Path, cache: Path, fresh: bool) -> dict[str, Any]:
    """Train a student by each method at some rates, except for those that were; what is known of all of them.

    Returns:
        ``teacher``, its accuracy and the gate's mean; and ``runs``, by method and rate: accuracy on ``validation``
        pictures; and on ``test`` pictures at the common rate and at the best one.
    """
    torch.set_num_threads(1)
    setting = SETTINGS[group.setting]
    if group.per_class:
        setting = replace(setting, per_class=group.per_class)
    path = cache / "distill" / f"{group.name.replace('/', '-')}-{group.seed}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not fresh else {"runs": {}}
    asked = [name for name in METHODS if len(rates) == 1 or name not in ONE_RATE]
    wanted = [name for name in asked if not _complete(found["runs"].get(name, {}), rates)]
    if not wanted:
        return found
    split = shares(setting, setting.domain(group.domain), group.seed, data)
    known = knowledge(setting, group.seed, *split.train, data, cache)
    summary = Gate.fit(known.pair, known.activations, known.labels).summary
    assert summary is not None
    found["teacher"] = {"train": short(100 * summary.accuracy), "belief": short(summary.belief, 3)}
    look = outputs(teacher(setting, group.seed, data, cache), known.pair.head, split.test.images)[1].argmax(-1)
    found["teacher"]["test"] = short(100 * float((look == split.test.labels).double().mean()))
    for name in wanted:
        runs = found["runs"].setdefault(name, {})
        students: dict[str, tuple[Method, Student]] = {}
        for rate in rates:
            if f"{rate:g}" not in runs:
                student, method = begin(setting, partial(METHODS[name], known), group.seed)
                start = time.process_time()
                train(method, student, *split.train, seed=group.seed, rate=rate)
                took = time.process_time() - start
                got = accuracy(method, student, *split.validation)
                runs[f"{rate:g}"] = {"validation": short(100 * got), "seconds": short(took, 3)}
                students[f"{rate:g}"] = method, student
        for rate in {f"{RATE:g}", best(runs)}:
            if "test" not in runs[rate]:
                if rate not in students:  # of a run that was stopped
                    student, method = begin(setting, partial(METHODS[name], known), group.seed)
                    train(method, student, *split.train, seed=group.seed, rate=float(rate))
                    students[rate] = method, student
                runs[rate]["test"] = short(100 * accuracy(*students[rate], *split.test))
        write(path, found)
    return found


def best(runs: dict[str, dict[str, float]]) -> str:
    """The rate of the highest accuracy on validation pictures, the common one where rates are equal."""
    return max(runs, key=lambda rate: (runs[rate]["validation"], rate == f"{RATE:g}"))


def _complete(runs: dict[str, dict[str, float]], rates: Iterable[float]) -> bool:
    return all(f"{rate:g}" in runs for rate in rates) and all("test" in runs[r] for r in (f"{RATE:g}", best(runs)))


# --- cost ---------------------------------------------------------------------------------------------------

STEP_METHODS = (
    "cross-entropy", "soft, gated", "activation, gated", "activation with hints, gated", "hinton, w=.9", "fitnets"
)  # fmt: skip


def cost(data: Path, cache: Path, repeats: int = 9, steps: int = 40) -> dict[str, Any]:
    """What a step and a whole distillation take: medians of wall time, one thread, all of them in turns.

    The teacher of whole distillations is a wider network of ten times the student's parameters, with random weights:
    they do not change what it takes.
    """
    torch.set_num_threads(1)
    setting = SETTINGS["mnist"]
    images, labels = shares(setting, setting.domain("none"), 0, data).train
    known = knowledge(setting, 0, images, labels, data, cache)
    network = _wide_teacher()
    built = {name: begin(setting, partial(METHODS[name], known), 0) for name in STEP_METHODS}
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, (student, method) in built.items():
            start = time.perf_counter()
            train(method, student, images, labels, seed=0, steps=steps)
            times.setdefault(name, []).append((time.perf_counter() - start) / steps)
    totals: dict[str, list[float]] = {}
    ways: dict[str, Callable[[Knowledge, int], Method]] = {
        "head only: no teacher": METHODS["soft, head only"],
        "hinton: the teacher sees every batch": lambda k, width: Asking(network),
        "hinton: logits kept": lambda k, width: Hinton(network(images)),
    }
    for _ in range(3):
        for name, build in ways.items():
            start = time.perf_counter()
            with torch.no_grad():
                student, method = begin(setting, partial(build, known), 0)
            train(method, student, images, labels, seed=0)
            totals.setdefault(name, []).append(time.perf_counter() - start)
    student = begin(setting, partial(METHODS["cross-entropy"], known), 0)[0]
    return {
        "step_ms": {name: short(1e3 * statistics.median(each)) for name, each in times.items()},
        "total_s": {name: short(statistics.median(each), 3) for name, each in totals.items()},
        "parameters": {"student": _size(student), "teacher": _size(network)},
    }


def _wide_teacher() -> nn.Module:
    """The teachers' own form, three times as wide."""
    return nn.Sequential(
        nn.Conv2d(1, 48, 5), nn.ReLU(),
        nn.Conv2d(48, 96, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96 * 10 * 10, 64), nn.Linear(64, 10),
    ).requires_grad_(False)  # fmt: skip


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@final
class Asking:
    """Hinton's distillation as it runs where pictures are augmented: the teacher sees every batch.

    Args:
        network: The teacher.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """(1 − w) CE + w T² KL at w = 0.9 and T = 4."""
        with torch.no_grad():
            soft = (self._network(x) / 4).softmax(-1)
        z = student(x)
        return 0.1 * F.cross_entropy(z, y) + 0.9 * soft_loss(z, soft, 4.0)

    def parameters(self) -> list[nn.Parameter]:
        """None."""
        return []

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return student(x)


# --- the command line ---------------------------------------------------------------------------------------


def groups() -> list[Group]:
    """All of them, whole seeds one after the other."""
    found = [Group(s.name, d.name, seed) for seed in SEEDS for s in SETTINGS.values() for d in s.domains]
    sizes = [(name, d, n) for name, domains in SIZES.items() for d, each in domains.items() for n in each]
    return found + [Group(name, d, seed, n) for seed in SEEDS for name, d, n in sizes]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks and finished runs")
    parser.add_argument(
        "--only", action="append", help="only runs whose names begin with this, such as mnist/usps or cost (repeatable)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the runs")
    parser.add_argument("--one-rate", action="store_true", help="use the common learning rate only")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "distill.json", help="results file")
    options = parser.parse_args(arguments)
    begins = tuple(options.only or ("",))
    results = load(options.out, "distill", LAYOUT)

    def section(name: str) -> dict[str, Any]:
        found: dict[str, Any] = results["sections"].setdefault(name, {"cells": {}})
        found |= {"settings": {"rate": RATE, "rates": list(RATES)}, "versions": versions(("torch",))}
        found["machine"] = machine() | {"threads_used": 1}
        return found

    chosen = [g for g in groups() if g.name.startswith(begins) and g.seed in options.seeds]
    passes = [(RATE,)] if options.one_rate else [(RATE,), RATES]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for at, rates in enumerate(passes):
            swept = [g for g in chosen if not at or not g.per_class]
            fresh = options.fresh and not at
            work = {pool.submit(run_group, g, rates, options.data, options.cache, fresh): g for g in swept}
            for done in as_completed(work):
                group = work[done]
                section("runs")["cells"].setdefault(group.name, {})[str(group.seed)] = done.result()
                write(options.out, results)
                print(f"{group.name}, seed {group.seed}: {len(rates)} rate(s)", flush=True)
    if "cost".startswith(begins) and (options.fresh or not results["sections"].get("cost", {}).get("cells")):
        section("cost")["cells"] = cost(options.data, options.cache)
        write(options.out, results)
    tables.show("distill", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
