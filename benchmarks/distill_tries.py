"""Variants that aim to be better than Hinton's distillation without a shift and better than FitNets under a shift.

Each variant is evaluated on *validation* images, with seeds of its own (10, 11, 12), so that `distill.py` can report
test results of the chosen variant. Each run is stored, and a benchmark that was stopped continues.

Example:
    python benchmarks/distill_tries.py --data ../shared/data --cache /tmp/penult-cache
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import penult
import tables
from distill import HERE, METHODS, Knowledge, Taught, knowledge
from distill_baselines import Hinton
from distill_setting import SETTINGS, Method, Student, accuracy, begin, head, outputs, shares, teacher, train
from penult.distill import ActivationLoss, Gate, SoftTargetLoss, targets
from record import load, machine, short, versions, write

LAYOUT = 1
SEEDS = (10, 11, 12)
DOMAINS = {
    "mnist": ("none", "texture"),
    "cifar10": ("noise",),
}


def _gate(k: Knowledge, sharpness: float) -> Gate:
    return Gate.fit(k.pair, k.activations, k.labels, sharpness=sharpness)


def _soft(k: Knowledge, width: int, sharpness: float = 1.0, temperature: float = 4.0, weight: float = 0.9) -> Method:
    soft = targets(k.pair, k.labels, temperature=temperature, activations=k.activations, gate=_gate(k, sharpness))
    return Taught(SoftTargetLoss(temperature, weight), soft)


def _activation(k: Knowledge, width: int, sharpness: float = 1.0) -> Method:
    made = targets(k.pair, k.labels, "activation", activations=k.activations, gate=_gate(k, sharpness))
    return Taught(ActivationLoss(k.pair, width), made)


def _hinted(k: Knowledge, width: int, sharpness: float = 4.0, hint: float = 5.0) -> Method:
    made = targets(k.pair, k.labels, "hinted", activations=k.activations, gate=_gate(k, sharpness))
    return Taught(ActivationLoss(k.pair, width, hint=hint), made)


def _hints_where_believed(k: Knowledge, width: int) -> Method:
    """Hints go where the gate believes; elsewhere the target itself stands in for them."""
    gate = _gate(k, 4.0)
    made = targets(k.pair, k.labels, "hinted", activations=k.activations, gate=gate)
    d = made.shape[1] // 2
    g = gate(k.activations, k.labels)[:, None]
    return Taught(
        ActivationLoss(k.pair, width, hint=5.0), torch.cat([made[:, :d], torch.lerp(made[:, :d], made[:, d:], g)], 1)
    )


def _head_only_hinted(k: Knowledge, width: int) -> Method:
    made = targets(k.pair, k.labels, "hinted", activations=k.activations, gate=Gate(k.pair, trust=0.0))
    return Taught(ActivationLoss(k.pair, width, hint=5.0), made)


def _per_class(k: Knowledge, width: int) -> Method:
    """ρ by class, in place of one for all; each class's accuracy is shrunk to that of all by five images."""
    gate = Gate.fit(k.pair, k.activations, k.labels)
    assert gate.summary is not None
    made = targets(k.pair, k.labels, "activation", activations=k.activations, gate=Gate(k.pair, trust=1.0))
    alone = targets(k.pair, k.labels, "activation")
    overall = gate.summary.accuracy or 0.0
    shrunk = torch.tensor(
        [(each.rows * each.accuracy + 5 * overall) / (each.rows + 5) for each in gate.summary.classes]
    )
    classes = len(shrunk)
    rho = ((shrunk - 1 / classes) / (1 - 1 / classes)).clamp_min(0)[k.labels][:, None]
    return Taught(ActivationLoss(k.pair, width), torch.lerp(alone, made, rho))


def _of_base(make: Callable[[penult.Head, Tensor], Any]) -> Callable[[Knowledge, int], Method]:
    """Soft class targets of another base, fitted to the teacher's source activations."""

    def build(k: Knowledge, width: int) -> Method:
        pair = penult.GenerativePair(k.pair.head, make(k.pair.head, k.source))
        soft = targets(pair, k.labels, activations=k.activations, gate=_gate(replace(k, pair=pair), 1.0))
        return Taught(SoftTargetLoss(), soft)

    return build


