"""Unlabelled activations that bases are fitted to, in memory or on disk, looked at some at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from penult.activations import Activations
from penult.head import Head
from penult.processes import Processes
from penult.special import in_double, in_full

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Pool"]

_ROWS = 1 << 14  # looked at at a time
_LOGITS = 1 << 24  # and logits


@final
class Pool:
    """Activations (N, d) for a head, as a tensor or as an `Activations` that need not fit in memory.

    Iterating gives what the head reads: of pre-activations their positive part. Where processes share the work, it
    gives this one's share; everything else is of all rows, and the same in all processes.

    Attributes:
        processes: Those that share the work.
        rectified: Whether what is stored are pre-activations: `Activations` that say so, and a tensor with negative
            numbers where the head's certificate says that a ReLU stands right before the head.
        declared: Whether the `Activations` say so.
        minimum: The least number stored.
        zeros: Share of exact zeros in what is stored.

    Args:
        head: The head that reads them.
        activations: What to fit to.
        group: Processes that share the rows, each of which has the same head and activations.

    Raises:
        TypeError: They are neither a floating tensor nor `Activations`.
        ValueError: A wrong shape, fewer than two rows, NaN or infinity.
    """

    def __init__(self, head: Head, activations: Tensor | Activations, group: ProcessGroup | None = None) -> None:
        self.processes = Processes(group)
        self._head = head
        self._source: Tensor | Activations
        self.declared = isinstance(activations, Activations) and activations.pre_activation
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
        self._count = self._total = shape[0]
        own = self.processes.share(shape[0])
        self._start, self._source = own.start, self._source[own.start : own.stop]
        self._kept: Tensor | None = None
        bad, zeros, least = 0, 0, float("inf")
        for rows in self.stored:
            if len(rows):
                zeros += int((rows == 0).sum())
                bad += int((~rows.isfinite().all(-1)).sum())
                least = min(least, float(rows.min()))
        bad, zeros = (int(self.processes.total(count)) for count in (bad, zeros))
        self.minimum = self.processes.least(least)
        relu = head.certificate is not None and head.certificate.rectified
        self.rectified = self.declared or (relu and self.minimum < 0)
        self.zeros = zeros / (shape[0] * shape[1])
        if bad:
            raise ValueError(f"{bad} of {shape[0]} activations hold NaN or infinity; leave them out first")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        """The rows in order, (n, d) at a time, on the head's device and in their dtype, as the head reads them."""
        for rows in self.stored:
            yield rows.clamp_min(0) if self.rectified else rows

    @property
    def stored(self) -> Iterable[Tensor]:
        """The same as they are stored, each time it is iterated."""
        kept = None if self._kept is None else self._kept[self._start : self._start + len(self._source)]
        return _Stored(self._source, self._head, kept)

    def posterior(self, stored: Tensor) -> Tensor:
        """The head's class probabilities (n, K) of rows (n, d) as they are stored, float64."""
        rows = stored.clamp_min(0) if self.rectified else stored
        with in_full(rows.device):
            logits: Tensor = self._head(rows.to(self._head.weight))
        return in_double(logits).softmax(-1)

    def only(self, rows: Tensor) -> Pool:
        """A pool of some rows (n,), by their numbers; it stores none of them anew."""
        part: Pool = copy(self)
        part._kept = torch.zeros(self._total, dtype=torch.bool)
        part._kept[rows.cpu() if self._kept is None else self._kept.nonzero()[rows.cpu(), 0]] = True
        part._count = int(part._kept.sum())
        return part

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """At most ``count`` different rows as they are stored, (n, d), all of them if there are no more."""
        if len(self) <= count:
            return self.processes.gather(torch.cat(list(self.stored)))
        chosen = torch.randint(len(self), (count,), generator=generator).unique()
        parts, begin = [], self._before
        for rows in self.stored:
            here = chosen[(chosen >= begin) & (chosen < begin + len(rows))] - begin
            parts.append(rows[here.to(rows.device)])
            begin += len(rows)
        return self.processes.gather(torch.cat(parts))

    @property
    def _before(self) -> int:
        """How many rows of the pool are those of processes before this one."""
        return self._start if self._kept is None else int(self._kept[: self._start].sum())

    def mean(self) -> Tensor:
        """Mean activation (d,), float64."""
        total = in_double(self._head.weight.new_zeros(self._head.in_features))
        for rows in self:
            total += in_double(rows).sum(0)
        return self.processes.sum(total) / len(self)

    def mean_posterior(self) -> Tensor:
        """Mean class probabilities (K,) of the head, float64."""
        total = in_double(self._head.weight.new_zeros(self._head.num_classes))
        for rows in self.stored:
            total += self.posterior(rows).sum(0)
        return self.processes.sum(total) / len(self)


class _Stored:
    def __init__(self, source: Tensor | Activations, head: Head, kept: Tensor | None) -> None:
        self._source, self._kept = source, kept
        self._size = max(1, min(_ROWS, _LOGITS // head.num_classes))
        self._device = head.weight.device

    def __iter__(self) -> Iterator[Tensor]:
        if isinstance(self._source, Tensor):
            parts = iter(self._source.split(self._size))
        else:
            parts = (part.activations for part in self._source.batches(self._size))
            if not len(self._source):
                parts = iter([self._source.activations])  # none, of the right width and dtype
        start = 0
        for rows in parts:
            kept = None if self._kept is None else self._kept[start : start + len(rows)].to(rows.device)
            start += len(rows)
            yield (rows if kept is None else rows[kept]).to(self._device)
