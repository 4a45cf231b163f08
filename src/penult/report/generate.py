"""Figures, tables and the page of a generator of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from penult._checks import integer_labels
from penult.report import plots
from penult.report._pair_sections import origin
from penult.report.markup import shorten
from penult.report.page import Page

if TYPE_CHECKING:
    from penult.generate import ActivationGenerator
    from penult.pair import GenerativePair

__all__ = [
    "BIASED_JUDGE",
    "COLUMNS",
    "Pictures",
    "as_text",
    "class_rows",
    "contents",
    "cosines",
    "evenly",
    "image_rows",
    "losses",
    "metric_meanings",
    "metric_titles",
    "page",
    "pictures_of",
    "quality_columns",
    "quality_rows",
    "seeded",
]

# Images in a row.
COLUMNS = 8
# Classes on the page, rows of images between two classes, and rows of edited images.
_CLASSES, _INTERPOLATED, _EDITED = 20, 5, 6
# Letters of a name next to a row, and of each of two names.
_LETTERS, _SHORT_LETTERS = 24, 10
# Fractions of the way to another class in a row of edited images.
_STRENGTHS = 0.0, 0.25, 0.5, 0.75, 1.0

_CURVES = {
    "loss": "training", "val_loss": "held-out images", "discriminator_loss": "discriminator",
    "cosine": "training", "val_cosine": "held-out images",
}  # fmt: skip

# Title and meaning of each metric of `penult.generate.Quality`.
_METRICS = {
    "accuracy": ("accuracy", "fraction of these images that the evaluator assigns to the class they were made for"),
    "frechet": (
        "Fréchet",
        "Fréchet distance: difference in mean and covariance between the evaluator's features of these and of real "
        "images; 0 is perfect",
    ),
    "class_frechet": ("class Fréchet", "Fréchet distance within each class, averaged over classes"),
    "precision": ("precision", "fraction of these images that are close to real ones (fidelity)"),
    "recall": ("recall", "fraction of real images that are close to these (variety)"),
    "density": ("density", "like precision, but counts how many real images are close; 1 is perfect"),
    "coverage": ("coverage", "fraction of real images with one of these close by"),
    "cas": ("CAS", "classification accuracy score: accuracy on real images of a network trained on these images only"),
    "nearness": (
        "nearness",
        "probability that one of these images is closer to the training images than an unseen real image is; 0.5 is "
        "ideal, 1 means copies",
    ),
}

BIASED_JUDGE = (
    "The evaluator is the classifier whose activations the images were generated from, so accuracy and distances are "
    "biased in favour of the generator; --judge MODEL uses an independent evaluator"
)


@dataclass(frozen=True)
class _Texts:
    """Texts on the page that differ between kinds of generators."""

    code: str
    edited: str
    curves: str


_TEXTS = {
    "vae": _Texts(
        code="If activations contain much of the image, the code z has little effect: the variety of images comes from "
        "the activations.",
        edited="the image; its reconstruction; then the images with the activation moved by 25%, 50%, 75% and 100% of "
        "the way.",
        curves="Mean loss of each epoch.",
    ),
    "gan": _Texts(
        code="The code z stands for everything in the image that the activation does not determine.",
        edited="the image; another image of the same activation, with a random code; then images with that code and "
        "the activation moved by 25%, 50%, 75% and 100% of the way.",
        curves="Mean losses of each epoch. Adversarial losses show that neither network wins, not how good the images "
        "are.",
    ),
}


# --- figures ------------------------------------------------------------------------------------------------


def image_rows(images: Any, names: Sequence[str], cell: float = 56) -> Figure:
    """Draw images in named rows, without interpolation between pixels.

    Args:
        images: Images (R, N, C, H, W) in [0, 1], C = 1 or 3.
        names: R names; long ones are cut.
        cell: Width of an image in CSS pixels.

    Raises:
        ValueError: The number of names differs from the number of rows, or the images have another shape.

    Example:
        >>> import torch
        >>> figure = image_rows(torch.rand(2, 5, 1, 8, 8), ["cat", "dog"])
    """
    shape = tuple(images.shape)
    if len(shape) != 5 or shape[2] not in (1, 3):
        raise ValueError(f"image_rows needs images of shape (R, N, 1, H, W) or (R, N, 3, H, W), not {shape}")
    if len(names) != shape[0]:
        raise ValueError(f"there are {len(names)} names for {shape[0]} rows of images; expected one for each row")
    flat = images.reshape(-1, *shape[2:])
    pixels = flat[:, 0] if shape[2] == 1 else flat.permute(0, 2, 3, 1)
    labels = [shorten(name, _LETTERS) for name in names]
    return plots.image_grid(pixels, columns=shape[1], row_labels=labels, cell=cell)


def losses(history: Sequence[Mapping[str, float]], size: tuple[float, float] | None = None) -> Figure:
    """Draw all losses of a generator over the epochs, including those of a discriminator.

    Args:
        history: History of a generator of `penult.generate`.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The history has no epoch with a loss.

    Example:
        >>> figure = losses([{"epoch": 1, "loss": 30.0, "val_loss": 28.5}, {"epoch": 2, "loss": 25.0}])
    """
    adversarial = any("discriminator_loss" in record for record in history)
    return _over_epochs(history, "loss", _CURVES | ({"loss": "generator"} if adversarial else {}), size)


def cosines(history: Sequence[Mapping[str, float]], size: tuple[float, float] | None = None) -> Figure:
    """Draw the cosine between activations and those of the images generated from them, over the epochs.

    Args:
        history: History of a generator of `penult.generate`.
        size: Width and height in CSS pixels.

    Raises:
        ValueError: The history has no epoch with a cosine.

    Example:
        >>> figure = cosines([{"epoch": 1, "cosine": 0.3, "val_cosine": 0.2}, {"epoch": 2, "cosine": 0.7}])
    """
    return _over_epochs(history, "cosine", _CURVES, size)


def _over_epochs(
    history: Sequence[Mapping[str, float]], kind: str, titles: Mapping[str, str], size: tuple[float, float] | None
) -> Figure:
    """Draw all values whose names end with `kind`; the value with exactly this name comes first."""
    recorded = {name for record in history for name in record if name.endswith(kind)}
    names = sorted(recorded, key=lambda name: (name != kind, name))
    if not names:
        raise ValueError(f"history has no epoch with a {kind}; expected at least one")
    curves = {titles.get(name, name): [record.get(name, float("nan")) for record in history] for name in names}
    figure = plots.curves([record["epoch"] for record in history], curves, "epoch", kind, size=size or (640, 320))
    (axes,) = figure.axes
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(history) <= 12:
        for line in axes.get_lines():
            line.set_marker("o")
    return figure


# --- pictures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """Images (R, N, C, H, W) in [0, 1] for the page.

    Attributes:
        classes: Classes of the rows of `samples` and `confident`.
        samples: Images of each class.
        confident: Images of each class from confident samples only, if these were requested.
        pairs: Classes that the rows of `ways` connect.
        ways: Images between two classes.
        goals: Own and other class of each row of `edited`.
        edited: A real image, followed by images on its way to the other class.
    """

    classes: list[int]
    samples: Tensor
    confident: Tensor | None
    pairs: list[tuple[int, int]]
    ways: Tensor
    goals: list[tuple[int, int]]
    edited: Tensor


def evenly(classes: int, most: int) -> list[int]:
    """Return at most `most` classes, evenly spaced.

    Example:
        >>> evenly(10, 4)
        [0, 3, 6, 9]
    """
    chosen: list[int] = (
        torch.linspace(0, classes - 1, min(classes, most), dtype=torch.float64, device="cpu").round().long().tolist()
    )
    return chosen


def seeded(generator: ActivationGenerator, seed: int) -> torch.Generator:
    """Return a new random generator on the device of the pair."""
    return torch.Generator(generator.pair.head.weight.device).manual_seed(seed)


def class_rows(generator: ActivationGenerator, classes: list[int], seed: int, confident: float | None = None) -> Tensor:
    """Return a row of images for each class, (R, 8, C, H, W); the same seed gives the same codes and activations."""
    y = torch.tensor(classes, device="cpu").repeat_interleave(COLUMNS)
    images: Tensor = generator.generate(y, confident, generator=seeded(generator, seed)).float().cpu()
    return images.reshape(-1, COLUMNS, *images.shape[1:])


def pictures_of(
    generator: ActivationGenerator, real: Tensor, labels: Tensor, seed: int, confident: float | None
) -> Pictures:
    """Generate the images for the page.

    Args:
        generator: The generator.
        real: Real images (N, C, H, W), some of which are edited.
        labels: Labels (N,) of the real images.
        seed: Seed of the samples.
        confident: Smallest p(y|h) of confident samples, or None for no such samples.
    """
    num_classes, device = generator.pair.head.num_classes, generator.pair.head.weight.device
    labels = integer_labels(labels, real.shape[:1], num_classes)
    classes = evenly(num_classes, _CLASSES)
    pairs = list(zip(classes[::2], classes[1::2], strict=False))[:_INTERPOLATED]
    first, last = torch.tensor(pairs, device="cpu").T
    ways = generator.interpolate(first, last, COLUMNS, confident, seeded(generator, seed))
    rows = [int((labels == y).nonzero()[0]) for y in labels.unique().tolist()][:_EDITED]
    goals = (labels[rows] + 1) % num_classes
    edited = generator.edit(
        real[rows].to(device),
        goals.to(device),
        torch.tensor(_STRENGTHS, device="cpu"),
        confident,
        seeded(generator, seed),
    )
    return Pictures(
        classes=classes,
        samples=class_rows(generator, classes, seed),
        confident=None if confident is None else class_rows(generator, classes, seed, confident),
        pairs=pairs,
        ways=ways.float().cpu(),
        goals=list(zip(labels[rows].tolist(), goals.tolist(), strict=True)),
        edited=torch.cat([real[rows].unsqueeze(1), edited.float().cpu()], 1),
    )


# --- tables -------------------------------------------------------------------------------------------------


def metric_titles() -> dict[str, str]:
    """Return the column title of each metric of `penult.generate.Quality`, by its name there."""
    return {name: title for name, (title, _) in _METRICS.items()}


def metric_meanings(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the column title and the meaning of some metrics of `penult.generate.Quality`."""
    return [_METRICS[name] for name in names]


