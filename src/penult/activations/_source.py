"""One source of activation rows for every fit, score, comparison and command: checked once, read in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from penult._checks import as_activations, integer_labels
from penult._row_blocks import digest_of, rows_digest
from penult.activations._activations import Activations
from penult.head import Head
from penult.processes import Processes
from penult.special import in_double, in_full

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ActivationSource"]

_ROWS = 1 << 14  # of a block
_LOGITS = 1 << 24  # of a block


@final
class ActivationSource:
    """Rows of activations (N, d), as a tensor, an array or `Activations` that need not fit in memory.

    Iterating yields blocks (n, d) as the head reads them: max(u, 0) if the rows are pre-activations u. Where processes
    share the rows, each iterates over its own share; everything else is of all rows, and the same in all processes.

    Args:
        activations: Floating tensor or array (N, d), or `Activations`.
        head: Head that reads them: it fixes d, and rows are moved to its device. None: any d, and rows stay where they
            are.
        labels: Labels (N,) of any integer dtype, or None.
        name: Name of the activations in messages.
        min_rows: Fewest rows.
        dtype: Dtype that rows are converted to; ``"wide"`` for float32 or wider; None keeps their dtype.
        group: Processes that share the rows; each passes the same head and activations.

    Attributes:
        processes: The processes that share the rows.
        in_features: d.
        dtype: Dtype of the blocks.
        class_names: Names that the `Activations` have, or None.
        declared: Whether the `Activations` say that they are pre-activations.
        rectified: Whether the rows are pre-activations u, so that blocks are max(u, 0): if `declared`, or if a value is
            negative and the head's certificate says that a ReLU stands right before the head.
        minimum: Smallest value.
        zeros: Fraction of values that are exactly zero.
        digest: Digest of the whole set of rows as they are stored, in float32: it depends on no order of the rows, and
            says nothing of a single one.

    Raises:
        TypeError: The activations are neither floating, as a tensor or array, nor `Activations`; or the labels are not
            integers.
        ValueError: A wrong shape, too few rows, NaN or infinity, or not one label for each row.
    """

    def __init__(
        self,
        activations: Tensor | Activations,
        head: Head | None = None,
        *,
        labels: Any = None,
        name: str = "activations",
        min_rows: int = 1,
        dtype: torch.dtype | Literal["wide"] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.processes = Processes(group)
        self._head = head
        self.declared = isinstance(activations, Activations) and activations.pre_activation
        if not isinstance(activations, Activations):
            activations = as_activations(activations, name, "(N, d) or penult.Activations").detach()
        shape = _shape(activations)
        width = "d" if head is None else head.in_features
        if len(shape) != 2 or shape[0] < min_rows or shape[1] < 1 or width not in ("d", shape[1]):
            raise ValueError(f"{name} has shape {shape}; expected (N, {width}) with N >= {min_rows}")
        self.in_features = shape[1]
        stored = activations.dtype
        self.dtype = torch.promote_types(stored, torch.float32) if dtype == "wide" else dtype or stored
        self.class_names = activations.class_names if isinstance(activations, Activations) else None
        self._labels = None if labels is None else integer_labels(labels, shape[:1]).cpu()
        self._count = self._total = shape[0]
        self._all = activations
        own = self.processes.share(shape[0])
        self._start, self._own = own.start, activations[own.start : own.stop]
        self._kept: Tensor | None = None
        self._scan(name)

    def _scan(self, name: str) -> None:
        """Look for values that are not finite, count zeros, and find the smallest value."""
        bad, zeros, minimum, hashes = 0, 0, float("inf"), 0
        for rows in self.stored:
            if len(rows):
                zeros += int((rows == 0).sum())
                bad += int((~rows.isfinite().all(-1)).sum())
                minimum = min(minimum, float(rows.min()))
                hashes += rows_digest(rows)
        bad, zeros = (int(self.processes.total(count)) for count in (bad, zeros))
        if bad:
            raise ValueError(f"{bad} of {self._total} rows of {name} hold NaN or infinity; leave them out first")
        self.minimum = self.processes.least(minimum)
        self.zeros = zeros / (self._total * self.in_features) if self._total else 0.0
        self.digest = digest_of(self._total, self.processes.objects(hashes))
        certificate = None if self._head is None else self._head.certificate
        relu = certificate is not None and certificate.rectified
        self.rectified = self.declared or (relu and self.minimum < 0)

    @property
    def head(self) -> Head:
        """The head that reads the rows. Use it only if the source was made with a head."""
        assert self._head is not None
        return self._head

    @property
    def labels(self) -> Tensor:
        """Labels (N,), int64 on the CPU. Use them only if the source was made with labels."""
        assert self._labels is not None
        return self._labels

    def with_labels(self, labels: Tensor) -> ActivationSource:
        """Return a source of the same rows with labels (N,)."""
        labelled = copy(self)
        labelled._labels = integer_labels(labels, (self._total,)).cpu()
        return labelled

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks (n, d) in order, as the head reads them."""
        for rows in self.stored:
            yield rows.clamp_min(0) if self.rectified else rows

    @property
    def stored(self) -> Iterable[Tensor]:
        """Return the blocks (n, d) in order, as they are stored; each iteration starts from the first."""
        own = slice(self._start, self._start + len(self._own))
        device = None if self._head is None else self._head.weight.device
        size = _ROWS if self._head is None else max(1, min(_ROWS, _LOGITS // self._head.num_classes))
        return _Blocks(self._own, None if self._kept is None else self._kept[own], size, device, self.dtype)

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks (n, d) as the head reads them, and their labels (n,) on the same device."""
        labels = self.labels if self._kept is None else self.labels[self._kept]
        start = self._before
        for rows in self:
            yield rows, labels[start : start + len(rows)].to(rows.device)
            start += len(rows)

    def rows_at(self, index: Tensor) -> Tensor:
        """Return the rows (M, d) with the given indices (M,), as the head reads them, on the CPU."""
        if isinstance(self._all, Tensor):
            rows = self._all[index.to(self._all.device)]
        else:
            rows = self._all[index].activations
        rows = rows.to(self.dtype)
        return (rows.clamp_min(0) if self.rectified else rows).cpu()

    def posterior(self, stored: Tensor) -> Tensor:
        """Return the head's class probabilities (n, K) in float64, for rows (n, d) as they are stored."""
        rows = stored.clamp_min(0) if self.rectified else stored
        with in_full(rows.device):
            logits: Tensor = self.head(rows.to(self.head.weight))
        return in_double(logits).softmax(-1)

    def only(self, rows: Tensor) -> ActivationSource:
        """Return a source of the rows with the given indices (n,), without copying rows."""
        part: ActivationSource = copy(self)
        part._kept = torch.zeros(self._total, dtype=torch.bool, device="cpu")
        part._kept[rows.cpu() if self._kept is None else self._kept.nonzero()[rows.cpu(), 0]] = True
        part._count = int(part._kept.sum())
        return part

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Sample at most `count` different rows as they are stored, (n, d); all rows if there are fewer."""
        if len(self) <= count:
            return self.processes.gather(torch.cat(list(self.stored)))
        chosen = torch.randint(len(self), (count,), generator=generator, device="cpu").unique()
        parts, begin = [], self._before
        for rows in self.stored:
            here = chosen[(chosen >= begin) & (chosen < begin + len(rows))] - begin
            parts.append(rows[here.to(rows.device)])
            begin += len(rows)
        return self.processes.gather(torch.cat(parts))

    @property
    def _before(self) -> int:
        """Number of rows that belong to the processes before this one."""
        return self._start if self._kept is None else int(self._kept[: self._start].sum())

    def mean(self) -> Tensor:
        """Mean activation (d,), float64."""
        total: Tensor | None = None
        for rows in self:
            block = in_double(rows).sum(0)
            total = block if total is None else total + block
        assert total is not None
        return self.processes.sum(total) / len(self)

    def mean_posterior(self) -> Tensor:
        """Mean class probabilities (K,) of the head, float64."""
        total: Tensor | None = None
        for rows in self.stored:
            block = self.posterior(rows).sum(0)
            total = block if total is None else total + block
        assert total is not None
        return self.processes.sum(total) / len(self)


class _Blocks:
    """Blocks of rows (n, d), read again at each iteration. There is at least one block, possibly without rows."""

    def __init__(
        self,
        rows: Tensor | Activations,
        kept: Tensor | None,
        size: int,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        self._rows, self._kept, self._size, self._device, self._dtype = rows, kept, size, device, dtype

    def __iter__(self) -> Iterator[Tensor]:
        if isinstance(self._rows, Tensor):
            parts = iter(self._rows.split(self._size))
        elif len(self._rows):
            parts = (part.activations for part in self._rows.batches(self._size))
        else:
            parts = iter([self._rows.activations])
        start = 0
        for rows in parts:
            kept = None if self._kept is None else self._kept[start : start + len(rows)].to(rows.device)
            start += len(rows)
            yield (rows if kept is None else rows[kept]).to(self._device, self._dtype)


def _shape(activations: Tensor | Activations) -> tuple[int, ...]:
    if isinstance(activations, Tensor):
        return tuple(activations.shape)
    return len(activations), activations.in_features
