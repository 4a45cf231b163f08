"""Judging of the images of ``penult generate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penult.activations import Tap, extract
from penult.cli._inputs import Classifier, ImageSubset, NetworkOptions
from penult.generate import ActivationGenerator, Judge
from penult.report.generate import Pictures, pictures_of, seeded

__all__ = ["JUDGED", "evaluator_of", "judged"]

JUDGED = 2000  # Generated images that are judged, and real ones that they are compared with.
_TRAINING = 10_000  # Training images that generated ones are searched for copies of.
_EVENLY = 200  # Generated images of all classes together, where there are no real ones to take labels from.


def evaluator_of(
    classifier: Classifier,
    options: NetworkOptions,
    judge: NetworkOptions | None,
    normalization: nn.Module | None,
    images: Tensor,
) -> Tap:
    """Return the evaluator of images in [0, 1]: the independent classifier of --judge, or else the classifier itself.

    Args:
        classifier: The classifier.
        options: Its options.
        judge: Options of an independent classifier, or None.
        normalization: Preprocessing that both need, or None.
        images: Some images in [0, 1] on the device of the classifier.

    Raises:
        ValueError: The independent classifier has another number of classes.
    """
    network, options = (classifier.network, options) if judge is None else (judge.load(images.device), judge)
    if normalization is not None:
        network = nn.Sequential(normalization, network)
        options = replace(options, path=None if options.path is None else f"1.{options.path}")
    head, num_classes = options.find_head(network, images), classifier.head.num_classes
    if head.num_classes != num_classes:
        raise ValueError(
            f"--judge {options.name} has {head.num_classes} classes; expected {num_classes}, as the classifier has"
        )
    return Tap(network, head)


def judged(
    generator: ActivationGenerator,
    evaluator: Tap,
    training: ImageSubset,
    validation: ImageSubset,
    confident: float | None,
    seed: int,
    loading: Mapping[str, Any],
) -> tuple[dict[str, Any], Pictures]:
    """Measure the quality of generated images, and generate the pictures for the page.

    Args:
        generator: The generator.
        evaluator: The evaluator, from `evaluator_of`.
        training: Images that the generator was trained on.
        validation: Images to compare with.
        confident: Probability p(y|h) that activations of a second set of generated images exceed, or None.
        seed: Seed for samples and choices.
        loading: Options of loaders.

    Returns:
        Results, in which ``"skipped"`` lists reasons for missing figures; and the pictures.
    """
    k = generator.pair.head.num_classes
    real, labels = validation.load(JUDGED, seed, loading)
    known, known_labels = training.load(_TRAINING, seed, loading)
    skipped: list[str] = []
    results: dict[str, Any] = {"labels": "given" if labels is not None else "judge", "skipped": skipped}
    labels = _predict(evaluator, real) if labels is None else labels
    known_labels = _predict(evaluator, known) if known_labels is None else known_labels

    single = labels.bincount(minlength=k) == 1
    if bool(single.any()):
        skipped.append(
            f"classes {single.nonzero().flatten().tolist()} are not judged: each has a single image to judge by"
        )
    kept = ~single[labels]
    judge = None
    if bool(kept.any()):
        enough = bool((known_labels.bincount(minlength=k)[labels[kept]] >= 2).all())
        try:
            judge = Judge(evaluator, (real[kept], labels[kept]), (known, known_labels) if enough else known, seed=seed)
        except ValueError as error:
            skipped.append(f"nothing but accuracy is measured: {error}")
    else:
        skipped.append("nothing but accuracy is measured: there are too few images to judge by")
    y = torch.arange(k, device="cpu").repeat_interleave(max(1, _EVENLY // k)) if judge is None else labels[kept]
    metrics: dict[str, Any] = {}
    for name, threshold in {"generated": None, "confident": confident}.items():
        if name == "confident" and threshold is None:
            continue
        try:
            images = generator.generate(y, threshold, generator=seeded(generator, seed)).float().cpu()
            metrics[name] = (
                {"accuracy": float((_predict(evaluator, images) == y).double().mean()), "count": len(y)}
                if judge is None
                else judge(images, y).to_dict()
            )
        except ValueError as error:
            skipped.append(f"{name} images are not judged: {error}")
    if judge is not None:
        try:
            metrics["real"] = judge.reference.to_dict()
        except ValueError as error:
            skipped.append(f"figures of real images are missing: {error}")
    for row in metrics.values():
        row.pop("reference", None)
    try:
        pictures = pictures_of(generator, real, labels, seed, confident)
    except ValueError as error:
        skipped.append(f"pictures of confident samples are missing: {error}")
        pictures = pictures_of(generator, real, labels, seed, None)
    return results | {"metrics": metrics}, pictures


@torch.no_grad()
def _predict(evaluator: Tap, images: Tensor) -> Tensor:
    """Return the classes (N,) that the evaluator predicts."""
    acts = extract(evaluator, list(images.split(500)))
    return acts.logits.argmax(-1).cpu()
