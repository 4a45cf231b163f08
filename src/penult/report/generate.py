"""Figures of a generator: rows of the images that it makes, and what it learnt by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from penult.report import plots

__all__ = ["cosines", "image_rows", "losses"]

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
