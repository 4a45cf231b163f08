"""Reading and checks of images and labels to judge."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from penult._checks import check_finite, described

__all__ = ["Source", "check_images", "read_source", "shuffled"]

Source = Tensor | tuple[Any, ...] | list[Any] | Dataset[Any]

# How far rounding may take pixels out of [0, 1].
_TOLERANCE = 1e-3
# Images of a block.
_BLOCK = 100


def read_source(name: str, source: Any) -> tuple[Tensor, Any]:
    """Return images, and labels or None, from tensors or a data set; labels are not checked."""
    want = "(images, labels) as tensors, or a map-style data set"
    if isinstance(source, Tensor):
        return source.detach(), None
    if isinstance(source, tuple) or (isinstance(source, list) and source and _is_batch(source[0])):
        if len(source) < 2 or not isinstance(source[0], Tensor):
            types = ", ".join(type(part).__name__ for part in source)
            raise TypeError(f"{name} is ({types}); expected {want}")
        return source[0].detach(), source[1]
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(f"{name} is {described(source)}; expected {want}")
    if not len(source):
        raise ValueError(f"{name} is a data set without images")
    items = [source[i] for i in range(len(source))]
    if not all(isinstance(item, Tensor | list | tuple) for item in items):
        raise TypeError(f"{name} is a data set of {type(items[0]).__name__}; expected images or (image, label)")
    images = [item if isinstance(item, Tensor) else item[0] for item in items]
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"image {i} of {name} is {described(image)}; expected a tensor")
        if image.shape != images[0].shape:
            raise ValueError(
                f"image {i} of {name} has shape {tuple(image.shape)}; expected {tuple(images[0].shape)}, as image 0. "
                "Resize the images"
            )
    if any(isinstance(item, Tensor) for item in items):
        return torch.stack(images), None
    return torch.stack(images), [_integer(f"label {i} of {name}", item[1]) for i, item in enumerate(items)]


def _integer(name: str, value: Any) -> int:
    """Convert an integer of any type, such as a tensor with one element."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; expected an integer class index") from None


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def check_images(name: str, images: Tensor, shape: torch.Size) -> None:
    """Raise unless images are floats (N, C, H, W) in [0, 1] with the shape (C, H, W) of the real images."""
    if not images.is_floating_point():
        raise TypeError(f"{name} images are {images.dtype}; expected floats in [0, 1]. For bytes: images / 255")
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"{name} images have shape {tuple(images.shape)}; expected (N, C, H, W) with N > 0")
    if images.shape[1:] != shape:
        raise ValueError(
            f"{name} images have shape {tuple(images.shape[1:])}, and real images {tuple(shape)}: resize one of them"
        )
    check_finite(f"{name} images", images)
    low, high = (float(x) for x in images.aminmax())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(
            f"{name} images have values from {low:.4g} to {high:.4g}; expected values in [0, 1]. Undo any "
            "normalisation (that of the evaluator is part of the evaluator), or clamp them"
        )


def shuffled(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return indices (N,) in a random order that depends on the set of images, but not on their order."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(images[0].numel(), generator=generator, dtype=torch.float64, device="cpu")
    key = torch.cat([(block.flatten(1).cpu().double() * direction).sum(1) for block in images.split(_BLOCK)])
    order = key.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    return order[torch.randperm(len(order), generator=generator, device="cpu")]
