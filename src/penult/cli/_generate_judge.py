"""How good the images of ``penult generate`` are: who judges them, and what it finds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penult.activations import Tap, extract
from penult.cli._inputs import Share
from penult.cli._models import load_model, users_code
from penult.generate import ActivationGenerator, Judge
from penult.head import find_head
from penult.report.generate import Pictures, pictures_of, seeded

__all__ = ["JUDGED", "evaluator_of", "judged"]

JUDGED = 2000  # images of either side
_COMPARED = 10_000  # training images that they are compared with
_EVENLY = 200  # images of all classes together, where no real ones say how many of each


def evaluator_of(
    network: nn.Module,
    normalize: nn.Module | None,
    images: Tensor,
    classes: int,
    name: str | None,
    weights: Path | None,
    path: str | None,
    fold: bool,
) -> Tap:
    """The classifier, or an independent one, as a judge of images in [0, 1].

    Args:
        network: The classifier.
        normalize: What brings images to what both take.
        images: Some, on their device.
        classes: That both have to know.
        name: Of an independent one.
        weights: Of an independent one, if it was made without.
        path: Name of the classifier's head, if known.
        fold: Whether a norm layer before a head is folded into it.
    """
    own = name is None
    judge = network
    if name is not None:
        try:
            judge = load_model(name, weights).to(images.device)
        except ValueError as error:
            raise ValueError(str(error).replace("--weights", "--judge-weights").replace("MODEL", "--judge")) from error
    path = path if own else None
    if normalize is not None:
        judge, path = nn.Sequential(normalize, judge), None if path is None else f"1.{path}"
    with nullcontext() if own else users_code(f"--judge {name}, given images {tuple(images.shape)},"):
        head = find_head(judge, images, path=path, fold=fold)
    if head.num_classes != classes:
        raise ValueError(
            f"--judge {name} has {head.num_classes} classes, but the head has {classes}: it must know the same"
        )
    return Tap(judge, head)


def judged(
    generator: ActivationGenerator,
    evaluator: Tap,
    trained: Share,
    held: Share,
    confident: float | None,
    seed: int,
    loading: dict[str, Any],
) -> tuple[dict[str, Any], Pictures]:
    """Figures of quality with what they lack, and pictures for the page.

    Args:
        generator: What is judged.
        evaluator: The judge.
        trained: Images that it was trained on.
        held: Images to compare with.
        confident: What p(y|h) has to exceed of draws that are judged as well.
        seed: Of what is drawn and chosen.
        loading: Options of a loader.
    """
    k = generator.pair.head.num_classes
    real, labels = held.some(JUDGED, seed, loading)
    known, known_labels = trained.some(_COMPARED, seed, loading)
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
