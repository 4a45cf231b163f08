"""Class-conditional pictures from a classifier: autoencoders on activations beside autoencoders on labels.

A classifier of MNIST, pictures that it has not seen and whose labels nobody looks at, and generators of pictures of
each digit (`generate_setting.py`); then the same classifier, and unlabelled pictures of USPS. `ActivationVAE` is
trained once for each classifier and seed, and draws from every law of activations. Baselines are the one-hot
conditional autoencoder with the true labels, with the pseudo-labels of the classifier, with a hundred labels, and with
the labels of a classifier that was trained on these hundred; and an unconditional one whose pictures the classifier
labels. All have as many parameters and steps, and are trained by the same trainer; how loud the label enters was chosen
for the baseline as options were for penult.

Each generator makes 500 pictures of each class, which an independent network judges beside the test pictures. Choices
(``--share selection``) were made on other pictures, by that share alone; test pictures are looked at once for each
figure that is reported.

Runs are kept in the cache one by one, and a benchmark that was stopped goes on with those that are missing.

Example:
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache --share selection
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache --only mnist/vae
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import penult
import tables
from generate_baselines import GAIN, OneHotVAE, confident, fit, matched, parameters
from generate_setting import SETTINGS, Pictures, accuracy, classifier, evaluator, few, few_classifier, pictures
from penult.generate import ActivationVAE, Judge
from record import load, machine, short, versions, write

HERE = Path(__file__).parent
LAYOUT = 1
SEEDS = (0, 1)
STEPS = {"mnist": 1500, "mnist-usps": 1000}
EACH = 500  # pictures of a class
CONFIDENT = 0.95
SHAPE = (1, 28, 28)

Share = Literal["test", "selection"]


# --- laws ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A classifier, and what it makes of the generator's pictures.

    Attributes:
        model: The classifier.
        tap: Its tap.
        head: Its head.
        before: Activations of the generator's pictures as laws are fitted to them, before the ReLU if there is one.
        after: What the head reads, (N, d).
        held_out: As `before`, of pictures that no generator is trained on; None for USPS.
    """

    model: nn.Module
    tap: penult.Tap
    head: penult.Head
    before: penult.Activations
    after: Tensor
    held_out: penult.Activations | None


@lru_cache(maxsize=2)
def known(name: str, seed: int, kind: str, data: Path, cache: Path) -> Known:
    """A classifier by its seed, and activations of the pictures of a setting."""
    setting = SETTINGS[name]
    model = classifier(seed, data, cache, kind)
    images = pictures(setting, "generator", data).images
    head = penult.find_head(model, images[:16])
    tap = penult.Tap(model, head)
    relu = kind == "relu"

    def seen(share: str) -> penult.Activations:
        parts = list(pictures(setting, share, data).images.split(500))
        return penult.extract(tap, parts, progress=False, pre_activation=relu)

    before = seen("generator")
    after = before.activations.clamp_min(0) if relu else before.activations
    return Known(model, tap, head, before, after, seen("held-out") if name == "mnist" else None)


def laws(k: Known) -> dict[str, Callable[[], penult.bases.Base]]:
    """Every base, by name; they are fitted without labels to activations of the generator's pictures."""
    head = k.head.clone()

    def marginal(kind: str, acts: penult.Activations = k.before, **options: Any) -> Callable[[], penult.bases.Base]:
        return lambda: penult.Marginal.fit(head, acts, kind=kind, **options)

    found = {
        "bank": marginal("bank"),
        "mixture": marginal("mixture"),
        "mixture, 100 in 24": marginal("mixture", components=100, dims=24),
        "mixture, 50 in 24": marginal("mixture", components=50, dims=24),
        "class": marginal("class"),
        "flow": marginal("flow"),
        "gaussian": lambda: penult.Gaussian.fit(head, k.after),
        "elliptic sphere": lambda: penult.Sphere.fit(head, k.after, shape="elliptic"),
        "sphere, ambient": lambda: penult.Sphere.fit(head, k.after, shape="round"),
        "sphere, span(W)": lambda: penult.Sphere.fit(head, k.after, shape="round", ambient=False),
        "sphere, no data": lambda: penult.Sphere.from_head(head),
    }
    if k.held_out is not None:
        found["bank, held-out"] = marginal("bank", k.held_out)
    return found