def quality_columns(facts: dict[str, Any]) -> list[str]:
    """Return the column titles of all metrics that were measured."""
    return [_METRICS[name][0] for name in _measured(facts)]


def quality_rows(facts: dict[str, Any]) -> list[list[Any]]:
    """Return a row for each kind of images, with its title, the number of images and the metrics."""
    titles = {"generated": "generated", "confident": f"with p(y|h) > {facts['confident']}", "real": "real"}
    names = _measured(facts)
    return [[titles[kind], row["count"], *(row.get(name) for name in names)] for kind, row in facts["metrics"].items()]


def _measured(facts: dict[str, Any]) -> list[str]:
    return [name for name in _METRICS if any(row.get(name) is not None for row in facts["metrics"].values())]


def as_text(value: Any) -> str:
    """Format a value of `quality_rows` for a terminal."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


# --- page ---------------------------------------------------------------------------------------------------


def contents(facts: dict[str, Any], file_name: str) -> str:
    """Return a sentence on the activations of real images in the file of a generator."""
    stored, replaced = facts["stored_activations"], facts["replaced_activations"]
    if stored:
        return (
            f"{file_name} stores {stored} activations of real images; without --store-activations it would store a "
            "mixture fitted to them"
        )
    if replaced:
        return (
            f"{file_name} stores a mixture of {facts['floats']} numbers instead of {replaced} activations of real "
            "images; --store-activations stores the activations"
        )
    return f"{file_name} stores no activations of real images"


def page(
    path: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    pair: GenerativePair,
    pictures: Pictures,
    names: list[str],
    file_name: str,
) -> None:
    """Write the page of a generator that ``penult generate`` trained.

    Args:
        path: Path of the page.
        facts: Results of the training, as in its ``log.json``.
        settings: Settings of the training by name.
        pair: The pair that the generator was trained with.
        pictures: Images for the page.
        names: K names of classes.
        file_name: Name of the generator's file.
    """
    html = Page(
        f"Images from the activations of {settings['model']}",
        subtitle="penult generate",
        lead="A generator makes images of each class from samples of the activations of a classifier. This page shows "
        "such images and measures how good they are.",
        footer="Made by `penult generate`. All numbers on this page were computed by that run.",
    )
    texts = _TEXTS[facts["kind"]]
    _samples_section(html, facts, pictures, names, texts)
    _quality_section(html, facts)
    section = html.section(
        "Between classes", "Each row moves in a straight line from an activation of one class to one of another."
    )
    section.figure(
        image_rows(pictures.ways, _class_pairs(names, pictures.pairs)),
        caption="All images of a row have the same code.",
        alt="Rows of images that change from one class to another.",
    )
    section = html.section(
        "Editing", f"The activations of {_held_out(facts)} images are moved towards a sample of another class."
    )
    section.figure(
        image_rows(pictures.edited, _class_pairs(names, pictures.goals)),
        caption=f"From left to right: {texts.edited}",
        alt="Rows with a real image, an image made from its activation, and images on the way to another class.",
    )
    _training_section(html, facts, texts)
    origin(html, pair, "Head of the classifier", settings, f"{contents(facts, f'`{file_name}`')}.")
    html.write(path)


def _held_out(facts: Mapping[str, Any]) -> str:
    return "held-out" if facts["held_out"] else "validation"


def _class_pairs(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Return row labels for pairs of classes."""
    short = [shorten(name, _SHORT_LETTERS) for name in names]
    return [f"{short[first]} → {short[last]}" for first, last in pairs]


