"""Data set of images, which are decoded at access."""

from __future__ import annotations

import copy
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from penult._checks import check_choice, check_seed, check_shares, class_names_tuple, integer_labels
from penult.data._decode import Normalization, PerChannel, adapt, decode
from penult.io import FileFormatError, _decode, _encode, write_bytes

__all__ = ["ImageDataset", "Images", "RowNames", "Size", "Source", "Transform"]

# Images that are looked at to see whether all have one size.
_EXAMINED = 16

# File with the names of rows in a folder of activations, and its kind.
ROWS_FILE, _ROWS = "rows.json", "rows"

Size = int | tuple[int, int] | None
Transform = Callable[[Tensor], Tensor] | None


class Source(Protocol):
    """Images of a reader, accessed by index."""

    def __len__(self) -> int:
        """Number of images."""

    def __str__(self) -> str:
        """Name of the images, for messages."""

    def image(self, index: int) -> bytes | Tensor:
        """Return image ``index``: encoded, or float32 (C, H, W) in [0, 1] that the caller may write to."""

    def where(self, index: int) -> str:
        """Return the location of image ``index``, for messages."""


@final
class ImageDataset(Dataset[Any]):
    """Map-style data set of images for `torch.utils.data.DataLoader`, which decodes an image at access.

    `read`, `parquet`, `folder` and `npz` return it. Item i is (image, label): the image float32 (C, H, W) in [0, 1],
    the label an int. Without labels it is the image alone. With `mean` or `std` images are normalised; `unnormalized`
    returns the data set of plain images. The data set can be pickled, and keeps no file open.

    Encoded images are read by Pillow. They are rotated as their EXIF orientation says; transparent images are put on
    white; palettes, CMYK and other colours become RGB; bilevel images become grey; 16 bits are divided by 65535.

    Args:
        source: Images of a reader.
        labels: (N,) integers, -1 for images without a label; or None.
        class_names: One name for each class, a mapping of class numbers to names (``id2label``), or None.
        mode: ``"L"`` for grey, ``"RGB"`` for colour; None keeps one or three channels as they are.
        size: Height and width to resize to, or one number for a square; None keeps the size. Bilinear with
            antialiasing, by Pillow for encoded images.
        mean: Number that is subtracted from images in [0, 1], or one for each channel. Default: 0 if `std` is given.
        std: Positive number that they are divided by after that, or one for each channel. Default: 1 if `mean` is
            given.
        transform: Function that is applied to each image last.

    Attributes:
        labels: (N,) int64, or None if there are none.
        class_names: One name for each class, or None.

    Raises:
        TypeError: Labels or `size` are not integers, names are not strings, or `mean` or `std` are not numbers.
        ValueError: There is no image; labels do not fit the images or the names, or some are missing; `mode` is
            unknown; or `size` or `std` is not positive.

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
        class_names: Sequence[str] | Mapping[int, str] | Mapping[str, str] | None = None,
        *,
        mode: str | None = None,
        size: Size = None,
        mean: PerChannel = None,
        std: PerChannel = None,
        transform: Transform = None,
    ) -> None:
        if not len(source):
            raise ValueError(f"{source} contains no image; expected at least one")
        check_choice("mode", mode, ("L", "RGB", None))
        self.class_names = None if class_names is None else class_names_tuple(class_names)
        self.labels = None if labels is None else _checked(labels, source, self.class_names)
        self._source = source
        self._mode, self._size, self._transform = mode, _pair(size), transform
        self._normalization = Normalization.of(mean, std)

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
        if self._normalization is not None:
            image = self._normalization(image)
        if self._transform is not None:
            image = self._transform(image)
        return image if self.labels is None else (image, int(self.labels[position]))

    @property
    def row_names(self) -> RowNames:
        """The files of the images, and their rows in files of several."""
        names = getattr(self._source, "row_names", None)
        return RowNames([PurePath(str(self._source)).name], [len(self)]) if names is None else names()

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How images are prepared, as `penult.Head` stores it; None with a `transform`, which is any function.

        Size and mode are those of the images, where all have one.
        """
        if self._transform is not None:
            return None
        count = min(len(self), _EXAMINED)
        some = torch.linspace(0, len(self) - 1, count, dtype=torch.float64, device="cpu").long().tolist()
        items = [self[i] for i in (some if self._size is None or self._mode is None else some[:1])]
        shapes = {tuple((item if isinstance(item, Tensor) else item[0]).shape) for item in items}
        sizes, channels = {shape[1:] for shape in shapes}, {shape[0] for shape in shapes}
        mode = {1: "L", 3: "RGB"}.get(min(channels)) if len(channels) == 1 else None
        normalization = self._normalization
        return {
            "inputs": "images",
            "size": list(min(sizes)) if len(sizes) == 1 else None,
            "mode": mode,
            "mean": None if normalization is None else list(normalization.mean),
            "std": None if normalization is None else list(normalization.std),
        }

    def __repr__(self) -> str:
        classes = None if self.class_names is None else len(self.class_names)
        return f"ImageDataset(N={len(self)}, K={classes}, source={self._source})"

    def unnormalized(self) -> ImageDataset:
        """Return the data set without `mean` and `std`: its images are in [0, 1], as they are shown.

        Returns:
            A data set of the same source, labels and options.

        Example:
            >>> from penult.data import read
            >>> dataset = read("digits", mean=0.5, std=0.25)
            >>> dataset[0][0].min(), dataset.unnormalized()[0][0].min()
            (tensor(-2.), tensor(0.))
        """
        plain = copy.copy(self)
        plain._normalization = None
        return plain

    def load(self) -> Images:
        """Load all images into memory.

        Returns:
            Images (N, C, H, W). Classes without names have their numbers as names.

        Raises:
            ValueError: The images are not all of one size, or have no labels.

        Example:
            >>> from penult.data import read
            >>> read("digits").load().images.shape
            torch.Size([1797, 1, 8, 8])
        """
        if self.labels is None:
            raise ValueError(
                f"{self._source} has no labels, but load() returns images with labels. Use torch.stack(list(dataset)) "
                "for the images alone"
            )
        first = self[0][0]
        images = first.new_empty((len(self), *first.shape))
        for i in range(len(self)):
            image = self[i][0]
            if image.shape != first.shape:
                remedy = 'mode="L" or mode="RGB"' if len(image) != len(first) else "size=(H, W)"
                raise ValueError(
                    f"{self._source.where(i)} has shape {tuple(image.shape)}; expected {tuple(first.shape)}, as "
                    f"{self._source.where(0)} has. Pass {remedy}"
                )
            images[i] = image
        names = self.class_names or tuple(map(str, range(int(self.labels.max()) + 1)))
        return Images(images, self.labels, names)


