"""Images that ``penult generate`` trains on and judges by, and how a classifier takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from penult.cli import sources
from penult.cli.training import loader_of
from penult.data import ImageDataset

__all__ = ["Normalized", "Share", "first_images"]

_MEMORY = 1 << 30  # bytes of images that are looked at together


@dataclass(frozen=True)
class Share:
    """Images to train on, or to judge by, with numbers of those that are used and labels of all, if there are."""

    dataset: ImageDataset
    places: Tensor

    @property
    def images(self) -> Any:
        """The images as a data set."""
        return Subset(self.dataset, self.places.tolist())

    def some(self, most: int, seed: int, loading: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, H, W) and labels (N,) of a random part, as much as there is memory for."""
        nbytes = 4 * first_images(self.dataset, 1).numel()
        count = min(most, max(1, _MEMORY // nbytes), len(self.places))
        order = torch.randperm(len(self.places), generator=torch.Generator().manual_seed(seed))[:count]
        part = replace(self, places=self.places[order.sort().values])
        batches = [batch if isinstance(batch, Tensor) else batch[0] for batch in loader_of(part.images, **loading)]
        return torch.cat(batches), None if self.dataset.labels is None else self.dataset.labels[part.places]


class Normalized(nn.Module):
    """Images in [0, 1] as a classifier takes them."""

    def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to images of the same shape."""
        return self.by(x)


def first_images(dataset: ImageDataset, count: int) -> Tensor:
    """The first images, which have to be of one size."""
    try:
        return sources.first_images(dataset, count)
    except RuntimeError as error:
        raise ValueError(f"images are not all of one size ({error}); give --size, --mode") from error