def _samples_section(
    html: Page, facts: Mapping[str, Any], pictures: Pictures, names: Sequence[str], texts: _Texts
) -> None:
    section = html.section("Samples")
    accuracies = {kind: facts["metrics"].get(kind, {}).get("accuracy") for kind in ("generated", "confident")}
    shown = {f"accuracy of {kind} images": f"{value:.1%}" for kind, value in accuracies.items() if value is not None}
    section.facts(shown | {"training images": facts["images"], "epochs": facts["epochs"]})
    rows = [names[y] for y in pictures.classes]
    few = "" if len(rows) == len(names) else f" {len(rows)} of {len(names)} classes are shown."
    section.figure(
        image_rows(pictures.samples, rows),
        caption=f"Images from samples h ~ p(h|y), with one class in each row.{few}",
        alt=f"Rows of generated images of {len(rows)} classes.",
    )
    if pictures.confident is not None:
        section.figure(
            image_rows(pictures.confident, rows),
            caption=f"Images from samples with p(y|h) > {facts['confident']}: clearer, but less varied.",
            alt=f"Rows of generated images of {len(rows)} classes, from confident samples.",
        )
    section.text(
        "An image made for class y shows class y as reliably as the sample h ~ p(h|y) belongs to y, that is, as "
        "reliably as the classifier itself. `--confident` keeps the clear cases at the price of variety. "
        f"{texts.code}"
    )


