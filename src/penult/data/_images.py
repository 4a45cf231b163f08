"""Labelled images in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Images"]


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
