"""What ``penult distill`` does beside training: share out images, ask the teacher, export."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader

from penult.cli._console import RichReporter
from penult.cli._inputs import ImageSubset, guessing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from penult.activations import Tap
    from penult.distill import Distiller, GateSummary, TargetDataset
    from penult.pair import GenerativePair

    Kind = Literal["soft", "activation", "hinted"]

__all__ = ["STUDENT_FILE", "Lesson", "accuracy_of", "confusion_of", "lesson_of", "save", "summary"]


@dataclass(frozen=True)
class Lesson:
    """What the teacher has to say."""

    data: TargetDataset
    gate: GateSummary | None
    teacher_accuracy: float | None


def lesson_of(
    pair: GenerativePair,
    tap: Tap | None,
    training: ImageSubset,
    validation: ImageSubset | None,
    kind: Kind,
    temperature: float,
    names: list[str],
    loading: dict[str, Any],
    reporter: RichReporter,
) -> Lesson:
    """Targets of all images; a network sees them, and is then sent away."""
    from penult._checks import is_chance_level
    from penult.activations import extract
    from penult.distill import _SHARPNESS, Gate, TargetDataset, pseudo_labels, targets

    if tap is None:
        if kind == "hinted":
            raise ValueError("hints are what a teacher's network makes of the images: give package.module:factory")
        made = targets(pair, training.labels, kind, temperature=temperature)
        return Lesson(TargetDataset(training.images, made), None, None)
    reporter.line(f"running the teacher over {len(training)} images, once")
    acts = extract(tap, DataLoader(training.images, **loading), progress=True)
    gate = Gate.fit(pair, acts, sharpness=_SHARPNESS[kind], class_names=names)
    labels, believed = training.labels, gate.summary
    assert believed is not None
    if believed.accuracy is not None and is_chance_level(believed.accuracy, len(acts), pair.head.num_classes):
        warnings.warn(
            guessing("the teacher", believed.accuracy, pair.head.num_classes),
            UserWarning,
            stacklevel=2,
        )
    if labels is None:
        warnings.warn(
            "the images have no labels, so they get those that the teacher gives them. Where it is wrong the student "
            "learns its errors, and nothing says where that is: no gain under a domain shift can be promised",
            UserWarning,
            stacklevel=2,
        )
        labels = pseudo_labels(pair, acts)
    made = targets(pair, labels, kind, temperature=temperature, activations=acts, gate=gate)
    accuracy = None
    if validation is not None:
        seen = extract(tap, DataLoader(validation.images, **loading))
        assert seen.labels is not None
        accuracy = float((seen.logits.argmax(-1) == seen.labels).double().mean())
    tap.cpu()
    return Lesson(TargetDataset(training.images, made, labels), gate.summary, accuracy)


def confusion_of(distiller: Distiller, loader: Any, device: torch.device) -> Tensor:
    """Labels against the student's answers (K, K)."""
    import torch

    distiller.eval().to(device)
    counts = torch.tensor(0)
    with torch.no_grad():
        for images, labels, *_ in loader:
            logits = distiller(images.to(device)).cpu()
            k = logits.shape[1]
            counts = counts + (labels * k + logits.argmax(-1)).bincount(minlength=k * k).view(k, k)
    distiller.train().cpu()
    return counts


def accuracy_of(confusion: Tensor) -> float:
    """Share of the diagonal."""
    return float(confusion.diagonal().sum() / confusion.sum())


def save(distiller: Distiller, student: str, path: Path) -> str:
    """Write the exported student's state dict, and say what takes it."""
    from penult import io
    from penult.distill import ActivationLoss

    plain = distiller.export()
    state = plain.state_dict()
    with io.aside(path) as temporary:
        io.save_file(state, temporary, metadata={"format": "pt"})
    certificate = distiller.certificate
    if set(state) == set(distiller.student.state_dict()):
        return f"{student}, as it is"
    shape = (
        f"{distiller.loss.in_features}, {distiller.loss.num_classes}"
        if isinstance(distiller.loss, ActivationLoss)
        else ""
    )
    if certificate is None:
        return f"torch.nn.Sequential(student, torch.nn.Linear({shape})) with the student of {student}"
    return f"{student}, with torch.nn.Linear({shape}) at {certificate.path}"


# --- What ``penult distill`` tells: a summary on the terminal, and a page -----------------------------------


STUDENT_FILE = "student.safetensors"
_TABLE_ROWS = 20  # classes in the table


def summary(facts: dict[str, Any], gate: GateSummary | None, reporter: RichReporter) -> None:
    """Tables of how far the teacher was believed, and of accuracies."""
    if gate is not None:
        least = sorted(gate.classes, key=lambda each: each.belief)[:_TABLE_ROWS]
        head, _, _ = str(gate).partition("\n")
        reporter.line(
            head + (f"; the {_TABLE_ROWS} classes believed least:" if len(gate.classes) > _TABLE_ROWS else "")
        )
        rows = [
            (each.name, each.rows, "-" if each.accuracy is None else f"{each.accuracy:.1%}", f"{each.belief:.1%}")
            for each in gate.classes
            if each in least
        ]
        reporter.table(("class", "images", "teacher right", "believed"), rows)
    if facts["accuracy"] is not None:
        held = "held-out" if facts["held_out"] else "validation"
        accuracies = [
            ("student at the start", f"{facts['start_accuracy']:.1%}"),
            (f"student at its best, epoch {facts['best_epoch']}", f"{facts['best_accuracy']:.1%}"),
            ("student at the end", f"{facts['accuracy']:.1%}"),
        ]
        if facts["teacher_accuracy"] is not None:
            accuracies.append(("teacher", f"{facts['teacher_accuracy']:.1%}"))
        reporter.table((f"on {facts['judged_by']} {held} images", "accuracy"), accuracies)