@final
class OwnNorm:
    """Activation targets of direction alone, with a norm that the student learns: λ (2 − 2 cos + (‖u‖/s − 1)²), s free.

    Args:
        taught: What it is a variant of.
        radius: Where s begins.
    """

    def __init__(self, loss: ActivationLoss, made: Tensor) -> None:
        self._own, self.targets = loss, made @ loss.canonical.span.T
        self.norm = nn.Parameter(loss.canonical.radius.clone())

    def loss(self, student: Student, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        u, t = self._own.projector(student.features(x)), self.targets[rows]
        norm = torch.linalg.vector_norm(u, dim=-1).clamp_min(1e-6)
        cosine = (u * t).sum(-1) / (norm * torch.linalg.vector_norm(t, dim=-1).clamp_min(1e-6))
        distance = ((norm / self.norm - 1).square() + 2 * (1 - cosine)).mean()
        return (
            F.cross_entropy(F.linear(u, self._own.canonical.rows, self._own.canonical.bias), y)
            + self._own.strength * distance
        )

    def parameters(self) -> list[nn.Parameter]:
        """Projector and norm."""
        return [*self._own.parameters(), self.norm]

    def predict(self, student: Student, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self._own.predict(student.features(x))


def _own_norm(k: Knowledge, width: int) -> Method:
    made = targets(k.pair, k.labels, "activation", activations=k.activations, gate=_gate(k, 1.0))
    return OwnNorm(ActivationLoss(k.pair, width), made)


TRIES: dict[str, Callable[[Knowledge, int], Method]] = {
    **{
        name: METHODS[name] for name in ("cross-entropy", "hinton, w=.9", "fitnets", "soft, gated", "activation, gated")
    },
    "hinton, T=8, w=.5": lambda k, width: Hinton(k.logits, 0.5, 8.0),
    "soft, T=8, w=.5": lambda k, width: _soft(k, width, 1.0, 8.0, 0.5),
    "soft, T=8, w=.9": lambda k, width: _soft(k, width, 1.0, 8.0, 0.9),
    "soft, T=2, w=.9": lambda k, width: _soft(k, width, 1.0, 2.0, 0.9),
    "soft, sharpness 4": lambda k, width: _soft(k, width, 4.0),
    "soft, T=8, w=.5, sharpness 4": lambda k, width: _soft(k, width, 4.0, 8.0, 0.5),
    "soft, elliptic base": _of_base(lambda head, h: penult.Sphere.fit(head, h, shape="elliptic")),
    "soft, mixture base": _of_base(lambda head, h: penult.Marginal.fit(head, h, kind="mixture")),
    "activation, per-class trust": _per_class,
    "activation, norm of its own": _own_norm,
    "activation, sharpness 4": lambda k, width: _activation(k, width, 4.0),
    "activation and hints, sharpness 1": lambda k, width: _hinted(k, width, 1.0),
    "activation and hints": _hinted,
    "activation and hints, sharpness 8": lambda k, width: _hinted(k, width, 8.0),
    "activation and hints, η = 2": lambda k, width: _hinted(k, width, hint=2.0),
    "activation and hints, η = 15": lambda k, width: _hinted(k, width, hint=15.0),
    "activation and hints where believed": _hints_where_believed,
    "activation, head only, and hints": _head_only_hinted,
}


@torch.no_grad()
def adapted(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy with the BatchNorm statistics of pictures (N, C, H, W): Li et al., Adaptive batch normalization, 2018."""
    own = copy.deepcopy(network)
    for module in own.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
            module.train()
    for x in images.split(250):
        own(x)
    return own.eval()


def run(name: str, domain: str, seed: int, data: Path, cache: Path) -> dict[str, float]:
    """Accuracy of each try on validation pictures, per cent, as far as it is not known."""
    torch.set_num_threads(1)
    setting, path = SETTINGS[name], cache / "distill-tries" / f"{name}-{domain}-{seed}.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    split = shares(setting, setting.domain(domain), seed, data)
    index = seed - SEEDS[0]
    known = replace(knowledge(setting, index, *split.train, data, cache), seed=seed)

    def note(what: str, built: Callable[[int], Method]) -> tuple[Student, Method]:
        student, method = begin(setting, built, seed)
        train(method, student, *split.train, seed=seed)
        found[what] = short(100 * accuracy(method, student, *split.validation))
        write(path, found)
        return student, method

    for what, build in TRIES.items():
        if what not in found:
            note(what, partial(build, known))
    if "second round" not in found:
        student, method = note("activation and hints", partial(_hinted, known))
        found["second round"] = _again(setting, known, student, method, split, seed)
        write(path, found)
    if name == "cifar10" and "teacher adapted: activation and hints" not in found:
        own = head(setting, index, data, cache)
        seen = outputs(adapted(teacher(setting, index, data, cache), split.train.images), own, split.train.images)
        other = replace(known, activations=seen[0], logits=seen[1])
        for what in ("hinton, w=.9", "activation, gated"):
            note(f"teacher adapted: {what}", partial(METHODS[what], other))
        note("teacher adapted: activation and hints", partial(_hinted, other))
    return found


def _again(setting: Any, k: Knowledge, student: Student, method: Any, split: Any, seed: int) -> float:
    """A student of the student, whose own coordinates in span(W) take the teacher's place as far as it is right."""
    images, labels = split.train
    loss = method.criterion
    with torch.no_grad():
        u = loss.projector(student.features(images))
    h = u @ loss.canonical.span / k.pair.head.rescaled()[1]
    fresh = replace(k, activations=h, logits=k.pair.head(h))
    second, again = begin(setting, partial(_activation, fresh), seed + 100)
    train(again, second, images, labels, seed=seed + 100)
    return short(100 * accuracy(again, second, *split.validation))


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks and finished runs")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "distill_tries.json", help="results file")
    options = parser.parse_args(arguments)
    results = load(options.out, "distill_tries", LAYOUT)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = {
            pool.submit(run, name, domain, seed, options.data, options.cache): (name, domain, seed)
            for seed in SEEDS for name, domains in DOMAINS.items() for domain in domains
        }  # fmt: skip
        for done in as_completed(work):
            name, domain, seed = work[done]
            section = results["sections"].setdefault("tries", {"cells": {}})
            section |= {"versions": versions(("torch",)), "machine": machine() | {"threads_used": 1}}
            section["cells"].setdefault(f"{name}/{domain}", {})[str(seed)] = done.result()
            write(options.out, results)
            print(f"{name}/{domain}, seed {seed}", flush=True)
    tables.show("distill-tries", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
