"""The images of the benchmark of outlier scores: familiar ones, shifted ones, and outliers of many kinds.

There are two data sets, ``"mnist"`` with images (1, 28, 28) and ``"cifar10"`` with images (3, 32, 32), all in [0, 1].
The names of their sets:

* ``"familiar"``: the test file, with labels. `halves` divides it into one half to fit and one to test.
* `FAR`: outliers unrelated to the classes. Other data sets; 1/f noise ("textures"); overlapping discs ("dead
  leaves"); crops of the two photographs in scikit-learn; noise; familiar images of the testing half whose 16 blocks
  are permuted ("scrambled").
* `SELECTION`: outliers of other kinds, used to make choices. "half and half" has the left half of one training image
  and the right half of another, of another class.
* `SHIFTED`: familiar images of the testing half under `penult.data.shift`, with labels: kind and severity.
* ``"held-out classes"``, if a network does not know some classes: the test images of these. All other sets that are
  made of familiar images contain the known classes only, whose labels are renumbered.

A set of outliers has `TESTED` + `CONTAMINATING` images: the first are for testing, and the last are added to
reference activations. A shifted set has `TESTED`. A set depends only on its name and on the files.

The copy of CIFAR-10 is recompressed as JPEG, with the same tables for all images. Every other set in colour is
compressed with the same tables (quality `QUALITY` of Pillow), so that compression artefacts do not separate the sets.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from penult.data import ImageDataset, Images, parquet, shift

__all__ = [
    "CLASSES",
    "CONTAMINATING",
    "FAMILIAR",
    "FAR",
    "HELD_OUT",
    "SELECTION",
    "SHAPES",
    "SHIFTED",
    "TESTED",
    "Pictures",
    "compressed",
    "drawn",
    "first",
    "halves",
    "pictures",
    "set_names",
    "training",
]

TESTED = 1000  # pictures of a set, the first ones
CONTAMINATING = 100  # the last ones of a set of outliers
QUALITY = 75  # of JPEG, as the copy of CIFAR-10 has it
BLOCKS = 4  # each way, of scrambled pictures
CROPS = (64, 200)  # sides of crops of photographs, pixels
LEAVES = 150  # discs of a picture
HALVES_SEED = 0

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
CLASSES = 10
FAMILIAR, HELD_OUT = "familiar", "held-out classes"

_COMMON = ("textures", "dead leaves", "photographs", "gaussian noise", "uniform noise", "scrambled")
_SHIFTED = tuple(
    f"{kind} {severity}"
    for kind in ("texture", "noise", "blur", "rotation", "contrast")
    for severity in (0.25, 0.5, 0.75)
)
_SELECTION = ("gratings", "checkerboards", "blobs", "salt and pepper", "half and half")

FAR: dict[str, tuple[str, ...]] = {"mnist": ("cifar10", *_COMMON), "cifar10": ("mnist", "usps", *_COMMON)}
SHIFTED: dict[str, tuple[str, ...]] = dict.fromkeys(SHAPES, _SHIFTED)
SELECTION: dict[str, tuple[str, ...]] = dict.fromkeys(SHAPES, _SELECTION)


class Pictures(NamedTuple):
    """Pictures, and labels where they mean something.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        labels: (N,), or None.
    """

    images: Tensor
    labels: Tensor | None


# --- sets ---------------------------------------------------------------------------------------------------


def set_names(data_name: str, held_out: Sequence[int] = ()) -> tuple[str, ...]:
    """The names of all sets of a data set, familiar pictures first.

    Args:
        data_name: ``"mnist"`` or ``"cifar10"``.
        held_out: Classes that are not known.

    Raises:
        ValueError: There is no such data set.
    """
    if data_name not in SHAPES:
        raise ValueError(f"data set is {data_name!r}; it must be one of {', '.join(SHAPES)}")
    near = (HELD_OUT,) if held_out else ()
    return (FAMILIAR, *near, *FAR[data_name], *SHIFTED[data_name], *SELECTION[data_name])


def halves(n: int = 10_000) -> tuple[Tensor, Tensor]:
    """Rows of familiar pictures to fit and to test, in an order that is drawn once.

    Args:
        n: How many familiar pictures there are; fewer than the test file has where classes are held out.

    Returns:
        ``(fit_rows, test_rows)``, half of them each; the second has one more if `n` is odd.

    Raises:
        ValueError: There are fewer than two.
    """
    if n < 2:
        raise ValueError(f"n is {n}; two halves need 2 pictures or more")
    rows = torch.randperm(n, generator=Generator().manual_seed(HALVES_SEED))
    return rows[: n // 2], rows[n // 2 :]


def pictures(data_name: str, set_name: str, data: Path, held_out: Sequence[int] = ()) -> Pictures:
    """The pictures of a set.

    Args:
        data_name: ``"mnist"`` or ``"cifar10"``.
        set_name: One of `set_names`.
        data: The folder of parquet files.
        held_out: Classes that are not known.

    Returns:
        The pictures, with labels where they are familiar or shifted.

    Raises:
        ValueError: There is no such data set, set or class, or there are too few pictures.
    """
    names = set_names(data_name, held_out)
    if set_name not in names:
        raise ValueError(f"set is {set_name!r}; it must be one of {', '.join(names)}")
    if set(held_out) - set(range(CLASSES)):
        raise ValueError(f"held_out is {tuple(held_out)}; classes are numbers from 0 to {CLASSES - 1}")
    if set_name == FAMILIAR:
        return _familiar(data_name, data, tuple(held_out))
    if set_name == HELD_OUT:
        images, labels, _ = _test_file(data_name, data)
        return Pictures(images[torch.isin(labels, torch.tensor(held_out))], None)

    seed, labels = zlib.crc32(f"{data_name}: {set_name}".encode()), None
    generator, count = Generator().manual_seed(seed), TESTED + CONTAMINATING
    if set_name in SHIFTED[data_name]:
        kind, severity = set_name.split()
        images, labels = _testing_half(data_name, data, held_out, TESTED)
        images = shift(images, kind, float(severity), seed=seed)
    elif set_name == "scrambled":
        images = _scrambled(_testing_half(data_name, data, held_out, count).images, generator)
    elif set_name == "half and half":
        images = _half_and_half(data_name, data, held_out, count, generator)
    elif set_name in _DRAWN:
        images = drawn(set_name, count, SHAPES[data_name], generator)
    else:
        images = _foreign(set_name, data_name, data, count, generator)
    return Pictures(compressed(images) if SHAPES[data_name][0] == 3 else images, labels)


def first(data_name: str, data: Path, count: int) -> Tensor:
    """The first pictures of the test file, (count, C, H, W), where it does not matter which."""
    return _at(_file(data_name, "test", data), torch.arange(count))


def training(data_name: str, data: Path, held_out: Sequence[int], count: int | None = None) -> Pictures:
    """The training pictures of the known classes, which are numbered anew.

    Args:
        data_name: ``"mnist"`` or ``"cifar10"``.
        data: The folder of parquet files.
        held_out: Classes that are not known.
        count: How many, the first ones; None means all.
    """
    file = _file(data_name, "train", data)
    rows, labels = _known(file.labels, held_out)
    return Pictures(_at(file, rows[:count]), labels[:count])


def compressed(images: Tensor) -> Tensor:
    """The same pictures after JPEG.

    Args:
        images: (N, 3, H, W) in [0, 1].
    """
    from PIL import Image  # an extra of the package

    def through(pixels: Tensor) -> Tensor:
        Image.fromarray(pixels.numpy()).save(file := BytesIO(), "JPEG", quality=QUALITY)
        with Image.open(file) as image:
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view_as(pixels)

    levels = (255 * images).round().byte().permute(0, 2, 3, 1).contiguous()
    return (torch.stack([through(pixels) for pixels in levels]).permute(0, 3, 1, 2) / 255).contiguous()


# --- sets of files ------------------------------------------------------------------------------------------


def _file(data_name: str, split: str, data: Path, size: int | None = None, colour: bool | None = None) -> ImageDataset:
    colour = data_name == "cifar10" if colour is None else colour
    return parquet(data / f"{data_name}-{split}.parquet", mode="RGB" if colour else "L", size=size)


@lru_cache(maxsize=2)
def _test_file(data_name: str, data: Path) -> Images:
    return _file(data_name, "test", data).load()


def _at(file: ImageDataset, rows: Tensor) -> Tensor:
    """The images of some rows; they are read in ascending order, since files are read by groups of rows."""
    ascending, order = rows.sort()
    return torch.stack([file[row][0] for row in ascending.tolist()])[order.argsort()]


def _known(labels: Tensor, held_out: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows of known classes, and their labels numbered anew."""
    unknown = torch.tensor(sorted(held_out), dtype=torch.long)
    rows = torch.isin(labels, unknown, invert=True).nonzero().flatten()
    return rows, labels[rows] - torch.searchsorted(unknown, labels[rows])


