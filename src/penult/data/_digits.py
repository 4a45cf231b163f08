"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Images", "digits"]


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


def digits() -> Images:
    """The 1797 handwritten digits of 8×8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998).

    Returns:
        Images (1797, 1, 8, 8) in [0, 1].

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> train, test = digits().split(0.8, 0.2)
        >>> train.images.shape, test.images.shape
        (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "penult[data]"', name=error.name) from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return Images(images, torch.tensor(bunch.target), tuple(map(str, range(10))))
