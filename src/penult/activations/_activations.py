"""Activations of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from penult.head._checks import check_labels

__all__ = ["Activations"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """Penultimate activations of a data set, with the logits and, where known, the labels.

    Attributes:
        activations: (N, d).
        logits: (N, K).
        labels: (N,) integers in 0..K-1, or None.
        class_names: K names, or None.

    Raises:
        TypeError: Activations or logits are not floating, or labels are no integers.
        ValueError: Shapes or devices that do not fit each other, or a label out of range.

    Example:
        >>> acts = Activations(torch.randn(5, 8), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
        >>> acts
        Activations(N=5, d=8, K=3, labels=True, dtype=torch.float32, device=cpu)
        >>> len(acts[acts.labels == 0])
        2
    """

    activations: Tensor
    logits: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        h, logits = self.activations, self.logits
        for name, value in (("activations", h), ("logits", logits)):
            if not value.is_floating_point():
                raise TypeError(f"{name} are {value.dtype}; they must be floating")
        if h.ndim != 2 or logits.ndim != 2 or len(h) != len(logits):
            raise ValueError(
                f"activations have shape {tuple(h.shape)} and logits {tuple(logits.shape)}; they must be "
                "(N, d) and (N, K)"
            )
        if self.labels is not None:
            check_labels(self.labels, logits.shape)
        devices = {value.device for value in (h, logits, self.labels) if value is not None}
        if len(devices) > 1:
            raise ValueError(f"activations, logits and labels must be on one device, not {sorted(map(str, devices))}")
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(self.class_names))
            if len(self.class_names) != logits.shape[1]:
                raise ValueError(f"there are {len(self.class_names)} class_names for {logits.shape[1]} classes")

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, index: Any) -> Activations:  # a slice, indices (M,) or a mask (N,)
        if isinstance(index, int):
            raise TypeError(f"acts[{index}] would be no set; use acts[{index} : {index + 1}]")
        labels = None if self.labels is None else self.labels[index]
        return Activations(self.activations[index], self.logits[index], labels, self.class_names)

    def __repr__(self) -> str:
        (count, features), classes = self.activations.shape, self.logits.shape[1]
        return (
            f"Activations(N={count}, d={features}, K={classes}, labels={self.labels is not None}, "
            f"dtype={self.activations.dtype}, device={self.activations.device})"
        )

    @property
    def predicted(self) -> Tensor:
        """The class of the largest logit, (N,)."""
        return self.logits.argmax(dim=1)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> Activations:
        """The same on another device or in another precision.

        Args:
            device: Where to; a dtype will do here as well.
            dtype: A floating dtype for activations and logits; labels stay integers.

        Example:
            >>> Activations(torch.zeros(2, 3), torch.zeros(2, 2)).to(torch.float64).logits.dtype
            torch.float64
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        labels = None if self.labels is None else self.labels.to(device)
        return Activations(self.activations.to(device, dtype), self.logits.to(device, dtype), labels, self.class_names)
