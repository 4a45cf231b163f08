"""What ``penult distill`` tells: a summary on the terminal, and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from penult.cli.console import RichReporter

if TYPE_CHECKING:
    from torch import Tensor

    from penult.distill import GateSummary
    from penult.pair import GenerativePair

__all__ = ["STUDENT_FILE", "page", "summary"]

STUDENT_FILE = "student.safetensors"
_SHOWN = 20  # classes in the table


def summary(facts: dict[str, Any], gate: GateSummary | None, reporter: RichReporter) -> None:
    """Tables of how far the teacher was believed, and of accuracies."""
    if gate is not None:
        least = sorted(gate.classes, key=lambda each: each.belief)[:_SHOWN]
        head, _, _ = str(gate).partition("\n")
        reporter.line(head + (f"; the {_SHOWN} classes believed least:" if len(gate.classes) > _SHOWN else ""))
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


def page(
    path: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    gate: GateSummary | None,
    pair: GenerativePair,
    confusion: Tensor,
    names: list[str],
) -> None:
    """Write the page of a distillation."""
    from penult.report import Page
    from penult.report import distill as figures

    judged, seen = facts["judged_by"], facts["gate"] is not None
    on = f"{judged} {'held-out' if facts['held_out'] else 'validation'} images" if judged else "the training images"
    page = Page(
        f"A student of {settings['teacher']}",
        subtitle="penult distill",
        lead="What the student learnt of its teacher, and how far the teacher was believed."
        if seen
        else "What the student learnt of its teacher's head alone: the teacher never saw an image.",
        footer="Made by `penult distill`. Every figure on this page was computed by that run.",
    )
    section = page.section("The student")
    numbers = {"accuracy": facts["accuracy"], "before training": facts["start_accuracy"]}
    numbers |= {"best epoch": facts["best_accuracy"], "teacher": facts["teacher_accuracy"]}
    shown = {name: f"{value:.1%}" for name, value in numbers.items() if value is not None}
    section.facts(shown | {"images": facts["images"], "epochs": facts["epochs"]})
    if not judged:
        section.text(
            "**These images have no labels.** The student was given those of its teacher, errors included: no gain "
            "under a domain shift can be promised, and no accuracy is known."
        )
    section.figure(
        figures.accuracy(facts["history"], facts["start_accuracy"], facts["teacher_accuracy"]),
        caption=f"Accuracy on {on}." if judged else "Mean loss of each epoch.",
        alt=f"A curve over {facts['epochs']} epochs",
    )
    section.text(f"`{STUDENT_FILE}` is the state dict of `{facts['loads_into']}`.")
    if gate is not None:
        section = page.section(
            "How far the teacher is believed",
            "Each target is what the teacher says of the image, as far as it is believed, and else what its head says "
            "of a typical activation of the class."
            + ("" if gate.labelled else " Without labels, its accuracy is unknown, and belief rests on little."),
        )
        right = {} if gate.accuracy is None else {"teacher right": f"{gate.accuracy:.1%}"}
        section.facts(right | {"trust": gate.trust, "typical": f"{gate.typical:.1%}", "believed": f"{gate.belief:.1%}"})
        section.figure(
            figures.gate(gate),
            caption="By class"
            + ("." if len(gate.classes) <= _SHOWN else f"; those {_SHOWN} of {len(gate.classes)} believed least."),
            alt="Bars of the share of images on which the teacher is believed, class by class",
        )
    section = page.section("Which classes are confused")
    section.figure(
        figures.confusion(confusion, names),
        caption=f"On {on}; rows sum to one."
        + ("" if judged else " Labels are the teacher's, so that the diagonal is agreement and not accuracy."),
        alt="A confusion matrix of the student",
    )
    section = page.section("What it was made of")
    section.code(str(pair.head.certificate or pair.head), label="Head of the teacher")
    section.text(f"Base of the pair: `{pair.base}`")
    section.table(
        ("setting", "value"), [(f"`{k}`", "–" if v is None else str(v)) for k, v in settings.items()], align="ll"
    )
    page.write(path)
