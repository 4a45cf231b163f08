"""Random draws that belong to images rather than to batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

__all__ = ["Draws"]


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
