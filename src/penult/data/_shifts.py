"""Domain shifts: the same images under other conditions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, final

import torch
from torch import Generator, Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from penult.data._dataset import Transform

__all__ = ["SHIFTS", "Draws", "ShiftedDataset", "check_shift", "crops", "procedural", "shift", "shifted"]

# --- Random draws that belong to images rather than to batches ----------------------------------------------


class Draws:
    """Random tensors for images number ``first`` to ``first + count - 1``, functions of seed and number alone.

    They are drawn on the CPU, one image after the other, each from a seed of its own.
    """

    def __init__(self, seed: int, first: int, count: int) -> None:
        self._seed, self._numbers = seed, range(first, first + count)

    def __call__(self, draw: Callable[[Generator], Tensor]) -> Tensor:
        """One draw for each image, stacked."""
        generator, offset = Generator(), _mixed(self._seed)
        return torch.stack([draw(generator.manual_seed(_mixed(number ^ offset))) for number in self._numbers])


def _mixed(x: int) -> int:
    """The bijection of 32 bits that ends MurmurHash3 (Appleby, 2011); torch seeds with no more than 32 bits."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


# --- Textures to blend images with --------------------------------------------------------------------------


def procedural(draws: Draws, shape: Sequence[int]) -> Tensor:
    """Coloured noise, float32 (n, C, H, W) in [0, 1].

    The amplitude is 1/f, which puts equal power in every octave. The standard deviation is 1/4 before values are cut
    off at 0 and 1, the mean of a texture included. Two channels correlate to 0.64.
    """
    channels, height, width = shape
    amplitude = _amplitude(height, width)
    fields = channels + (channels > 1)  # one for each channel, and one that they share
    pairs = (-(-fields // 2), height, width)  # real part and imaginary

    def draw(generator: Generator) -> Tensor:
        white = torch.randn(pairs, dtype=torch.complex64, generator=generator)
        field: Tensor = torch.fft.ifft2(white * amplitude)
        return field

    noise = torch.view_as_real(draws(draw)).movedim(-1, 2).flatten(1, 2)[:, :fields]
    if channels > 1:
        noise = 0.8 * noise[:, :1] + 0.6 * noise[:, 1:]
    return (noise + 0.5).clamp(0, 1)


@lru_cache(maxsize=8)
def _amplitude(height: int, width: int) -> Tensor:
    """Amplitudes (height, width) of the Fourier coefficients; the longest wave is as long as the image."""
    cycles = [torch.fft.fftfreq(side, dtype=torch.float64) * max(height, width) for side in (height, width)]
    amplitude = 1 / torch.hypot(cycles[0][:, None], cycles[1]).clamp_min(1)
    return (amplitude * (2 * height * width / amplitude.square().mean()).sqrt() / 4).float()


def crops(draws: Draws, shape: Sequence[int], textures: Tensor) -> Tensor:
    """Random crops (n, C, H, W) of given textures (M, C, h, w).

    Raises:
        ValueError: They are smaller than the images, or of another number of channels.
    """
    channels, height, width = shape
    count, depth, tall, wide = textures.shape
    if tall < height or wide < width:
        raise ValueError(f"textures are {tall}×{wide}, smaller than the images of {height}×{width}")
    if depth not in (1, channels):
        raise ValueError(f"textures have {depth} channels and images {channels}; expected the same number, or 1")
    limits = (count, tall - height + 1, wide - width + 1)

    def draw(generator: Generator) -> Tensor:
        which, top, left = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
        return textures[which, :, top : top + height, left : left + width].expand(*shape)

    return draws(draw)


_CHUNK = 64  # images that are changed at a time


def shift(
    images: Tensor, kind: str, severity: float, *, seed: int = 0, first: int = 0, textures: Tensor | None = None
) -> Tensor:
    """The same images under other conditions.

    Severity 0 is the identity and 1 the strongest. With s for the severity, x for an image of height H and width W:

    - ``"texture"``: (1 − s) x + s t with a texture t of the image's own: coloured noise of equal power in every
      octave (amplitude 1/f, as in natural images: Field, Relations between the statistics of natural images and the
      response properties of cortical cells, 1987), grey for images of one channel; or a crop of `textures`.
    - ``"noise"``: Gaussian noise of standard deviation s on each value, cut off at 0 and 1.
    - ``"blur"``: Gaussian of standard deviation s min(H, W) / 8 pixels, renormalised at the edges.
    - ``"rotation"``: by 90 s degrees counterclockwise about the middle, bilinear, black where nothing was.
    - ``"inversion"``: (1 − s) x + s (1 − x); all is grey at s = 1/2.
    - ``"pixelation"``: means over square blocks of side min(H, W)^s pixels, rounded up, from the upper left corner.
    - ``"contrast"``: (1 − s) x + s times the mean of each channel.

    Randomness is a function of `seed` and of an image's number alone, so that each image is changed in the same way
    in whatever batch it comes: ``shift(x)[5:10]`` equals ``shift(x[5:10], first=5)``. It is drawn on the CPU, and
    torch's own random state is left alone.

    Args:
        images: (N, C, H, W), floating, in [0, 1].
        kind: One of `SHIFTS`.
        severity: Between 0 and 1.
        seed: Seed of what is random; its last 32 bits count.
        first: Number of the first image.
        textures: (M, C, h, w) in [0, 1], at least as large as the images, with their number of channels or one;
            for ``"texture"`` only.

    Returns:
        (N, C, H, W) in [0, 1], of the dtype and on the device of `images`.

    Raises:
        TypeError: `images` or `textures` are not floating.
        ValueError: Another shape, values outside [0, 1], an unknown `kind`, `severity` out of range, `first`
            negative, or `textures` that are too small or of no use.

    Example:
        >>> x = torch.rand(8, 1, 28, 28)
        >>> noisy = shift(x, "noise", 0.3, seed=1)
        >>> torch.equal(noisy[3:5], shift(x[3:5], "noise", 0.3, seed=1, first=3))
        True
    """
    check_shift(kind, severity, textures)
    return shifted(images, kind, severity, seed, first, textures)


def shifted(images: Tensor, kind: str, severity: float, seed: int, first: int, textures: Tensor | None) -> Tensor:
    """`shift` after `check_shift`."""
    _check_images("images", images)
    first = operator.index(first)
    if first < 0:
        raise ValueError(f"first is {first}; images are counted from 0")
    if severity == 0:
        return images.clone()
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), _CHUNK):
        x = images[start : start + _CHUNK].contiguous()
        x = x if x.dtype == torch.float64 else x.float()
        changed = _KINDS[kind](x, float(severity), Draws(seed, first + start, len(x)), textures)
        out[start : start + _CHUNK] = changed.clamp(0, 1)
    return out