@lru_cache(maxsize=2)
def _familiar(data_name: str, data: Path, held_out: tuple[int, ...]) -> Pictures:
    images, labels, _ = _test_file(data_name, data)
    if not held_out:
        return Pictures(images, labels)
    rows, labels = _known(labels, held_out)
    return Pictures(images[rows], labels)


def _testing_half(data_name: str, data: Path, held_out: Sequence[int], count: int) -> Pictures:
    """The first pictures of the testing half."""
    images, labels = _familiar(data_name, data, tuple(held_out))
    rows = halves(len(images))[1]
    if len(rows) < count:
        raise ValueError(f"the testing half of {data_name} has {len(rows)} pictures; a set needs {count}")
    return Pictures(images[rows[:count]], labels[rows[:count]])


def _foreign(set_name: str, data_name: str, data: Path, count: int, generator: Generator) -> Tensor:
    """Test pictures of another data set: digits in colour, or colour pictures in grey."""
    colour, side = SHAPES[data_name][0] == 3, SHAPES[data_name][1]
    bordered = set_name == "mnist"  # 28 pixels of 32
    file = _file(set_name, "test", data, size=None if bordered else side, colour=colour)
    if len(file) < count:
        raise ValueError(f"{file} has {len(file)} pictures; a set needs {count}")
    images = _at(file, torch.randperm(len(file), generator=generator)[:count])
    return F.pad(images, ((side - images.shape[-1]) // 2,) * 4) if bordered else images


def _scrambled(images: Tensor, generator: Generator) -> Tensor:
    """The blocks of each picture in an order of its own."""
    count, channels, height, width = images.shape
    tall, wide = height // BLOCKS, width // BLOCKS
    blocks = images.view(count, channels, BLOCKS, tall, BLOCKS, wide).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(count, BLOCKS**2, generator=generator).argsort(1)
    blocks = blocks[torch.arange(count)[:, None], order].view(count, BLOCKS, BLOCKS, channels, tall, wide)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def _half_and_half(data_name: str, data: Path, held_out: Sequence[int], count: int, generator: Generator) -> Tensor:
    """The left half of a training picture and the right half of one of another class."""
    file = _file(data_name, "train", data)
    known, labels = _known(file.labels, held_out)
    left = torch.randint(len(known), (count,), generator=generator)
    right = torch.empty_like(left)
    for y in labels[left].unique():
        mine, others = (labels[left] == y).nonzero().flatten(), (labels != y).nonzero().flatten()
        right[mine] = others[torch.randint(len(others), (len(mine),), generator=generator)]
    middle = SHAPES[data_name][2] // 2
    one, other = (_at(file, known[places]) for places in (left, right))
    return torch.cat([one[..., :middle], other[..., middle:]], dim=-1)


# --- sets that are drawn ------------------------------------------------------------------------------------


def drawn(set_name: str, count: int, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """Pictures that are made of no data set, not compressed.

    Args:
        set_name: "textures", "dead leaves", "photographs", "gaussian noise", "uniform noise", "gratings",
            "checkerboards", "blobs" or "salt and pepper".
        count: How many, N.
        shape: Of a picture, (C, H, W).
        generator: Of all that is random.

    Returns:
        (N, C, H, W) in [0, 1].

    Raises:
        ValueError: There is no such set.
    """
    if set_name not in _DRAWN:
        raise ValueError(f"set is {set_name!r}; those that are drawn are {', '.join(_DRAWN)}")
    return _DRAWN[set_name]((count, *shape), generator)


_Shape = tuple[int, int, int, int]


def _uniform(*shape: int, generator: Generator, low: float = 0, high: float = 1) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _colours(shape: _Shape, generator: Generator) -> Tensor:
    """One for each picture, (N, C, 1, 1)."""
    return _uniform(*shape[:2], 1, 1, generator=generator)


def _textures(shape: _Shape, generator: Generator) -> Tensor:
    """Noise of equal power in every octave, as the shift of this name blends it in."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return shift(torch.zeros(shape), "texture", 1, seed=seed)


def _dead_leaves(shape: _Shape, generator: Generator) -> Tensor:
    """Discs over each other, of radii r with a density like 1/r³, which makes pictures look the same at any scale.

    Source: Lee, Mumford and Huang, Occlusion models for natural images (2001).
    """
    count, _, height, width = shape
    small, large = 1.5, max(height, width) / 2
    rows, columns = torch.arange(height).view(-1, 1) + 0.5, torch.arange(width) + 0.5
    images = _colours(shape, generator).expand(shape).clone()
    for _ in range(LEAVES):
        down, across, u = _uniform(3, count, 1, 1, 1, generator=generator)
        squared = 1 / (small**-2 - u * (small**-2 - large**-2))
        inside = (rows - height * down) ** 2 + (columns - width * across) ** 2 < squared
        images = torch.where(inside, _colours(shape, generator), images)
    return images


def _photographs(shape: _Shape, generator: Generator) -> Tensor:
    """Crops of scikit-learn's two photographs, made smaller."""
    from sklearn.datasets import load_sample_images

    found = [torch.tensor(photograph).permute(2, 0, 1) / 255 for photograph in load_sample_images().images]
    if shape[1] == 1:
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        found = [(photograph * luma).sum(0, keepdim=True) for photograph in found]

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    def crop() -> Tensor:
        photograph, side = found[draw(len(found))], CROPS[0] + draw(CROPS[1] - CROPS[0] + 1)
        top, left = (draw(length - side + 1) for length in photograph.shape[1:])
        part = photograph[None, :, top : top + side, left : left + side]
        return F.interpolate(part, shape[2:], mode="bilinear", antialias=True)[0]

    return torch.stack([crop() for _ in range(shape[0])]).clamp(0, 1)


def _gaussian_noise(shape: _Shape, generator: Generator) -> Tensor:
    return (0.5 + 0.25 * torch.randn(shape, generator=generator)).clamp(0, 1)


def _uniform_noise(shape: _Shape, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _gratings(shape: _Shape, generator: Generator) -> Tensor:
    """Waves of one to ten cycles between two colours, in any direction."""
    count, _, height, width = shape
    angle, phase = _uniform(2, count, 1, 1, 1, generator=generator, high=2 * math.pi)
    cycles = _uniform(count, 1, 1, 1, generator=generator, low=1, high=10)
    down, across = torch.arange(height).view(-1, 1) / height, torch.arange(width) / width
    wave = torch.sin(2 * math.pi * cycles * (angle.cos() * across + angle.sin() * down) + phase)
    return torch.lerp(_colours(shape, generator), _colours(shape, generator), (wave + 1) / 2).clamp(0, 1)


def _checkerboards(shape: _Shape, generator: Generator) -> Tensor:
    """Two colours in square cells of one to eight pixels; the first cells may be cut."""
    count, _, height, width = shape
    side = torch.randint(1, 9, (count, 1, 1, 1), generator=generator)
    top, left = torch.randint(16, (2, count, 1, 1, 1), generator=generator)
    odd = ((torch.arange(height).view(-1, 1) + top) // side + (torch.arange(width) + left) // side) % 2
    return torch.where(odd.bool(), _colours(shape, generator), _colours(shape, generator))


def _blobs(shape: _Shape, generator: Generator) -> Tensor:
    """Ones with probability 0.7 and zeros, blurred by 1.5 pixels, and black where less than 0.75 comes out.

    Source: Hendrycks, Mazeika and Dietterich, Deep anomaly detection with outlier exposure (2019).
    """
    ones = (torch.rand(shape, generator=generator) < 0.7).float()
    blurred = shift(ones, "blur", 12 / min(shape[2:]))
    return torch.where(blurred < 0.75, 0, blurred)


def _salt_and_pepper(shape: _Shape, generator: Generator) -> Tensor:
    """A plain colour on which a share of pixels, of each picture's own, is black or white."""
    count, _, height, width = shape
    share = _uniform(count, 1, 1, 1, generator=generator, low=0.1, high=0.9)
    struck, white = _uniform(2, count, 1, height, width, generator=generator)
    return torch.where(struck < share, (white < 0.5).float(), _colours(shape, generator))


_DRAWN: dict[str, Callable[[_Shape, Generator], Tensor]] = {
    "textures": _textures,
    "dead leaves": _dead_leaves,
    "photographs": _photographs,
    "gaussian noise": _gaussian_noise,
    "uniform noise": _uniform_noise,
    "gratings": _gratings,
    "checkerboards": _checkerboards,
    "blobs": _blobs,
    "salt and pepper": _salt_and_pepper,
}