SURE = ("bank", "mixture", "class")  # laws that are drawn from confidently, too
SOME = ("bank", "mixture")
CHOICES = ("bank", "mixture", "mixture, 100 in 24", "mixture, 50 in 24")  # laws that were chosen from


def pairs(
    name: str, seed: int, kind: str, data: Path, cache: Path, wanted: Collection[str] | None = None
) -> dict[str, penult.GenerativePair]:
    """Pairs of a classifier with the laws of that name, or all; fitted once, and kept in the cache."""
    k = known(name, seed, kind, data, cache)
    found = {}
    for law, fitted in laws(k).items():
        if wanted is not None and law not in wanted:
            continue
        path = cache / "generate" / "laws" / f"{name}-{kind}-{seed}-{law.replace(' ', '-')}.penult.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            base = fitted()
            head = base.head if isinstance(base, penult.Marginal) else k.head.clone()
            penult.GenerativePair(head, base).save(path)
        found[law] = penult.load(path)
    return found


def prepare(name: str, seed: int, kind: str, data: Path, cache: Path, wanted: Collection[str] | None) -> None:
    """Fit the laws of a classifier, so that no two runs do."""
    torch.set_num_threads(1)
    pairs(name, seed, kind, data, cache, wanted)


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A generator to train and judge.

    Attributes:
        setting: Name of the setting.
        model: Name of the generator.
        classifier: Seed of the classifier.
        seed: Of the generator.
    """

    setting: str
    model: str
    classifier: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its cell, and with the seeds of its file."""
        return f"{self.setting}/{self.model}"

    @property
    def seeds(self) -> str:
        """Seeds of classifier and generator."""
        return f"{self.classifier}-{self.seed}"


BOTH = ("vae", "one-hot, pseudo-labels")  # of both settings, and of each classifier
MNIST = ("vae, linear classifier", "vae on von Mises-Fisher, ambient", "vae on von Mises-Fisher, span(W)")
ALONE = ("one-hot, labels", "one-hot, 100 labels", "one-hot, labels of a 100-label classifier")  # no classifier matters


def runs(share: Share) -> Iterator[Run]:
    """All of them, first those that matter most."""
    if share == "selection":
        models = "vae", *TRIES, "one-hot, labels", *GAINS
        yield from (Run("mnist", model, seed, seed) for model in models for seed in SEEDS)
        return
    for setting in SETTINGS:
        for seed in SEEDS:
            for c in SEEDS:
                yield from (Run(setting, model, c, seed) for model in BOTH)
            yield from (Run(setting, model, seed, seed) for model in ALONE)
    for seed in SEEDS:
        yield Run("mnist", "unconditional, labelled by the classifier", seed, seed)
        yield from (Run("mnist", model, c, seed) for model in MNIST for c in SEEDS)


TRIES: dict[str, dict[str, Any]] = {
    "vae, consistency 30": {"consistency": 30.0},
    "vae, latent 32": {"latent": 32},
    "vae, beta 0.5": {"beta": 0.5},
}
GAINS = {  # of the baseline's label
    "one-hot, labels, zeros and ones": None,
    "one-hot, labels, gain 1": 1.0,
    "one-hot, labels, gain 4": 4.0,
    "one-hot, labels, gain 8": 8.0,
}


@lru_cache(maxsize=2)
def judge(name: str, share: Share, data: Path, cache: Path) -> Judge:
    """The independent network, with the pictures that generated ones are compared with."""
    setting = SETTINGS[name]
    made = evaluator(setting, data, cache)
    return Judge(made, tuple(pictures(setting, share, data)), train=tuple(pictures(setting, "generator", data)))


def judged(run: Run, share: Share, images: Tensor, labels: Tensor, data: Path, cache: Path) -> dict[str, Any]:
    """What the judge says of pictures."""
    found = judge(run.setting, share, data, cache)(images, labels).to_dict()
    return {key: short(value) for key, value in found.items() if isinstance(value, float)}


