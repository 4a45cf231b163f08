"""Domain shifts: the same images under other conditions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from penult.data._draws import Draws
from penult.data._textures import crops, procedural

__all__ = ["SHIFTS", "check_shift", "shift", "shifted"]

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
