"""Images and labels as they are given to be judged, and an order of them that does not depend on theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from penult._checks import check_finite

__all__ = ["Source", "check_images", "read_source", "shuffled"]

Source = Tensor | tuple[Any, ...] | list[Any] | Dataset[Any]

_ROUNDED = 1e-3  # what arithmetic may take an image out of [0, 1]
_AT_ONCE = 100


def read_source(name: str, source: Any) -> tuple[Tensor, Tensor | None]:
    """Images and labels, from tensors or from a data set."""
    if isinstance(source, Tensor):
        return source.detach(), None
    if isinstance(source, tuple) or (isinstance(source, list) and source and _is_batch(source[0])):
        if len(source) < 2 or not isinstance(source[0], Tensor):
            types = ", ".join(type(each).__name__ for each in source)
            raise TypeError(f"{name} is ({types}); it must be (images, labels), two tensors, or a map-style data set")
        return source[0].detach(), source[1]
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"{name} is a {type(source).__name__}; it must be (images, labels), two tensors, or a map-style data set"
        )
    if not len(source):
        raise ValueError(f"{name} is a data set without a single image")
    items = [source[i] for i in range(len(source))]
    if not all(isinstance(item, Tensor | list | tuple) for item in items):
        raise TypeError(
            f"{name} is a data set of {type(items[0]).__name__}; its items must be images or (image, label)"
        )
    images = [item if isinstance(item, Tensor) else item[0] for item in items]
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or image.shape != images[0].shape:
            what = f"of shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            raise ValueError(
                f"image {i} of {name} is {what}; images must be tensors of one shape, as image 0: resize them"
            )
    labels = None if any(isinstance(item, Tensor) for item in items) else [int(item[1]) for item in items]
    return torch.stack(images), None if labels is None else torch.tensor(labels)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def check_images(name: str, images: Tensor, shape: torch.Size) -> None:
    if not images.is_floating_point():
        raise ValueError(f"{name} images are {images.dtype}; they must be floats in [0, 1]: images / 255 for bytes")
    if images.ndim != 4 or not images.numel():
        raise ValueError(f"{name} images have shape {tuple(images.shape)}; they must be (N, C, H, W), N > 0")
    if images.shape[1:] != shape:
        raise ValueError(
            f"{name} images are of shape {tuple(images.shape[1:])}, real ones {tuple(shape)}: bring both to one shape"
        )
    check_finite(f"{name} images", images)
    least, largest = (float(x) for x in images.aminmax())
    if least < -_ROUNDED or largest > 1 + _ROUNDED:
        raise ValueError(
            f"{name} images have values from {least:.4g} to {largest:.4g}; they must lie in [0, 1]: undo any "
            "normalisation (that of the evaluator belongs into the evaluator), or clamp them"
        )


def shuffled(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Places (N,) in a random order, which depends on the images that there are but not on the order they came in."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(images[0].numel(), generator=generator, dtype=torch.float64)
    key = torch.cat([(block.flatten(1).cpu().double() * direction).sum(1) for block in images.split(_AT_ONCE)])
    order = key.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    return order[torch.randperm(len(order), generator=generator)]
