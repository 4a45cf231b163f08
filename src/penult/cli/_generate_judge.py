"""How good the images of ``penult generate`` are: who judges them, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penult.activations import Tap, extract
from penult.cli._inputs import Classifier, ImageSubset, NetworkOptions
from penult.generate import ActivationGenerator, Judge
from penult.report.generate import Pictures, pictures_of, seeded

__all__ = ["JUDGED", "evaluator_of", "judged"]

JUDGED = 2000  # images of either side
_COMPARED = 10_000  # training images that they are compared with
_EVENLY = 200  # images of all classes together, where no real ones say how many of each


def evaluator_of(
    classifier: Classifier,
    options: NetworkOptions,
    judge: NetworkOptions | None,
    normalization: nn.Module | None,
    images: Tensor,
) -> Tap:
    """Return the evaluator of images in [0, 1]: an independent classifier, or else the classifier itself.

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
    trained: ImageSubset,
    validation: ImageSubset,
    confident: float | None,
    seed: int,
    loading: dict[str, Any],
) -> tuple[dict[str, Any], Pictures]:
    """Figures of quality with what they lack, and pictures for the page.

    Args:
        generator: What is judged.
        evaluator: The judge.
        trained: Images that it was trained on.
        validation: Images to compare with.
        confident: What p(y|h) has to exceed of draws that are judged as well.
        seed: Of what is drawn and chosen.
        loading: Options of a loader.
    """
    k = generator.pair.head.num_classes
    real, labels = validation.load(JUDGED, seed, loading)
    known, known_labels = trained.load(_COMPARED, seed, loading)
    facts: dict[str, Any] = {"labels": "given" if labels is not None else "judge", "skipped": []}
    labels = _read(evaluator, real) if labels is None else labels
    known_labels = _read(evaluator, known) if known_labels is None else known_labels

    single = labels.bincount(minlength=k) == 1
    if bool(single.any()):
        facts["skipped"].append(
            f"classes {single.nonzero().flatten().tolist()} are not judged: there is one image of each to judge by"
        )
    kept = ~single[labels]
    enough = bool((known_labels.bincount(minlength=k)[labels[kept]] >= 2).all())
    if not bool(kept.any()):
        judge = None
        facts["skipped"].append("there is nothing but accuracy: too few images are left to judge by")
    else:
        try:
            judge = Judge(evaluator, (real[kept], labels[kept]), (known, known_labels) if enough else known, seed=seed)
        except ValueError as error:
            judge = None
            facts["skipped"].append(f"there is nothing but accuracy: {error}")
    y = torch.arange(k).repeat_interleave(max(1, _EVENLY // k)) if judge is None else labels[kept]
    asked = {"generated": None} | ({} if confident is None else {"confident": confident})
    metrics: dict[str, Any] = {}
    for name, least in asked.items():
        try:
            images = generator.generate(y, least, generator=seeded(generator, seed)).float().cpu()
            metrics[name] = (
                {"accuracy": float((_read(evaluator, images) == y).double().mean()), "count": len(y)}
                if judge is None
                else judge(images, y).to_dict()
            )
        except ValueError as error:
            facts["skipped"].append(f"{name} images are not judged: {error}")
    if judge is not None:
        try:
            metrics["real"] = judge.reference.to_dict()
        except ValueError as error:
            facts["skipped"].append(f"there are no figures of real images to compare with: {error}")
    for row in metrics.values():
        row.pop("reference", None)
    try:
        pictures = pictures_of(generator, real, labels, seed, confident)
    except ValueError as error:
        facts["skipped"].append(f"there are no pictures of confident draws: {error}")
        pictures = pictures_of(generator, real, labels, seed, None)
    return facts | {"metrics": metrics}, pictures


@torch.no_grad()
def _read(evaluator: Tap, images: Tensor) -> Tensor:
    """What the judge takes images for, (N,)."""
    acts = extract(evaluator, list(images.split(500)))
    return acts.logits.argmax(-1).cpu()
