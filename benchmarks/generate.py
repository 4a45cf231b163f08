"""Class-conditional images from a classifier: generators conditioned on activations or on labels.

There are three settings (`generate_setting.py`): a classifier of MNIST with images that it has not seen and whose
labels are not used; the same classifier with unlabelled images of USPS; and published ResNets with CIFAR-10.
`ActivationVAE` and `ActivationGAN` are trained once for each classifier and seed, and generate images from several
distributions of activations. The baselines of either kind are one-hot conditional generators with the true labels,
with the pseudo-labels of the classifier, with a hundred labels, and with the labels of a classifier trained on these
hundred; and an unconditional generator whose images the classifier labels. All have the same numbers of parameters
and steps and the same trainer; the scale of the label was chosen for the baselines in the same way as options were
for penult.

Each generator makes 500 images of each class, and an independent evaluator compares them with the test images.
Choices (``--share selection``) were made on that split only; test images are used once for each reported figure.

Each run is stored in the cache; a benchmark that was stopped continues with the missing runs.

Example:
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache --share selection
    python benchmarks/generate.py --data ../shared/data --cache /tmp/penult-cache --only mnist/vae
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tables
from generate_gan import ISOLATED, MODELS
from generate_gan import TRIES as ADVERSARIAL_TRIES
from generate_laws import prepare
from generate_runs import CONFIDENT, EACH, GAINS, SEEDS, SMALL, STEPS, TRIES, Run, Share, execute, reference
from generate_setting import SETTINGS
from record import load, machine, versions, write

HERE = Path(__file__).parent
LAYOUT = 1

BOTH = ("vae", "one-hot, pseudo-labels")  # of both settings of digits, and of each classifier
MNIST = ("vae, linear classifier", "vae on von Mises-Fisher, ambient", "vae on von Mises-Fisher, span(W)")
ALONE = ("one-hot, labels", "one-hot, 100 labels", "one-hot, labels of a 100-label classifier")  # no classifier matters
DRAWN = ("gan, half of the conditions drawn", "gan, all conditions drawn")
PAIRED = ("gan",)
ADVERSARIAL = {  # by setting: models of each classifier and seed, and of each seed alone
    "mnist": (PAIRED, tuple(name for name in (*MODELS, *ISOLATED, SMALL) if name not in (*PAIRED, "gan, hinge"))),
    "mnist-usps": (
        ("gan", "gan, one-hot, pseudo-labels"),
        (
            "gan, one-hot, labels", "gan, one-hot, 100 labels", "gan, one-hot, labels of a 100-label classifier",
            "gan, non-saturating", "gan, one-hot, labels, hinge",
        ),
    ),
    "cifar10": (
        PAIRED,
        ("gan, one-hot, labels", "gan, one-hot, pseudo-labels", "gan, hinge"),
    ),
}  # fmt: skip


def runs(share: Share) -> Iterator[Run]:
    """All of them, first those that matter most."""
    if share == "selection":
        models = "vae", *TRIES, "one-hot, labels", *GAINS
        yield from (Run("mnist", model, seed, seed) for model in models for seed in SEEDS)
        models = "gan", "gan, non-saturating", "gan, one-hot, labels", *ADVERSARIAL_TRIES, *DRAWN
        yield from (Run("mnist", model, seed, seed) for model in models for seed in SEEDS)
        return
    for setting in ("mnist", "mnist-usps"):
        for seed in SEEDS:
            for c in SEEDS:
                yield from (Run(setting, model, c, seed) for model in BOTH)
            yield from (Run(setting, model, seed, seed) for model in ALONE)
    for seed in SEEDS:
        yield Run("mnist", "unconditional, labelled by the classifier", seed, seed)
        yield from (Run("mnist", model, c, seed) for model in MNIST for c in SEEDS)
    for setting, (each, alone) in ADVERSARIAL.items():
        for seed in SEEDS:
            yield from (Run(setting, model, c, seed) for c in SEEDS for model in each)
            yield from (Run(setting, model, seed, seed) for model in alone)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks and finished runs")
    parser.add_argument("--share", choices=("test", "selection"), default="test", help="images to compare with")
    parser.add_argument(
        "--only", action="append", help="only runs whose names begin with this, such as mnist/vae (repeatable)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
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
        for name in SETTINGS:
            if any(run.setting == name for run in chosen) and (options.fresh or name not in section["references"]):
                section["references"][name] = pool.submit(reference, name, *known_places).result()
        needed: dict[tuple[str, int, str], set[str] | None] = {}
        for run in chosen:
            key, laws = (run.setting, run.classifier, run.kind), run.wanted(options.share)
            before = needed.setdefault(key, set())
            needed[key] = None if laws is None or before is None else before | set(laws)
        fits = [pool.submit(prepare, *key, options.data, options.cache, laws) for key, laws in needed.items()]
        for each in fits:
            each.result()
        work = {pool.submit(execute, run, *known_places, options.fresh): run for run in chosen}
        for done in as_completed(work):
            run = work[done]
            section["cells"].setdefault(run.name, {})[run.seeds] = done.result()
            write(options.out, results)
            print(f"{run.name}, seeds {run.seeds}: {done.result()['total_seconds']} s", flush=True)
    names = (
        ("generate-choices", "generate-gan-choices") if options.share == "selection" else ("generate", "generate-gan")
    )
    for name in names:
        if any(run.model.startswith("gan") == ("gan" in name) for run in chosen):
            tables.show(name, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
