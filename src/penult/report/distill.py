"""Figures and the page of a distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from penult._checks import class_names_tuple
from penult.distill import GateSummary
from penult.report import plots
from penult.report._pair_sections import origin
from penult.report.figures import legend, new_figure, style
from penult.report.page import Page
from penult.report.palette import LIGHT, SERIES

if TYPE_CHECKING:
    from torch import Tensor

    from penult.pair import GenerativePair

__all__ = ["accuracy", "confusion", "gate", "gate_caption", "page"]

# Classes in one figure.
_BARS = 20
# Classes up to which the cells of a heat map have room for numbers.
_CELLS = 12
# Labels along an axis of a confusion matrix.
_LABELS = 24


def gate(summary: GateSummary, classes: int = _BARS, size: tuple[float, float] | None = None) -> Figure:
    """Draw the belief in the teacher on each class, and its accuracy there if labels are known.

    Args:
        summary: Summary of a fitted `penult.distill.Gate`.
        classes: Maximum number of classes; if there are more, those with the lowest belief are drawn.
        size: Width and height in CSS pixels.

    Example:
        >>> from penult.distill import ClassTrust
        >>> trusts = ClassTrust("cat", 60, 0.9, 0.8), ClassTrust("dog", 40, 0.5, 0.4)
        >>> figure = gate(GateSummary(100, True, 0.74, 0.48, 0.8, 0.64, trusts))
    """
    shown = list(summary.classes)
    if len(shown) > classes:
        lowest = sorted(shown, key=lambda trust: trust.belief)[:classes]
        shown = [trust for trust in shown if trust in lowest]
    values: dict[str, float | Mapping[str, float]] = {}
    for trust in shown:
        accuracy = {} if trust.accuracy is None else {"teacher's accuracy": trust.accuracy}
        values[trust.name] = accuracy | {"belief": trust.belief}
    figure = plots.bars(values, xlabel="fraction of the images of the class", number=".0%", size=size)
    (axes,) = figure.axes
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    return figure


def gate_caption(summary: GateSummary, classes: int = _BARS) -> str:
    """Return the caption of `gate`.

    Example:
        >>> gate_caption(GateSummary(100, True, 0.74, 0.48, 0.8, 0.64, ()))
        'Mean belief in the teacher by class.'
    """
    if len(summary.classes) <= classes:
        return "Mean belief in the teacher by class."
    return f"Mean belief in the teacher, for the {classes} of {len(summary.classes)} classes where it is lowest."


def confusion(matrix: Any, names: Sequence[str], size: tuple[float, float] | None = None) -> Figure:
    """Draw a confusion matrix, with each row as fractions of the images of that class.

    Args:
        matrix: Counts (K, K), with a row for each label and a column for each prediction.
        names: K names of classes, or a mapping of class numbers to names.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The number of names differs from the size of the matrix.

    Example:
        >>> figure = confusion([[9, 1], [2, 8]], ["cat", "dog"])
    """
    counts = np.asarray(matrix, dtype=float)
    names = class_names_tuple(names, name="names")
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names don't fit a confusion matrix {counts.shape}; expected one for each row")
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    step = -(-len(names) // _LABELS)
    labels = [name if position % step == 0 else "" for position, name in enumerate(names)]
    return plots.heatmap(
        fractions,
        labels,
        labels,
        annotate=len(names) <= _CELLS,
        number=".0%",
        xlabel="prediction of the student",
        ylabel="label",
        size=size,
    )


def accuracy(
    history: Sequence[Mapping[str, float]],
    start: float | None = None,
    teacher: float | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw the student's accuracy on held-out images over the epochs, or its training loss if that is not known.

    Args:
        history: History of a `penult.distill.Distiller`.
        start: Accuracy before the first epoch.
        teacher: Accuracy of the teacher on the same images.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The history is empty.

    Example:
        >>> figure = accuracy([{"epoch": 1, "val_accuracy": 0.6}, {"epoch": 2, "val_accuracy": 0.8}], 0.1, 0.7)
    """
    if not history:
        raise ValueError("history has no epoch; expected at least one")
    size = size or (640, 320)
    epochs = [record["epoch"] for record in history]
    if not all("val_accuracy" in record for record in history):
        losses = {"student": [record["train_loss"] for record in history]}
        return plots.curves(epochs, losses, "epoch", "loss", size=size)
    values = [record["val_accuracy"] for record in history]
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