def _pair(size: Size) -> tuple[int, int] | None:
    """Return height and width."""
    if size is None:
        return None
    pair = tuple(map(operator.index, size if isinstance(size, Sequence) else (size, size)))
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size is {size!r}; expected a positive number of pixels, or (height, width)")
    return pair


def _checked(labels: Tensor, source: Source, names: tuple[str, ...] | None) -> Tensor | None:
    """Return labels (N,) as int64, or None if no image has one; raise if some are missing or out of range."""
    labels = integer_labels(labels, (len(source),), name=f"labels of {source}")
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
            f"{int((labels == -1).sum())} of {len(labels)} images have no label (-1 or null), the first of them "
            f"{source.where(i)}; expected a label for all images or for none"
        )
    want = "a label of at least 0" if names is None else f"0 to {len(names) - 1} for {len(names)} class names"
    raise ValueError(f"{source.where(i)} has label {int(labels[i])}; expected {want}")


# --- Names of rows ------------------------------------------------------------------------------------------


@final
class RowNames:
    """Names of the rows of a data set: the file of a row, and its number in a file of several rows.

    Args:
        files: Names of the files, relative to the source of the data set.
        counts: Number of rows of each file, in the order of the rows; None if each file is one row.

    Raises:
        ValueError: There is not one count for each file.
    """

    def __init__(self, files: Sequence[str], counts: Sequence[int] | None = None) -> None:
        if counts is not None and len(counts) != len(files):
            raise ValueError(f"counts has {len(counts)} numbers; expected {len(files)}, one for each file")
        self._files, self._counts = list(files), None if counts is None else list(counts)
        self._ends = None if counts is None else list(accumulate(counts))

    def __len__(self) -> int:
        if self._ends is None:
            return len(self._files)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[str, int | None]:
        """Return the file of a row, and its number in it from 0, or None if the file is one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no row {index} among {len(self)}")
        if self._ends is None or self._counts is None:
            return self._files[index], None
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number] - self._counts[number])

    def save(self, folder: Path, digest: str | None) -> None:
        """Write the names next to activations, whose digest says which rows they belong to."""
        metadata = {"files": self._files, "counts": self._counts, "digest": digest}
        write_bytes(folder / ROWS_FILE, _encode(_ROWS, metadata).encode())

    @classmethod
    def load(cls, folder: Path) -> tuple[RowNames, str | None] | None:
        """Read names, and the digest of the activations that they belong to; None if the folder has none.

        Raises:
            FileFormatError: The file is damaged.
        """
        path = folder / ROWS_FILE
        if not path.exists():
            return None
        metadata = _decode(path, path.read_bytes(), _ROWS).metadata
        files, counts, digest = (metadata.get(name) for name in ("files", "counts", "digest"))
        texts = isinstance(files, list) and all(isinstance(file, str) for file in files)
        numbers = counts is None or (isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts))
        if not (texts and numbers and isinstance(digest, str | None)):
            raise FileFormatError(f"{path} holds no names of rows; delete it, or write the folder again")
        assert isinstance(files, list)
        return cls(files, counts), digest


# --- Labelled images in memory ------------------------------------------------------------------------------


class Images(NamedTuple):
    """Images with labels.

    Attributes:
        images: (N, C, H, W), values in [0, 1].
        labels: (N,), integers.
        class_names: One name for each class.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def split(self, *shares: float, seed: int = 0) -> list[Images]:
        """Split the images at random into disjoint parts.

        Args:
            shares: Positive fractions of the images, which sum to at most 1.
            seed: Seed of the split; the global random state of torch is not changed.

        Returns:
            One part for each share. If the shares sum to 1, the parts contain all images.

        Raises:
            ValueError: A share is not positive, or they sum to more than 1.
        """
        shares = check_shares(shares)
        order = torch.randperm(
            len(self.labels), generator=torch.Generator().manual_seed(check_seed(seed)), device="cpu"
        )
        ends = [round(sum(shares[: i + 1]) * len(order)) for i in range(len(shares))]
        return [
            Images(self.images[order[start:end]], self.labels[order[start:end]], self.class_names)
            for start, end in zip([0, *ends], ends, strict=False)
        ]
