"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import torch

from penult._extras import extra
from penult.data._images import Images

__all__ = ["digits"]


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
    bunch = extra("sklearn.datasets", "the digits come with scikit-learn").load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return Images(images, torch.tensor(bunch.target), tuple(map(str, range(10))))
