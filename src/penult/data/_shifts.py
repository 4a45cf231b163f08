"""Domain shifts of images, and data sets under a domain shift."""

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

from penult._checks import check_between, check_choice, check_floating, check_integer
from penult.data._dataset import Transform

__all__ = ["SHIFTS", "Draws", "ShiftedDataset", "check_shift", "crops", "procedural", "shift", "shifted"]

# --- Random numbers of images -------------------------------------------------------------------------------


class Draws:
    """Random tensors for the images ``first`` to ``first + count - 1``, which depend on seed and number only.

    They are sampled on the CPU, one image after the other, each with its own seed.
    """

    def __init__(self, seed: int, first: int, count: int) -> None:
        self._seed, self._numbers = operator.index(seed), range(first, first + count)

    def __call__(self, sample: Callable[[Generator], Tensor]) -> Tensor:
        """Sample one tensor for each image, and stack them."""
        generator, offset = Generator(), _mixed(self._seed)
        return torch.stack([sample(generator.manual_seed(_mixed(number ^ offset))) for number in self._numbers])


def _mixed(x: int) -> int:
    """Apply the 32-bit finalizer of MurmurHash3 (Appleby, 2011), a bijection; torch uses 32 bits of a seed."""
    x &= 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


# --- Textures -----------------------------------------------------------------------------------------------


def procedural(draws: Draws, shape: Sequence[int]) -> Tensor:
    """Sample coloured noise, float32 (n, C, H, W) in [0, 1].

    The amplitude is 1/f, which gives equal power in every octave. The standard deviation, which includes that of the
    mean of a texture, is 1/4 before values are clamped to [0, 1]. Two channels have a correlation of 0.64.
    """
    channels, height, width = shape
    amplitude = _amplitude(height, width)
    # One field for each channel and one that they share. A complex field has two of them as real and imaginary part.
    fields = channels + (channels > 1)
    pairs = (-(-fields // 2), height, width)

    def sample(generator: Generator) -> Tensor:
        white = torch.randn(pairs, dtype=torch.complex64, generator=generator, device="cpu")
        field: Tensor = torch.fft.ifft2(white * amplitude)
        return field

    noise = torch.view_as_real(draws(sample)).movedim(-1, 2).flatten(1, 2)[:, :fields]
    if channels > 1:
        noise = 0.8 * noise[:, :1] + 0.6 * noise[:, 1:]
    return (noise + 0.5).clamp(0, 1)


@lru_cache(maxsize=8)
def _amplitude(height: int, width: int) -> Tensor:
    """Return the amplitudes (height, width) of the Fourier coefficients, constant below one cycle per image."""
    cycles = [torch.fft.fftfreq(side, dtype=torch.float64) * max(height, width) for side in (height, width)]
    amplitude = 1 / torch.hypot(cycles[0][:, None], cycles[1]).clamp_min(1)
    return (amplitude * (2 * height * width / amplitude.square().mean()).sqrt() / 4).float()


def crops(draws: Draws, shape: Sequence[int], textures: Tensor) -> Tensor:
    """Sample random crops (n, C, H, W) of given textures (M, C, h, w).

    Raises:
        ValueError: The textures are smaller than the images, or have another number of channels.
    """
    channels, height, width = shape
    count, depth, tall, wide = textures.shape
    if tall < height or wide < width:
        raise ValueError(f"textures are {tall}×{wide}; expected at least {height}×{width}, the size of the images")
    if depth not in (1, channels):
        raise ValueError(f"textures have {depth} channels; expected {channels}, as the images, or 1")
    limits = (count, tall - height + 1, wide - width + 1)

    def sample(generator: Generator) -> Tensor:
        which, top, left = (int(torch.randint(limit, (), generator=generator, device="cpu")) for limit in limits)
        return textures[which, :, top : top + height, left : left + width].expand(*shape)

    return draws(sample)


# --- Shifts -------------------------------------------------------------------------------------------------


# Number of images that are shifted at a time.
_CHUNK = 64


def shift(
    images: Tensor, kind: str, severity: float, *, seed: int = 0, first: int = 0, textures: Tensor | None = None
) -> Tensor:
    """Apply a domain shift to images.

    Severity 0 is the identity and 1 the strongest shift. With severity s and an image x of height H and width W:

    - ``"texture"``: (1 − s) x + s t with a texture t for each image: coloured noise of equal power in every octave
      (amplitude 1/f, as in natural images: Field, Relations between the statistics of natural images and the response
      properties of cortical cells, 1987), grey for images of one channel; or a crop of `textures`.
    - ``"noise"``: Gaussian noise of standard deviation s on each value, clamped to [0, 1].
    - ``"blur"``: Gaussian of standard deviation s min(H, W) / 8 pixels, renormalised at the edges.
    - ``"rotation"``: by 90 s degrees counterclockwise around the centre, bilinear, black outside of the image.
    - ``"inversion"``: (1 − s) x + s (1 − x), which is grey everywhere at s = 1/2.
    - ``"pixelation"``: means over square blocks of side min(H, W)^s pixels, rounded up, from the upper left corner.
    - ``"contrast"``: (1 − s) x + s times the mean of each channel.

    Random numbers depend on `seed` and the number of an image only, so that an image is changed in the same way in
    every batch: ``shift(x)[5:10]`` equals ``shift(x[5:10], first=5)``. They are sampled on the CPU, and the global
    random state of torch is not changed.

    Args:
        images: (N, C, H, W), floating, in [0, 1].
        kind: One of `SHIFTS`.
        severity: Number from 0 to 1.
        seed: Seed of the random numbers; only its last 32 bits are used.
        first: Number of the first image.
        textures: (M, C, h, w) in [0, 1], at least as large as the images, with their number of channels or one. For
            ``"texture"`` only.

    Returns:
        (N, C, H, W) in [0, 1], of the dtype and on the device of `images`.

    Raises:
        TypeError: `images` or `textures` are not floating, or `severity` or `first` is of a wrong type.
        ValueError: A shape is wrong; values are outside [0, 1]; `kind` is unknown; `severity` is out of range; `first`
            is negative; or `textures` are too small, or are given for another kind.

    Example:
        >>> x = torch.rand(8, 1, 28, 28)
        >>> noisy = shift(x, "noise", 0.3, seed=1)
        >>> torch.equal(noisy[3:5], shift(x[3:5], "noise", 0.3, seed=1, first=3))
        True
    """
    check_shift(kind, severity, textures)
    return shifted(images, kind, severity, seed, first, textures)


def shifted(images: Tensor, kind: str, severity: float, seed: int, first: int, textures: Tensor | None) -> Tensor:
    """Apply `shift` to arguments that `check_shift` has checked."""
    _check_images("images", images)
    first = check_integer("first", first, 0)
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
    """Raise unless kind, severity and textures are arguments for `shift`."""
    check_choice("kind", kind, SHIFTS)
    check_between("severity", severity, inclusive=True)
    if textures is not None:
        if kind != "texture":
            raise ValueError(f"kind is {kind!r}, which takes no textures; expected 'texture'")
        _check_images("textures", textures)
        if not len(textures):
            raise ValueError(f"textures has shape {tuple(textures.shape)}; expected at least one texture")


def _check_images(name: str, images: Tensor) -> None:
    check_floating(name, images, "(N, C, H, W)")
    if images.ndim != 4 or not all(images.shape[1:]):
        raise ValueError(f"{name} has shape {tuple(images.shape)}; expected (N, C, H, W)")
    if len(images):
        low, high = map(float, images.detach().aminmax())
        # Written so that NaN is refused, too.
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name} has values from {low:.3g} to {high:.3g}; expected 0 to 1. Shift before normalising"
            )


