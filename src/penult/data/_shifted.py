"""A data set under a domain shift."""

from __future__ import annotations

import operator
from typing import Any, final

from torch import Tensor
from torch.utils.data import Dataset

from penult.data._dataset import Transform
from penult.data._shifts import check_shift, shifted

__all__ = ["ShiftedDataset"]


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