def _quality_section(html: Page, facts: dict[str, Any]) -> None:
    kind = _held_out(facts)
    section = html.section("How good the images are", f"Compared with {facts['judged_by']} {kind} images.")
    if facts["labels"] == "judge":
        section.text(f"**The {kind} images have no labels**; the evaluator's predictions are used instead.")
    section.text(f"**{BIASED_JUDGE}.**" if facts["judge"] is None else f"The evaluator is `{facts['judge']}`.")
    for reason in facts["skipped"]:
        section.text(reason[0].upper() + reason[1:] + ".")
    section.table(("", "images", *quality_columns(facts)), quality_rows(facts))
    section.table(
        ("column", "meaning"),
        metric_meanings(_measured(facts)),
        caption="The row of real images shows what is attainable. The Fréchet distance alone can mislead, because it "
        "compares only mean and covariance and depends on the number of images; read all columns.",
    )


def _training_section(html: Page, facts: Mapping[str, Any], texts: _Texts) -> None:
    section = html.section("Training")
    section.figure(
        losses(facts["history"]),
        caption=f"{texts.curves} The folder `samples` has images from several epochs.",
        alt=f"Curves of the loss over {facts['epochs']} epochs.",
    )
    if any(name.endswith("cosine") for record in facts["history"] for name in record):
        section.figure(
            cosines(facts["history"]),
            caption="Mean cosine of the activations of generated images with the activations that they were generated "
            "from, both standardized; 1 is perfect.",
            alt=f"Curves of the cosine over {facts['epochs']} epochs.",
        )