# There is one function for each kind, (images (n, C, H, W), severity, draws, textures) -> images. The rounding of sums
# and matrix products depends on the size of a batch, so these are computed image by image; elementwise operations are
# not.


def _texture(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    t = procedural(draws, x.shape[1:]) if textures is None else crops(draws, x.shape[1:], textures)
    return (1 - s) * x + s * t.to(x)


def _noise(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    return x + s * draws(lambda generator: torch.randn(x.shape[1:], generator=generator, device="cpu")).to(x)


def _blur(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    rows, columns = (_smoother(side, s * min(x.shape[2:]) / 8).to(x) for side in x.shape[2:])
    # The image is copied, since the rounding of a product can depend on the address of its first value.
    return torch.stack([rows @ image.clone() @ columns.T for image in x])


@lru_cache(maxsize=8)
def _smoother(side: int, deviation: float) -> Tensor:
    """Return Gaussian weights (side, side) with rows that sum to 1."""
    pixels = torch.arange(side, dtype=torch.float64, device="cpu")
    return torch.softmax(-(((pixels[:, None] - pixels) / deviation) ** 2) / 2, dim=1)


def _rotation(x: Tensor, s: float, draws: Draws, textures: Tensor | None) -> Tensor:
    grid = _rotated(x.shape[2], x.shape[3], s * math.pi / 2).to(x)
    return torch.cat([functional.grid_sample(image, grid, align_corners=False) for image in x.split(1)])


@lru_cache(maxsize=8)
def _rotated(height: int, width: int, angle: float) -> Tensor:
    """Return the source of each pixel (1, height, width, 2), in coordinates from -1 to 1 (horizontal, vertical)."""
    c, d = math.cos(angle), math.sin(angle)
    affine = torch.tensor(
        [[[c, -d * height / width, 0], [d * width / height, c, 0]]], dtype=torch.float64, device="cpu"
    )
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
"""Names of the domain shifts of `shift`."""


# --- A data set under a domain shift ------------------------------------------------------------------------


@final
class ShiftedDataset(Dataset[Any]):
    """Data set under a domain shift: item i is item i of `dataset`, with its image shifted as number i.

    Args:
        dataset: Map-style data set whose items are images (C, H, W) in [0, 1], or tuples that begin with one.
        kind: As in `shift`.
        severity: As in `shift`.
        seed: As in `shift`.
        textures: As in `shift`.
        transform: Function that is applied to each shifted image. Normalise here, since shifts are defined for values
            in [0, 1].

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
        image, *targets = (item,) if isinstance(item, Tensor) else item
        image = shifted(image[None], self._kind, self._severity, self._seed, position, self._textures)[0]
        if self._transform is not None:
            image = self._transform(image)
        return image if isinstance(item, Tensor) else (image, *targets)

    def __repr__(self) -> str:
        return f"ShiftedDataset({self._dataset!r}, {self._kind!r}, {self._severity:g}, seed={self._seed})"
