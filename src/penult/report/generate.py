"""Figures of a generator: rows of the images that it makes, and what it learnt by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from penult.report import plots
from penult.report.page import Page

if TYPE_CHECKING:
    from penult.generate import ActivationGenerator
    from penult.pair import GenerativePair

__all__ = [
    "COLUMNS",
    "Pictures",
    "class_rows",
    "contents",
    "cosines",
    "evenly",
    "image_rows",
    "losses",
    "page",
    "pictures_of",
    "seeded",
]

_LETTERS = 24  # of a name beside a row
_NAMES = {
    "loss": "training", "val_loss": "held-out images", "discriminator_loss": "discriminator",
    "cosine": "training", "val_cosine": "held-out images",
}  # fmt: skip


def image_rows(images: Any, names: Sequence[str], cell: float = 56) -> Figure:
    """Draw images in named rows, their pixels as they are.

    Args:
        images: (R, N, C, H, W) in [0, 1], C = 1 or 3.
        names: R names, which are cut where they are long.
        cell: the width of an image in CSS pixels.

    Raises:
        ValueError: the names don't fit the images, or these are neither grey nor in colour.

    Example:
        >>> import torch
        >>> figure = image_rows(torch.rand(2, 5, 1, 8, 8), ["cat", "dog"])
    """
    shape = tuple(images.shape)
    if len(shape) != 5 or shape[2] not in (1, 3):
        raise ValueError(f"image_rows needs images of shape (R, N, 1, H, W) or (R, N, 3, H, W), not {shape}")
    if len(names) != shape[0]:
        raise ValueError(f"{len(names)} names don't fit {shape[0]} rows of images")
    flat = images.reshape(-1, *shape[2:])
    pixels = flat[:, 0] if shape[2] == 1 else flat.permute(0, 2, 3, 1)
    return plots.image_grid(pixels, columns=shape[1], row_labels=[_short(name) for name in names], cell=cell)


def losses(history: Sequence[Mapping[str, float]], size: tuple[float, float] | None = None) -> Figure:
    """Draw all losses of a generator over the epochs, those of its discriminator too if it has one.

    Args:
        history: of a generator of `penult.generate`.
        size: width and height in CSS pixels.

    Raises:
        ValueError: there is no epoch, or no loss in it.

    Example:
        >>> figure = losses([{"epoch": 1, "loss": 30.0, "val_loss": 28.5}, {"epoch": 2, "loss": 25.0}])
    """
    adversarial = any("discriminator_loss" in each for each in history)
    return _over_epochs(history, "loss", _NAMES | ({"loss": "generator"} if adversarial else {}), size)


def cosines(history: Sequence[Mapping[str, float]], size: tuple[float, float] | None = None) -> Figure:
    """Draw over the epochs how like what they were made of images are to the classifier.

    Args:
        history: of a generator of `penult.generate`.
        size: width and height in CSS pixels.

    Raises:
        ValueError: there is no epoch, or no cosine in it.

    Example:
        >>> figure = cosines([{"epoch": 1, "cosine": 0.3, "val_cosine": 0.2}, {"epoch": 2, "cosine": 0.7}])
    """
    return _over_epochs(history, "cosine", _NAMES, size)


def _over_epochs(
    history: Sequence[Mapping[str, float]], what: str, titles: Mapping[str, str], size: tuple[float, float] | None
) -> Figure:
    """Draw all figures whose names end so, the one of that very name first."""
    found = {name for each in history for name in each if name.endswith(what)}
    names = sorted(found, key=lambda name: (name != what, name))
    if not names:
        raise ValueError(f"there is no epoch with a {what} to draw")
    curves = {titles.get(name, name): [each.get(name, float("nan")) for each in history] for name in names}
    figure = plots.curves([each["epoch"] for each in history], curves, "epoch", what, size=size or (640, 320))
    (axes,) = figure.axes
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(history) <= 12:
        for line in axes.get_lines():
            line.set_marker("o")
    return figure


def _short(name: str) -> str:
    """A name that fits beside a row."""
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"


COLUMNS = 8  # images in a row
_ROWS = 20  # classes on the page
_WAYS = 5  # rows of the page
_EDITED = 6
_SHORT_NAME = 10  # of a class's name, where two stand beside a row
_STRENGTHS = 0.0, 0.25, 0.5, 0.75, 1.0
_METRICS = {  # of a Quality: what a column is called, and what it means
    "accuracy": ("accuracy", "share of images that the judge puts into the class that they were made for"),
    "frechet": (
        "Fréchet",
        "distance between mean and covariance of the judge's features of these and of real images; 0 is perfect",
    ),
    "class_frechet": ("class Fréchet", "the same within each class, averaged over classes"),
    "precision": ("precision", "share of these images that lie among real ones: fidelity"),
    "recall": ("recall", "share of real images that lie among these: variety"),
    "density": ("density", "like precision, but it counts how many real images are near; 1 is perfect"),
    "coverage": ("coverage", "share of real images with one of these near by"),
    "cas": ("CAS", "accuracy on real images of a small network that saw these alone"),
    "nearness": (
        "nearness",
        "probability that one of these is nearer to the training images than a real, unseen one is; 0.5 is ideal, 1 "
        "means copies",
    ),
}
BIASED_JUDGE = (
    "The judge is the classifier itself, of whose activations the images were made: accuracy and distances are biased "
    "in favour of the generator. --judge gives an independent one"
)
_LIMITS = (
    "Images are of class y as surely as draws of p(h|y) are, which is no surer than the classifier itself; "
    "`--confident` keeps the clear cases and loses variety. {code} The Fréchet distance alone misleads, since it knows "
    "mean and covariance only and depends on the number of images: read all columns, against the real row."
)


@dataclass(frozen=True)
class _Words:
    """What is true of one kind of generators alone."""

    code: str
    edited: str
    curves: str


_WORDS = {
    "vae": _Words(
        "Where activations are rich, the code z is hardly used: what varies is the activation.",
        "the image; as it comes back; moved 25%, 50%, 75% and all of the way.",
        "Mean loss of each epoch.",
    ),
    "gan": _Words(
        "The code z is for what the activation leaves open.",
        "the image; another image of the same activation, of a random code; with that code moved 25%, 50%, 75% and all "
        "of the way.",
        "Mean losses of each epoch: those of adversaries say that neither wins, not how good images are.",
    ),
}


@dataclass(frozen=True)
class Pictures:
    """Images (R, N, C, H, W) for the page, in [0, 1]."""

    classes: list[int]
    samples: Tensor
    confident: Tensor | None
    pairs: list[tuple[int, int]]
    ways: Tensor
    goals: list[tuple[int, int]]
    edited: Tensor


def evenly(classes: int, most: int) -> list[int]:
    """Classes from all over, as many as there are or `most`."""
    places: list[int] = torch.linspace(0, classes - 1, min(classes, most), dtype=torch.float64).round().long().tolist()
    return places


def seeded(generator: ActivationGenerator, seed: int) -> torch.Generator:
    """A source of randomness of its own, where the generator's pair is."""
    return torch.Generator(generator.pair.head.weight.device).manual_seed(seed)


