"""A data set of images that are decoded when they are asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from penult.data._decode import adapt, decode

__all__ = ["ImageDataset", "Images", "Size", "Source", "Transform"]

Size = int | tuple[int, int] | None
Transform = Callable[[Tensor], Tensor] | None


class Source(Protocol):
    """Images by number, as a reader finds them."""

    def __len__(self) -> int:
        """How many."""

    def __str__(self) -> str:
        """What they are called in errors."""

    def image(self, index: int) -> bytes | Tensor:
        """Number ``index``: encoded, or float32 (C, H, W) in [0, 1] that the caller may write to."""

    def where(self, index: int) -> str:
        """Where number ``index`` is found, for errors."""


@final
class ImageDataset(Dataset[Any]):
    """Images that are decoded when they are asked for: a map-style data set for `torch.utils.data.DataLoader`.

    `read`, `parquet`, `folder` and `npz` make it. Item i is (image, label): the image float32 (C, H, W) in [0, 1],
    the label an int. Without labels it is the image alone. It can be pickled, and keeps no file open.

    Encoded images are read by Pillow. They are turned as their EXIF orientation says; what is transparent is laid
    on white; palettes, CMYK and other colours become RGB; bilevel images become grey; 16 bits are divided by 65535.

    Args:
        source: The reader's images.
        labels: (N,) integers, -1 where there is none; or None.
        class_names: One name a class, or None.
        mode: ``"L"`` for grey, ``"RGB"`` for colour; None leaves each image as it is, one channel or three.
        size: Height and width to resize to, one number for a square; None leaves each image as it is. Bilinear
            with antialiasing, by Pillow for encoded images.
        transform: Called on each image at last.

    Attributes:
        labels: (N,) int64, or None if there are none.
        class_names: One name a class, or None if they have none.

    Raises:
        ValueError: There is no image; labels that do not fit the images or the names, or are missing in part; an
            unknown `mode`; a `size` that is not positive.

    Example:
        >>> from penult.data import read
        >>> dataset = read("digits", size=(12, 16))
        >>> dataset
        ImageDataset(N=1797, K=10, source=digits)
        >>> image, label = dataset[5]
        >>> image.shape, dataset.class_names[label]
        (torch.Size([1, 12, 16]), '5')
    """

    labels: Tensor | None
    class_names: tuple[str, ...] | None

    def __init__(
        self,
        source: Source,
        labels: Tensor | None = None,
        class_names: Sequence[str] | None = None,
        *,
        mode: str | None = None,
        size: Size = None,
        transform: Transform = None,
    ) -> None:
        if not len(source):
            raise ValueError(f"{source} holds no image at all")
        if mode not in (None, "L", "RGB"):
            raise ValueError(f'mode is {mode!r}; it must be "L", "RGB" or None for images as they are')
        self.class_names = None if class_names is None else tuple(class_names)
        self.labels = None if labels is None else _checked(labels, source, self.class_names)
        self._source = source
        self._mode, self._size, self._transform = mode, _pair(size), transform

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"there is no image {position} among {len(self)}")
        position %= len(self)
        raw = self._source.image(position)
        try:
            size = self._size
            image = decode(raw, self._mode, size) if isinstance(raw, bytes) else adapt(raw, self._mode, size)
        except ValueError as error:
            raise ValueError(f"{self._source.where(position)} cannot be read as an image: {error}") from error
        if self._transform is not None:
            image = self._transform(image)
        return image if self.labels is None else (image, int(self.labels[position]))

    def __repr__(self) -> str:
        classes = None if self.class_names is None else len(self.class_names)
        return f"ImageDataset(N={len(self)}, K={classes}, source={self._source})"

    def load(self) -> Images:
        """All images in memory.

        Returns:
            Images (N, C, H, W). Classes without names are called by their numbers.

        Raises:
            ValueError: The images are not all of one size, or have no labels.

        Example:
            >>> from penult.data import read
            >>> read("digits").load().images.shape
            torch.Size([1797, 1, 8, 8])
        """
        if self.labels is None:
            raise ValueError(
                f"{self._source} has no labels, and load() gives images with labels; "
                "torch.stack(list(dataset)) gives the images alone"
            )
        first = self[0][0]
        images = first.new_empty((len(self), *first.shape))
        for i in range(len(self)):
            image = self[i][0]
            if image.shape != first.shape:
                remedy = 'mode="L" or mode="RGB"' if len(image) != len(first) else "size=(H, W)"
                raise ValueError(
                    f"images must be of one size (C, H, W): {self._source.where(0)} is {tuple(first.shape)}, "
                    f"{self._source.where(i)} is {tuple(image.shape)}; pass {remedy}"
                )
            images[i] = image
        names = self.class_names or tuple(map(str, range(int(self.labels.max()) + 1)))
        return Images(images, self.labels, names)


def _pair(size: Size) -> tuple[int, int] | None:
    """Height and width."""
    if size is None:
        return None
    pair = tuple(map(operator.index, size if isinstance(size, Sequence) else (size, size)))
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size is {size!r}; it must be a positive number of pixels, or (height, width)")
    return pair


def _checked(labels: Tensor, source: Source, names: tuple[str, ...] | None) -> Tensor | None:
    """Labels (N,) int64 in range, or None if not a single image has one."""
    if labels.shape != (len(source),) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"the labels of {source} are {labels.dtype} of shape {tuple(labels.shape)}; "
            f"expected integers of shape ({len(source)},)"
        )
    labels = labels.to(torch.int64)
    if bool((labels == -1).all()):
        return None
    wrong = labels < 0
    if names is not None:
        wrong |= labels >= len(names)
    if not bool(wrong.any()):
        return labels
    i = int(wrong.int().argmax())
    if labels[i] == -1:
        raise ValueError(
            f"{source.where(i)} has no label (-1 or null), as {int((labels == -1).sum())} of {len(labels)} images; "
            "leave those out, or give none a label"
        )
    limit = "" if names is None else f" and below {len(names)}, the number of class names"
    raise ValueError(f"{source.where(i)} has label {int(labels[i])}; labels must not be negative{limit}")


# --- Labelled images in memory ------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        images: (N, C, H, W), values in [0, 1].
        labels: (N,), integers.
        class_names: One name a class.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def split(self, *shares: float, seed: int = 0) -> list[Images]:
        """Disjoint random parts.

        Args:
            shares: Positive shares of the whole, which sum to at most 1.
            seed: Seed of the shuffle; torch's own random state is left alone.

        Returns:
            One part a share; the last takes what rounding leaves when the shares sum to 1.

        Raises:
            ValueError: If a share is not positive or they sum to more than 1.
        """
        if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(f"shares must be positive and sum to at most 1; got {shares}")
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        ends = [round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))]
        return [
            Images(self.images[order[start:end]], self.labels[order[start:end]], self.class_names)
            for start, end in zip([0, *ends], ends, strict=False)
        ]