def check_shift(kind: str, severity: float, textures: Tensor | None) -> None:
    """Refuse what `shift` does not know."""
    if kind not in _KINDS:
        raise ValueError(f"there is no shift {kind!r}; the kinds are {', '.join(SHIFTS)}")
    if not 0 <= severity <= 1:
        raise ValueError(f"severity is {severity}; it must lie between 0 (no shift) and 1")
    if textures is not None:
        if kind != "texture":
            raise ValueError(f'textures are of no use to {kind!r}; they are for "texture"')
        _check_images("textures", textures)
        if not len(textures):
            raise ValueError("textures holds no texture at all")


def _check_images(name: str, images: Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(f"{name} are {images.dtype}; they must be floating, in [0, 1]")
    if images.ndim != 4 or not all(images.shape[1:]):
        raise ValueError(f"{name} have shape {tuple(images.shape)}; expected (N, C, H, W)")
    if len(images):
        low, high = map(float, images.detach().aminmax())
        if not (low >= 0 and high <= 1):  # NaN as well
            raise ValueError(f"{name} run from {low:.3g} to {high:.3g}; expected [0, 1]: shift before normalising")


# One function a kind: (images (n, C, H, W), severity, draws, textures) -> images. What rounds in a way that depends on
# the size of a batch (sums, products of matrices) is done image by image; single operations on each value are not.


def _texture(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    t = procedural(draws, x.shape[1:]) if textures is None else crops(draws, x.shape[1:], textures)
    return (1 - s) * x + s * t.to(x)


def _noise(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    return x + s * draws(lambda generator: torch.randn(x.shape[1:], generator=generator)).to(x)


def _blur(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    rows, columns = (_smoother(side, s * min(x.shape[2:]) / 8).to(x) for side in x.shape[2:])
    # copies, since a product may round otherwise where an image begins elsewhere in memory
    return torch.stack([rows @ image.clone() @ columns.T for image in x])


@lru_cache(maxsize=8)
def _smoother(side: int, deviation: float) -> Tensor:
    """Gaussian weights (side, side) with rows that sum to 1."""
    places = torch.arange(side, dtype=torch.float64)
    return torch.softmax(-(((places[:, None] - places) / deviation) ** 2) / 2, dim=1)


def _rotation(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    grid = _rotated(x.shape[2], x.shape[3], s * math.pi / 2).to(x)
    return torch.cat([functional.grid_sample(image, grid, align_corners=False) for image in x.split(1)])


@lru_cache(maxsize=8)
def _rotated(height: int, width: int, angle: float) -> Tensor:
    """Where each pixel comes from (1, height, width, 2), in coordinates from -1 to 1 across and down."""
    c, d = math.cos(angle), math.sin(angle)
    affine = torch.tensor([[[c, -d * height / width, 0], [d * width / height, c, 0]]], dtype=torch.float64)
    return functional.affine_grid(affine, [1, 1, height, width], align_corners=False)


def _inversion(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    return (1 - s) * x + s * (1 - x)


def _pixelation(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    height, width = x.shape[2:]
    block = math.ceil(min(height, width) ** s)
    means = torch.stack([functional.avg_pool2d(image, block, ceil_mode=True) for image in x])
    return means.repeat_interleave(block, 2)[:, :, :height].repeat_interleave(block, 3)[..., :width]


def _contrast(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    return (1 - s) * x + s * torch.stack([image.mean((1, 2), keepdim=True) for image in x])


_KINDS: dict[str, Callable[[Tensor, float, Draws, Tensor | None], Tensor]] = {
    "texture": _texture,
    "noise": _noise,
    "blur": _blur,
    "rotation": _rotation,
    "inversion": _inversion,
    "pixelation": _pixelation,
    "contrast": _contrast,
}

SHIFTS = tuple(_KINDS)
"""Names of the domain shifts that `shift` knows."""


# --- A data set under a domain shift ------------------------------------------------------------------------


@final
class ShiftedDataset(Dataset[Any]):
    """A data set under a domain shift: item i is item i of `dataset`, its image changed by `shift` as number i.

    Args:
        dataset: A map-style data set whose items are images (C, H, W) in [0, 1], or tuples that begin with one.
        kind: As in `shift`.
        severity: As in `shift`.
        seed: As in `shift`.
        textures: As in `shift`.
        transform: Called on each shifted image; normalise here, since shifts are defined for values in [0, 1].

    Attributes:
        labels: Those of `dataset`; None if it has none.
        class_names: Those of `dataset`; None if it has none.

    Raises:
        TypeError: `textures` are not floating.
        ValueError: As in `shift`.

    Example:
        >>> from penult.data import read
        >>> dataset = ShiftedDataset(read("digits"), "texture", 0.5)
        >>> image, label = dataset[7]
        >>> image.shape, label, len(dataset)
        (torch.Size([1, 8, 8]), 7, 1797)
    """

    labels: Tensor | None
    class_names: tuple[str, ...] | None

    def __init__(
        self,
        dataset: Dataset[Any],
        kind: str,
        severity: float,
        seed: int = 0,
        textures: Tensor | None = None,
        transform: Transform = None,
    ) -> None:
        check_shift(kind, severity, textures)
        self.labels = getattr(dataset, "labels", None)
        self.class_names = getattr(dataset, "class_names", None)
        self._dataset, self._transform = dataset, transform
        self._kind, self._severity, self._seed, self._textures = kind, severity, seed, textures

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"there is no image {position} among {len(self)}")
        position %= len(self)
        item = self._dataset[position]
        image, *rest = (item,) if isinstance(item, Tensor) else item
        image = shifted(image[None], self._kind, self._severity, self._seed, position, self._textures)[0]
        if self._transform is not None:
            image = self._transform(image)
        return image if isinstance(item, Tensor) else (image, *rest)

    def __repr__(self) -> str:
        return f"ShiftedDataset({self._dataset!r}, {self._kind!r}, {self._severity:g}, seed={self._seed})"
