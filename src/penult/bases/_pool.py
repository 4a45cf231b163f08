"""Unlabelled activations that bases are fitted to, in memory or on disk, looked at some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from penult.activations import Activations
from penult.head import Head

__all__ = ["Pool"]

_ROWS = 1 << 14  # looked at at a time
_LOGITS = 1 << 24  # and logits


@final
class Pool:
    """Activations (N, d) for a head, as a tensor or as an `Activations` that need not fit in memory.

    Args:
        head: The head that reads them.
        activations: What to fit to.

    Raises:
        TypeError: They are neither a floating tensor nor `Activations`.
        ValueError: A wrong shape, fewer than two rows, NaN or infinity.
    """

    def __init__(self, head: Head, activations: Tensor | Activations) -> None:
        self._head = head
        self._source: Tensor | Activations
        if isinstance(activations, Activations):
            shape: tuple[int, ...] = (len(activations), activations.in_features)
            self._source = activations
        elif isinstance(activations, Tensor) and activations.is_floating_point():
            shape = tuple(activations.shape)
            self._source = activations.detach()
        else:
            what = activations.dtype if isinstance(activations, Tensor) else type(activations).__name__
            raise TypeError(f"activations must be a floating tensor (N, d) or Activations, got {what}")
        if len(shape) != 2 or shape[1] != head.in_features or shape[0] < 2:
            raise ValueError(f"activations has shape {shape}; expected (N, {head.in_features}) with N >= 2")
        self._count = shape[0]
        bad = sum(int((~rows.isfinite().all(-1)).sum()) for rows in self)
        if bad:
            raise ValueError(f"{bad} of {shape[0]} activations hold NaN or infinity; leave them out first")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        """All rows in order, (n, d) at a time, on the head's device and as they are stored."""
        size = max(1, min(_ROWS, _LOGITS // self._head.num_classes))
        device = self._head.weight.device
        if isinstance(self._source, Tensor):
            yield from (rows.to(device) for rows in self._source.split(size))
        else:
            yield from (part.activations.to(device) for part in self._source.batches(size))

    def mean(self) -> Tensor:
        """Mean activation (d,), float64."""
        total = torch.zeros(self._head.in_features, dtype=torch.float64, device=self._head.weight.device)
        for rows in self:
            total += rows.sum(0, dtype=torch.float64)
        return total / len(self)

    def mean_posterior(self) -> Tensor:
        """Mean class probabilities (K,) of the head, float64."""
        total = torch.zeros(self._head.num_classes, dtype=torch.float64, device=self._head.weight.device)
        for rows in self:
            total += self._head(rows.to(self._head.weight)).double().softmax(-1).sum(0)
        return total / len(self)
