"""Figures of a distillation: how far the teacher is believed, and what the student learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from penult.distill import GateSummary
from penult.report import plots
from penult.report.figures import legend, new_figure, style
from penult.report.page import Page
from penult.report.palette import LIGHT, SERIES

if TYPE_CHECKING:
    from torch import Tensor

    from penult.distill import GateSummary
    from penult.pair import GenerativePair

__all__ = ["accuracy", "confusion", "gate", "page"]

_BARS = 20  # classes in one figure
_CELLS = 12  # classes whose cells have room for numbers


def gate(summary: GateSummary, classes: int = _BARS, size: tuple[float, float] | None = None) -> Figure:
    """Draw how far the teacher is believed on each class, beside its accuracy there where labels are known.

    Args:
        summary: of a `penult.distill.Gate` that was fitted.
        classes: how many to draw; of more, those that are believed least.
        size: width and height in CSS pixels.

    Example:
        >>> from penult.distill import ClassTrust
        >>> trusts = ClassTrust("cat", 60, 0.9, 0.8), ClassTrust("dog", 40, 0.5, 0.4)
        >>> figure = gate(GateSummary(100, True, 0.74, 0.48, 0.8, 0.64, trusts))
    """
    shown = list(summary.classes)
    if len(shown) > classes:
        least = sorted(shown, key=lambda each: each.belief)[:classes]
        shown = [each for each in shown if each in least]
    values: dict[str, float | Mapping[str, float]] = {}
    for each in shown:
        values[each.name] = {"believed": each.belief}
        if each.accuracy is not None:
            values[each.name] = {"teacher's accuracy": each.accuracy, "believed": each.belief}
    figure = plots.bars(values, xlabel="share of its images", number=".0%", size=size)
    (axes,) = figure.axes
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    return figure


def confusion(matrix: Any, names: Sequence[str], size: tuple[float, float] | None = None) -> Figure:
    """Draw a confusion matrix, each row as shares of the images of that class.

    Args:
        matrix: (K, K) counts; a row for each class, a column for each answer.
        names: K names.
        size: width and height in CSS pixels.

    Raises:
        ValueError: the names don't fit the matrix.

    Example:
        >>> figure = confusion([[9, 1], [2, 8]], ["cat", "dog"])
    """
    counts = np.asarray(matrix, dtype=float)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names don't fit a confusion matrix {counts.shape}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(names) <= _CELLS
    every = -(-len(names) // 24)
    labels = [name if position % every == 0 else "" for position, name in enumerate(names)]
    return plots.heatmap(
        shares, labels, labels, annotate=few, number=".0%", xlabel="student's answer", ylabel="label", size=size
    )


def accuracy(
    history: Sequence[Mapping[str, float]],
    start: float | None = None,
    teacher: float | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw the student's accuracy on held-out images over the epochs; without it, the loss it was trained by.

    Args:
        history: of a `penult.distill.Distiller`.
        start: accuracy before the first epoch.
        teacher: that of the teacher on the same images.
        size: width and height in CSS pixels.

    Raises:
        ValueError: there is no epoch.

    Example:
        >>> figure = accuracy([{"epoch": 1, "val_accuracy": 0.6}, {"epoch": 2, "val_accuracy": 0.8}], 0.1, 0.7)
    """
    if not history:
        raise ValueError("there is no epoch to draw")
    size = size or (640, 320)
    if not all("val_accuracy" in each for each in history):
        losses = {"student": [each["train_loss"] for each in history]}
        return plots.curves([each["epoch"] for each in history], losses, "epoch", "loss", size=size)
    epochs = [each["epoch"] for each in history]
    values = [each["val_accuracy"] for each in history]
    if start is not None:
        epochs, values = [0, *epochs], [start, *values]
    figure, (axes,) = new_figure(size=size)
    with style():
        marker = "o" if len(epochs) <= 12 else ""
        handles = {"student": axes.plot(epochs, values, color=SERIES[0], marker=marker)[0]}
        if teacher is not None:
            handles["teacher"] = axes.axhline(teacher, color=LIGHT["muted"], linestyle=(0, (4, 3)))
        axes.set(xlabel="epoch", ylabel="accuracy")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        legend(figure, handles)
    return figure


def page(
    path: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    gate_summary: GateSummary | None,
    pair: GenerativePair,
    confusion_matrix: Tensor,
    names: list[str],
    file_name: str,
) -> None:
    """Write the page of a distillation."""
    judged, seen = facts["judged_by"], facts["gate"] is not None
    on = f"{judged} {'held-out' if facts['held_out'] else 'validation'} images" if judged else "the training images"
    html = Page(
        f"A student of {settings['teacher']}",
        subtitle="penult distill",
        lead="What the student learnt of its teacher, and how far the teacher was believed."
        if seen
        else "What the student learnt of its teacher's head alone: the teacher never saw an image.",
        footer="Made by `penult distill`. Every figure on this page was computed by that run.",
    )
    section = html.section("The student")
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
        accuracy(facts["history"], facts["start_accuracy"], facts["teacher_accuracy"]),
        caption=f"Accuracy on {on}." if judged else "Mean loss of each epoch.",
        alt=f"A curve over {facts['epochs']} epochs",
    )
    section.text(f"`{file_name}` is the state dict of `{facts['loads_into']}`.")
    if gate_summary is not None:
        section = html.section(
            "How far the teacher is believed",
            "Each target is what the teacher says of the image, as far as it is believed, and else what its head says "
            "of a typical activation of the class."
            + (
                "" if gate_summary.labelled else " Without labels, its accuracy is unknown, and belief rests on little."
            ),
        )
        right = {} if gate_summary.accuracy is None else {"teacher right": f"{gate_summary.accuracy:.1%}"}
        section.facts(
            right
            | {
                "trust": gate_summary.trust,
                "typical": f"{gate_summary.typical:.1%}",
                "believed": f"{gate_summary.belief:.1%}",
            }
        )
        section.figure(
            gate(gate_summary),
            caption="By class"
            + (
                "."
                if len(gate_summary.classes) <= _BARS
                else f"; those {_BARS} of {len(gate_summary.classes)} believed least."
            ),
            alt="Bars of the share of images on which the teacher is believed, class by class",
        )
    section = html.section("Which classes are confused")
    section.figure(
        confusion(confusion_matrix, names),
        caption=f"On {on}; rows sum to one."
        + ("" if judged else " Labels are the teacher's, so that the diagonal is agreement and not accuracy."),
        alt="A confusion matrix of the student",
    )
    section = html.section("What it was made of")
    section.code(str(pair.head.certificate or pair.head), label="Head of the teacher")
    section.text(f"Base of the pair: `{pair.base}`")
    section.table(
        ("setting", "value"), [(f"`{k}`", "–" if v is None else str(v)) for k, v in settings.items()], align="ll"
    )
    html.write(path)
