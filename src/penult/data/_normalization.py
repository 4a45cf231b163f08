"""Normalisation of images, channel by channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

__all__ = ["Normalization", "PerChannel"]

PerChannel = float | Sequence[float] | Tensor | None


@final
class Normalization(nn.Module):
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    Args:
        mean: One number, or one for each channel. Default: 0.
        std: One positive number, or one for each channel. Default: 1.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is not finite, or a standard deviation is not positive.
    """

    def __init__(self, mean: PerChannel = None, std: PerChannel = None) -> None:
        super().__init__()
        self.mean = _numbers("mean", 0.0 if mean is None else mean)
        self.std = _numbers("std", 1.0 if std is None else std)
        if min(self.std) <= 0:
            raise ValueError(f"std is {std}; expected positive numbers")

    @classmethod
    def of(cls, mean: PerChannel, std: PerChannel) -> Normalization | None:
        """Return the normalisation with this mean and standard deviation; None if neither is given."""
        return None if mean is None and std is None else cls(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (*B, C, H, W) in [0, 1] to images of the same shape.

        Raises:
            ValueError: There is another number of means or standard deviations than of channels.
        """
        channels = images.shape[-3]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                plural = "s" if channels > 1 else ""
                raise ValueError(
                    f"{name} has {len(values)} values, but the images have {channels} channel{plural}; expected one "
                    "value, or one for each channel. Convert the images with mode, or give other values"
                )
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def _numbers(name: str, values: float | Sequence[float] | Tensor) -> tuple[float, ...]:
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} is {values!r}; expected one number, or one for each channel") from None
    # One number for each channel is often given as (C, 1, 1), to be broadcast.
    per_channel = tuple(map(float, numbers.flatten()))
    if not per_channel or numbers.numel() != max(numbers.shape, default=1) or not all(map(math.isfinite, per_channel)):
        raise ValueError(f"{name} is {values}; expected one finite number, or one for each channel")
    return per_channel