def class_rows(generator: ActivationGenerator, classes: list[int], seed: int, confident: float | None = None) -> Tensor:
    """A row of images for each class, (R, 8, C, H, W); the same codes and activations for the same seed."""
    y = torch.tensor(classes).repeat_interleave(COLUMNS)
    images: Tensor = generator.generate(y, confident, generator=seeded(generator, seed)).float().cpu()
    return images.reshape(-1, COLUMNS, *images.shape[1:])


def pictures_of(
    generator: ActivationGenerator, real: Tensor, labels: Tensor, seed: int, confident: float | None
) -> Pictures:
    """Samples, ways between classes, and real images on their way to another class."""
    k, device = generator.pair.head.num_classes, generator.pair.head.weight.device
    classes = evenly(k, _ROWS)
    pairs = list(zip(classes[::2], classes[1::2], strict=False))[:_WAYS]
    first, last = torch.tensor(pairs).T
    ways = generator.interpolate(first, last, COLUMNS, confident, seeded(generator, seed))
    places = [int((labels == y).nonzero()[0]) for y in labels.unique().tolist()][:_EDITED]
    goals = (labels[places] + 1) % k
    edited = generator.edit(
        real[places].to(device), goals.to(device), torch.tensor(_STRENGTHS), confident, seeded(generator, seed)
    )
    return Pictures(
        classes=classes,
        samples=class_rows(generator, classes, seed),
        confident=None if confident is None else class_rows(generator, classes, seed, confident),
        pairs=pairs,
        ways=ways.float().cpu(),
        goals=list(zip(labels[places].tolist(), goals.tolist(), strict=True)),
        edited=torch.cat([real[places].unsqueeze(1), edited.float().cpu()], 1),
    )


def contents(facts: dict[str, Any], file_name: str) -> str:
    """What the file holds of real images."""
    stored, replaced = facts["stored_activations"], facts["replaced_activations"]
    if stored:
        return f"{file_name} stores {stored} real activations; without --store-activations a mixture stands for them"
    if replaced:
        return (
            f"{file_name} holds a mixture of {facts['floats']} floats in place of {replaced} real activations; "
            "--store-activations keeps them"
        )
    return f"{file_name} holds no activation of a real image"