def execute(run: Run, share: Share, data: Path, cache: Path, fresh: bool) -> dict[str, Any]:
    """Train a generator and judge it with every law, except for those that were.

    Returns:
        ``seconds`` of the training, ``parameters``, ``floats`` of each law, and ``rows``: figures by law.
    """
    torch.set_num_threads(1)
    path = cache / "generate" / share / f"{run.name.replace('/', '-').replace(' ', '-')}-{run.seeds}.json"
    if path.exists() and not fresh:
        return json.loads(path.read_text())
    start = time.perf_counter()
    ours = run.model.startswith("vae")
    found = _ours(run, share, data, cache) if ours else _baseline(run, share, data, cache)
    found["total_seconds"] = short(time.perf_counter() - start, 3)
    write(path, found)
    return found


def _ours(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    kind = "linear" if "linear" in run.model else "relu"
    k = known(run.setting, run.classifier, kind, data, cache)
    train = pictures(SETTINGS[run.setting], "generator", data)
    paper = "von Mises-Fisher" in run.model
    made = pairs(run.setting, run.classifier, kind, data, cache, _wanted(run, share))
    first = next(iter(made.values()))
    options: dict[str, Any] = {"condition": "label"} if paper else TRIES.get(run.model, {})
    vae, seconds = fit(
        lambda: ActivationVAE(first, k.tap, SHAPE, **options), *train, steps=STEPS[run.setting], seed=run.seed
    )
    y = torch.arange(10).repeat_interleave(EACH)
    rows, kept = {}, {}
    for name, pair in made.items():
        drawing = vae.with_pair(pair)
        ways: dict[str, dict[str, Any]] = {name: {}}
        if name in SURE:
            ways[f"{name}, confident"] = {"confident": CONFIDENT}
        if name == "bank":
            ways[f"{name}, rejected"] = {"reject": True}
        for way, how in ways.items():
            images = drawing.generate(y, generator=torch.Generator().manual_seed(run.seed), **how)
            rows[way] = judged(run, share, images, y, data, cache)
        if name == "bank":
            generator = torch.Generator().manual_seed(run.seed)
            draw = lambda labels, drawing=drawing, g=generator: drawing.generate(labels, generator=g)  # noqa: E731
            images, kept[name] = confident(draw, k.model, y, CONFIDENT)
            if images is not None:
                rows[f"{name}, pictures that the classifier is sure of"] = judged(run, share, images, y, data, cache)
    return {
        "seconds": short(seconds, 3),
        "parameters": parameters(vae),
        "floats": {n: p.base.num_parameters for n, p in made.items() if isinstance(p.base, penult.Marginal)},
        "kept": {name: short(value) for name, value in kept.items()},
        "divergence": short(vae.history[-1]["divergence"]) if vae.history else None,
        "rows": rows,
    }


def _wanted(run: Run, share: Share) -> tuple[str, ...] | None:
    """Laws to draw from; None for all."""
    if "von Mises-Fisher" in run.model:
        return (f"sphere, {run.model.rpartition(', ')[2]}",)
    return CHOICES if share == "selection" else SOME if "linear" in run.model else None


def _baseline(run: Run, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    setting = SETTINGS[run.setting]
    model = classifier(run.classifier, data, cache)
    train = _labelled(run, setting, model, data, cache)
    classes = 0 if run.model.startswith("unconditional") else 10
    width = matched(SHAPE, 64, classes)
    vae, seconds = fit(
        lambda: OneHotVAE(SHAPE, classes, width, gain=GAINS.get(run.model, GAIN)),
        *train,
        steps=STEPS[run.setting],
        seed=run.seed,
    )
    generator = torch.Generator().manual_seed(run.seed)
    y = torch.arange(10).repeat_interleave(EACH)

    def draw(labels: Tensor) -> Tensor:
        return vae.generate(labels, generator) if classes else _of_classes(vae, model, labels, generator)

    rows = {"plain": judged(run, share, draw(y), y, data, cache)}
    images, kept = confident(draw, model, y, CONFIDENT)
    if images is not None:
        rows["pictures that the classifier is sure of"] = judged(run, share, images, y, data, cache)
    return {"seconds": short(seconds, 3), "parameters": parameters(vae), "kept": short(kept), "rows": rows}


def _labelled(run: Run, setting: Any, model: nn.Module, data: Path, cache: Path) -> Pictures:
    """The generator's pictures with the labels of a baseline."""
    train = pictures(setting, "generator", data)
    if run.model == "one-hot, 100 labels":
        return few(setting, run.seed, data)
    if run.model == "one-hot, labels of a 100-label classifier":
        model = few_classifier(setting, run.seed, data, cache)
    elif run.model == "one-hot, labels" or run.model in GAINS:
        return train
    with torch.no_grad():
        said = torch.cat([model(part).argmax(-1) for part in train.images.split(1000)])
    return Pictures(train.images, said)


def _of_classes(vae: OneHotVAE, model: nn.Module, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of an unconditional generator that the classifier puts into classes."""
    images = torch.empty(len(labels), *SHAPE)
    left = torch.arange(len(labels))
    with torch.no_grad():
        while len(left):
            drawn = vae.generate(torch.zeros(1000, dtype=torch.long), generator)
            said = model(drawn).argmax(-1)
            for one in labels[left].unique():
                mine, fitting = left[labels[left] == one], (said == one).nonzero().flatten()
                count = min(len(mine), len(fitting))
                images[mine[:count]] = drawn[fitting[:count]]
                left = left[~torch.isin(left, mine[:count])]
    return images


def reference(name: str, share: Share, data: Path, cache: Path) -> dict[str, Any]:
    """Real pictures of the generator's share, as the judge sees them; and what classifier and judge get right."""
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    found = judge(name, share, data, cache).reference.to_dict()
    other = pictures(setting, share, data)
    return {
        "row": {key: short(value) for key, value in found.items() if isinstance(value, float)},
        "judge": short(accuracy(evaluator(setting, data, cache), other)),
        "classifiers": [short(accuracy(classifier(seed, data, cache), other)) for seed in SEEDS],
    }


# --- the command line ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks and finished runs")
    parser.add_argument("--share", choices=("test", "selection"), default="test", help="pictures to compare with")
    parser.add_argument("--only", action="append", help="runs whose names begin so, as mnist/vae (repeatable)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "generate.json", help="results file")
    options = parser.parse_args(arguments)
    begins = tuple(options.only or ("",))
    results = load(options.out, "generate", LAYOUT)
    section: dict[str, Any] = results["sections"].setdefault(options.share, {"references": {}, "cells": {}})
    section |= {"settings": {"steps": STEPS, "each": EACH, "confident": CONFIDENT, "seeds": list(SEEDS)}}
    section |= {"versions": versions(("torch", "lightning", "torchmetrics"))}
    section["machine"] = machine() | {"threads_used": 1}
    known_places = options.share, options.data, options.cache
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        chosen = [run for run in runs(options.share) if run.name.startswith(begins)]
        if not section["references"] or options.fresh:
            for name in SETTINGS:
                section["references"][name] = pool.submit(reference, name, *known_places).result()
        kinds = {(r.setting, r.classifier, "linear" if "linear" in r.model else "relu") for r in chosen}
        few_laws = CHOICES if options.share == "selection" else None
        fits = [
            pool.submit(prepare, *each, options.data, options.cache, SOME if each[2] == "linear" else few_laws)
            for each in sorted(kinds)
        ]
        for each in fits:
            each.result()
        work = {pool.submit(execute, run, *known_places, options.fresh): run for run in chosen}
        for done in as_completed(work):
            run = work[done]
            section["cells"].setdefault(run.name, {})[run.seeds] = done.result()
            write(options.out, results)
            print(f"{run.name}, seeds {run.seeds}: {done.result()['total_seconds']} s", flush=True)
    tables.show("generate", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
