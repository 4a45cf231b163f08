"""What ``penult generate`` shows: images that are drawn, grids of them, a summary on the terminal, and a page."""

from __future__ import annotations

import io as memory
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penult import io
from penult._extras import extra
from penult.cli import sources
from penult.cli.console import RichReporter
from penult.cli.training import SETTINGS_FILE
from penult.generate import load

if TYPE_CHECKING:
    from penult.generate import ActivationGenerator
    from penult.pair import GenerativePair

__all__ = [
    "COLUMNS", "GENERATOR_FILE", "PILLOW", "Pictures", "class_rows", "contents", "draw", "evenly", "generator_in",
    "grid", "page", "pictures_of", "seeded", "summary",
]  # fmt: skip

GENERATOR_FILE = "generator.safetensors"
PILLOW = "grids are written by Pillow"
COLUMNS = 8  # images in a row
_ROWS = 20  # classes on the page
_CELL, _GAP = 56, 2  # pixels of a grid
_MOST_PIXELS = 10**8
_WAYS, _EDITED = 5, 6  # rows of the page
_LETTERS = 10  # of a class's name, where two stand beside a row
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
_BIAS = (
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


def grid(images: Tensor, columns: int) -> bytes:
    """A PNG of images (N, C, H, W) in [0, 1] in rows, enlarged where they are small, with white between them.

    Raises:
        ImportError: Pillow is missing.
        ValueError: Images are neither grey nor in colour, or too many for a picture.
    """
    count, channels, height, width = images.shape
    scale = max(1, -(-_CELL // max(height, width)))
    tall, wide, rows = height * scale, width * scale, -(-count // columns)
    size = (rows * (tall + _GAP) + _GAP, columns * (wide + _GAP) + _GAP)
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels make no picture: write them to an .npz")
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"a grid of {count} images has {size[1]}×{size[0]} pixels: ask for fewer, or write an .npz")
    sheet = torch.full((*size, channels), 255, dtype=torch.uint8)
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    for position, image in enumerate(pixels):
        row, column = divmod(position, columns)
        top, left = _GAP + row * (tall + _GAP), _GAP + column * (wide + _GAP)
        sheet[top : top + tall, left : left + wide] = image
    mode, data = "L" if channels == 1 else "RGB", sheet.numpy().tobytes()
    buffer = memory.BytesIO()
    extra("PIL.Image", PILLOW).frombytes(mode, size[::-1], data).save(buffer, "PNG")
    return buffer.getvalue()


def generator_in(source: str) -> Path | None:
    """The file of a generator that a folder or file holds; None for a file of something else.

    Raises:
        ValueError: There is no such file or folder, or the folder holds no generator.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / GENERATOR_FILE).exists():
            what = "a training that was stopped" if (path / SETTINGS_FILE).exists() else "no generator"
            raise ValueError(
                f"{source} holds {what}: there is no {GENERATOR_FILE} to draw from. To train, or to go on, give the "
                "pair (penult fit writes it), --model, --images and --out"
            )
        return path / GENERATOR_FILE
    if not path.exists():
        raise ValueError(
            f"SOURCE {source} does not exist; it is a pair that penult fit wrote, which is trained on, or what a "
            "training wrote, to draw from. The classifier goes to --model"
        )
    try:
        return path if io.read(path).kind == "generator" else None
    except io.FileFormatError:
        return None  # the training says what it is


def draw(
    file: Path,
    out: Path,
    classes: Sequence[int] | None,
    count: int | None,
    confident: float | None,
    seed: int,
    device: str,
    reporter: RichReporter,
) -> dict[str, Any]:
    """Draw images of classes from a generator's file, to a grid or to arrays."""
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out}: images are drawn to a grid, name.png, or to arrays, name.npz")
    extra("PIL.Image", PILLOW) if out.suffix == ".png" else extra("numpy", "it writes arrays")
    where = sources.device_of(device)
    generator = load(file, device=where)
    asked = list(classes or range(generator.pair.head.num_classes))
    each = count or (COLUMNS if len(asked) > 1 else COLUMNS**2)
    y = torch.tensor(asked, device=where).repeat_interleave(each)
    columns = each if len(asked) > 1 else math.ceil(each**0.5)
    images = generator.generate(y, confident, generator=torch.Generator(where).manual_seed(seed)).float().cpu()
    if out.suffix == ".png":
        data = grid(images, columns)
    else:
        buffer = memory.BytesIO()
        numpy = extra("numpy", "it writes arrays")
        numpy.savez_compressed(buffer, images=images.numpy(), labels=y.cpu().numpy())
        data = buffer.getvalue()
    io.write_bytes(out, data)
    of = f"{each} of each of {len(asked)} classes" if len(asked) > 1 else f"all of class {asked[0]}"
    reporter.line(f"{out}: {len(images)} images, {of}")
    return {
        "out": str(out),
        "source": str(file),
        "images": len(images),
        "classes": asked,
        "of_each": each,
        "shape": list(images.shape[1:]),
        "confident": confident,
        "stored_activations": generator.stored_activations,
        "seed": seed,
    }


def summary(facts: dict[str, Any], reporter: RichReporter) -> None:
    """A table of quality, and what it lacks."""
    held = "held-out" if facts["held_out"] else "validation"
    if facts["labels"] == "judge":
        reporter.line(f"the {held} images have no labels: they have those that the judge gives them")
    for reason in facts["skipped"]:
        reporter.line(reason)
    kinds, *columns = zip(*_table(facts), strict=True)
    rows = [(title, *map(_shown, cells)) for title, cells in zip(("images", *_columns(facts)), columns, strict=True)]
    reporter.table((f"by {facts['judged_by']} {held} images", *kinds), rows)  # upright: ten columns are too wide
    if facts["judge"] is None:
        reporter.line(_BIAS)


def contents(facts: dict[str, Any]) -> str:
    """What the file holds of real images."""
    stored, replaced = facts["stored_activations"], facts["replaced_activations"]
    if stored:
        return (
            f"{GENERATOR_FILE} stores {stored} real activations; without --store-activations a mixture stands for them"
        )
    if replaced:
        return (
            f"{GENERATOR_FILE} holds a mixture of {facts['floats']} floats in place of {replaced} real activations; "
            "--store-activations keeps them"
        )
    return f"{GENERATOR_FILE} holds no activation of a real image"


def _columns(facts: dict[str, Any]) -> list[str]:
    return [_METRICS[name][0] for name in _known(facts)]


def _known(facts: dict[str, Any]) -> list[str]:
    return [name for name in _METRICS if any(row.get(name) is not None for row in facts["metrics"].values())]


def _table(facts: dict[str, Any]) -> list[list[Any]]:
    """A row for each kind of images: what it is, their number, figures."""
    titles = {"generated": "generated", "confident": f"with p(y|h) > {facts['confident']}", "real": "real"}
    names = _known(facts)
    return [[titles[kind], row["count"], *(row.get(name) for name in names)] for kind, row in facts["metrics"].items()]


def _shown(value: Any) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _ways(names: list[str], pairs: list[tuple[int, int]]) -> list[str]:
    """From one class to another, both in a few letters."""
    short = [name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…" for name in names]
    return [f"{short[a]} → {short[b]}" for a, b in pairs]


def page(
    path: Path,
    facts: dict[str, Any],
    settings: dict[str, Any],
    pair: GenerativePair,
    pictures: Pictures,
    names: list[str],
) -> None:
    """Write the page of a generator."""
    from penult.report import Page
    from penult.report import generate as figures

    held, words = "held-out" if facts["held_out"] else "validation", _WORDS[facts["kind"]]
    page = Page(
        f"Images from the activations of {settings['model']}",
        subtitle="penult generate",
        lead="What a generator makes of draws of the classifier's own activations, class by class, and how good it is.",
        footer="Made by `penult generate`. Every figure on this page was computed by that run.",
    )
    section = page.section("Samples")
    known = {name: facts["metrics"].get(name, {}).get("accuracy") for name in ("generated", "confident")}
    shown = {f"{name} images in their class": f"{value:.1%}" for name, value in known.items() if value is not None}
    section.facts(shown | {"trained on": facts["images"], "epochs": facts["epochs"]})
    rows = [names[y] for y in pictures.classes]
    few = "" if len(rows) == len(names) else f" {len(rows)} of {len(names)} classes."
    section.figure(
        figures.image_rows(pictures.samples, rows),
        caption=f"Images of draws h ~ p(h|y), a class in each row.{few}",
        alt=f"Rows of generated images for {len(rows)} classes",
    )
    if pictures.confident is not None:
        section.figure(
            figures.image_rows(pictures.confident, rows),
            caption=f"The same of draws with p(y|h) > {facts['confident']}: clearer, and of less variety.",
            alt=f"Rows of generated images of confident draws for {len(rows)} classes",
        )
    section.text(_LIMITS.format(code=words.code))

    section = page.section("How good they are", f"Judged by {facts['judged_by']} {held} images.")
    if facts["labels"] == "judge":
        section.text(f"**The {held} images have no labels**; they have those that the judge gives them.")
    section.text(f"**{_BIAS}.**" if facts["judge"] is None else f"The judge is `{facts['judge']}`.")
    for reason in facts["skipped"]:
        section.text(reason[0].upper() + reason[1:] + ".")
    section.table(("", "images", *_columns(facts)), _table(facts))
    section.table(
        ("column", "what it means"), [_METRICS[name] for name in _known(facts)], "The last row is to compare with."
    )

    section = page.section("Between classes", "From an activation of one class straight to one of another.")
    section.figure(
        figures.image_rows(pictures.ways, _ways(names, pictures.pairs)),
        caption="One code for all images of a row.",
        alt="Rows of images that go from one class to another",
    )
    section = page.section("Editing", f"Activations of {held} images, moved towards a draw of another class.")
    section.figure(
        figures.image_rows(pictures.edited, _ways(names, pictures.goals)),
        caption=f"From the left: {words.edited}",
        alt="Rows of a real image, what is made of its activation, and its way to another class",
    )
    section = page.section("Training")
    section.figure(
        figures.losses(facts["history"]),
        caption=f"{words.curves} The folder samples shows what the generator made as it was trained.",
        alt=f"Curves of the loss over {facts['epochs']} epochs",
    )
    if any(name.endswith("cosine") for each in facts["history"] for name in each):
        section.figure(
            figures.cosines(facts["history"]),
            caption="Mean cosine of what the classifier makes of images to the activations that they were made of, "
            "both in deviations from the mean; 1 is perfect.",
            alt=f"Curves of the cosine over {facts['epochs']} epochs",
        )
    section = page.section("What it was made of")
    section.code(str(pair.head.certificate or pair.head), label="Head of the classifier")
    section.text(f"Base of the pair: `{pair.base}`. {contents(facts)}.".replace(GENERATOR_FILE, f"`{GENERATOR_FILE}`"))
    section.table(
        ("setting", "value"), [(f"`{k}`", "–" if v is None else str(v)) for k, v in settings.items()], align="ll"
    )
    page.write(path)