def quality_columns(facts: dict[str, Any]) -> list[str]:
    return [_METRICS[name][0] for name in _known(facts)]


def _known(facts: dict[str, Any]) -> list[str]:
    return [name for name in _METRICS if any(row.get(name) is not None for row in facts["metrics"].values())]


def quality_rows(facts: dict[str, Any]) -> list[list[Any]]:
    """One row per kind of images: title, number of images, metrics."""
    titles = {"generated": "generated", "confident": f"with p(y|h) > {facts['confident']}", "real": "real"}
    names = _known(facts)
    return [[titles[kind], row["count"], *(row.get(name) for name in names)] for kind, row in facts["metrics"].items()]


def as_text(value: Any) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _ways(names: list[str], pairs: list[tuple[int, int]]) -> list[str]:
    """From one class to another, both in a few letters."""
    short = [name if len(name) <= _SHORT_NAME else name[: _SHORT_NAME - 1] + "…" for name in names]
    return [f"{short[a]} → {short[b]}" for a, b in pairs]


def page(
    path: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    pair: GenerativePair,
    pictures: Pictures,
    names: list[str],
    file_name: str,
) -> None:
    """Write the page of a generator that ``penult generate`` trained."""
    held, words = "held-out" if facts["held_out"] else "validation", _WORDS[facts["kind"]]
    html = Page(
        f"Images from the activations of {settings['model']}",
        subtitle="penult generate",
        lead="What a generator makes of draws of the classifier's own activations, class by class, and how good it is.",
        footer="Made by `penult generate`. Every figure on this page was computed by that run.",
    )
    section = html.section("Samples")
    known = {name: facts["metrics"].get(name, {}).get("accuracy") for name in ("generated", "confident")}
    shown = {f"{name} images in their class": f"{value:.1%}" for name, value in known.items() if value is not None}
    section.facts(shown | {"trained on": facts["images"], "epochs": facts["epochs"]})
    rows = [names[y] for y in pictures.classes]
    few = "" if len(rows) == len(names) else f" {len(rows)} of {len(names)} classes."
    section.figure(
        image_rows(pictures.samples, rows),
        caption=f"Images of draws h ~ p(h|y), a class in each row.{few}",
        alt=f"Rows of generated images for {len(rows)} classes",
    )
    if pictures.confident is not None:
        section.figure(
            image_rows(pictures.confident, rows),
            caption=f"The same of draws with p(y|h) > {facts['confident']}: clearer, and of less variety.",
            alt=f"Rows of generated images of confident draws for {len(rows)} classes",
        )
    section.text(_LIMITS.format(code=words.code))

    section = html.section("How good they are", f"Judged by {facts['judged_by']} {held} images.")
    if facts["labels"] == "judge":
        section.text(f"**The {held} images have no labels**; they have those that the judge gives them.")
    section.text(f"**{BIASED_JUDGE}.**" if facts["judge"] is None else f"The judge is `{facts['judge']}`.")
    for reason in facts["skipped"]:
        section.text(reason[0].upper() + reason[1:] + ".")
    section.table(("", "images", *quality_columns(facts)), quality_rows(facts))
    section.table(
        ("column", "what it means"), [_METRICS[name] for name in _known(facts)], "The last row is to compare with."
    )

    section = html.section("Between classes", "From an activation of one class straight to one of another.")
    section.figure(
        image_rows(pictures.ways, _ways(names, pictures.pairs)),
        caption="One code for all images of a row.",
        alt="Rows of images that go from one class to another",
    )
    section = html.section("Editing", f"Activations of {held} images, moved towards a draw of another class.")
    section.figure(
        image_rows(pictures.edited, _ways(names, pictures.goals)),
        caption=f"From the left: {words.edited}",
        alt="Rows of a real image, what is made of its activation, and its way to another class",
    )
    section = html.section("Training")
    section.figure(
        losses(facts["history"]),
        caption=f"{words.curves} The folder samples shows what the generator made as it was trained.",
        alt=f"Curves of the loss over {facts['epochs']} epochs",
    )
    if any(name.endswith("cosine") for each in facts["history"] for name in each):
        section.figure(
            cosines(facts["history"]),
            caption="Mean cosine of what the classifier makes of images to the activations that they were made of, "
            "both in deviations from the mean; 1 is perfect.",
            alt=f"Curves of the cosine over {facts['epochs']} epochs",
        )
    section = html.section("What it was made of")
    section.code(str(pair.head.certificate or pair.head), label="Head of the classifier")
    section.text(f"Base of the pair: `{pair.base}`. {contents(facts, file_name)}.".replace(file_name, f"`{file_name}`"))
    section.table(
        ("setting", "value"), [(f"`{k}`", "–" if v is None else str(v)) for k, v in settings.items()], align="ll"
    )
    html.write(path)