# --- page ---------------------------------------------------------------------------------------------------


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
    """Write the page of a student that ``penult distill`` trained.

    Args:
        path: Path of the page.
        facts: Results of the training, as in its ``log.json``.
        settings: Settings of the training by name.
        gate_summary: Summary of the gate, or None if the teacher was only a head.
        pair: The teacher's pair.
        confusion_matrix: Counts (K, K) of the student's predictions.
        names: K names of classes.
        file_name: Name of the student's file.
    """
    html = Page(
        f"A student of {settings['teacher']}",
        subtitle="penult distill",
        lead="This page shows what the student learned from its teacher, and how far the teacher was believed."
        if facts["gate"] is not None
        else "This page shows what the student learned from the head of its teacher alone; the teacher never saw an "
        "image.",
        footer="Made by `penult distill`. All numbers on this page were computed by that run.",
    )
    _student_section(html, facts, file_name)
    if gate_summary is not None:
        _gate_section(html, gate_summary)
    section = html.section("Which classes are confused")
    pseudo = "" if facts["judged_by"] else " Labels are those of the teacher, so the diagonal shows agreement with it."
    section.figure(
        confusion(confusion_matrix, names),
        caption=f"Predictions on {_images_in_words(facts)}; each row sums to one.{pseudo}",
        alt="Confusion matrix of the student.",
    )
    origin(html, pair, "Head of the teacher", settings)
    html.write(path)


def _images_in_words(facts: Mapping[str, Any]) -> str:
    """Return a description of the images that the student was evaluated on."""
    if not facts["judged_by"]:
        return "the training images"
    return f"{facts['judged_by']} {'held-out' if facts['held_out'] else 'validation'} images"


def _student_section(html: Page, facts: Mapping[str, Any], file_name: str) -> None:
    section = html.section("The student")
    accuracies = {
        "accuracy": facts["accuracy"],
        "accuracy before training": facts["start_accuracy"],
        "accuracy at the best epoch": facts["best_accuracy"],
        "accuracy of the teacher": facts["teacher_accuracy"],
    }
    shown = {name: f"{value:.1%}" for name, value in accuracies.items() if value is not None}
    section.facts(shown | {"training images": facts["images"], "epochs": facts["epochs"]})
    if not facts["judged_by"]:
        section.text(
            "**These images have no labels.** The student was trained on the predictions of its teacher, including "
            "their errors: no gain under a domain shift can be promised, and no accuracy is known."
        )
    section.figure(
        accuracy(facts["history"], facts["start_accuracy"], facts["teacher_accuracy"]),
        caption=f"Accuracy on {_images_in_words(facts)}." if facts["judged_by"] else "Mean loss of each epoch.",
        alt=f"Curve of the student over {facts['epochs']} epochs.",
    )
    section.text(f"`{file_name}` is the state dict of `{facts['loads_into']}`.")


def _gate_section(html: Page, summary: GateSummary) -> None:
    unlabelled = " There are no labels, so the accuracy of the teacher is unknown and belief is a rough estimate."
    section = html.section(
        "How far the teacher is believed",
        "For each image, a gate estimates a belief between 0 and 1 in the teacher. The target of the student is a "
        "mixture, weighted by this belief, of the teacher's output for the image and the output of the teacher's head "
        "for a typical activation of the class." + ("" if summary.labelled else unlabelled),
    )
    accuracy = {} if summary.accuracy is None else {"accuracy of the teacher": f"{summary.accuracy:.1%}"}
    section.facts(
        accuracy
        | {
            "trust": summary.trust,
            "typical activations": f"{summary.typical:.1%}",
            "mean belief": f"{summary.belief:.1%}",
        }
    )
    section.figure(
        gate(summary),
        caption=gate_caption(summary),
        alt="Bars of the mean belief in the teacher for each class.",
    )
