"""Textures to blend images with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor

from penult.data._draws import Draws

__all__ = ["crops", "procedural"]


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
