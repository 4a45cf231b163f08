"""Rows that a mixture is fitted to, one batch at a time: their moments, principal components and projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from penult.processes import Processes
from penult.special import working_dtype

__all__ = ["Projected", "Rows"]

_ELEMENTS = 1 << 21  # of a tensor looked at at a time
_KEPT = 1 << 24  # projected elements kept in memory; beyond, every pass projects the rows again


class Rows:
    """Rows to fit to, looked at one batch at a time: their number, mean and covariance, by two passes.

    Where processes share the work, iterating gives this one's rows; everything else is of the rows of all.
    """

    def __init__(
        self,
        source: Tensor | Iterable[Tensor],
        link: Callable[[Tensor], Tensor] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._link = link
        self.processes = Processes() if processes is None else processes
        if isinstance(source, Tensor):
            if source.dim() != 2:
                raise ValueError(f"activations has shape {tuple(source.shape)}; expected (N, d)")
            size = max(1, _ELEMENTS // max(1, source.shape[1]))
            self._source: Iterable[Tensor] = source.detach().split(size)
        elif isinstance(source, Iterator) or not isinstance(source, Iterable):
            raise TypeError(
                f"activations must be a tensor (N, d) or give tensors (n, d) each time it is iterated, got "
                f"{type(source).__name__}; a list of batches does"
            )
        else:
            self._source = source
        self.own = 0
        total = None
        for rows in self._source:
            if not isinstance(rows, Tensor) or not rows.is_floating_point():
                raise TypeError(
                    f"activations must be floating tensors, got {getattr(rows, 'dtype', type(rows).__name__)}"
                )
            if rows.dim() != 2 or rows.shape[1] < 1 or (total is not None and rows.shape[1] != len(total)):
                width = "d" if total is None else len(total)
                raise ValueError(
                    f"activations hold a batch of shape {tuple(rows.shape)}; expected (n, {width}), d >= 1"
                )
            bad = int((~rows.isfinite().all(-1)).sum())
            if bad:
                raise ValueError(
                    f"{bad} of {len(rows)} activations of a batch hold NaN or infinity; leave them out first"
                )
            if total is None:
                self.dtype, self.device = rows.dtype, rows.device
                wide = working_dtype(rows.device) == torch.float64
                self.work = rows.device if wide else torch.device("cpu")  # sums need float64
                total = torch.zeros(rows.shape[1], dtype=torch.float64, device=self.work)
            total += self.wide(rows).sum(0)
            self.own += len(rows)
        if total is None:
            raise ValueError("activations hold 0 rows; a fit needs at least two")
        counts = self.processes.objects(self.own)
        self.count, self.before = sum(counts), sum(counts[: self.processes.rank])
        if self.count < 2:
            raise ValueError(f"activations hold {self.count} rows; a fit needs at least two")
        self.mean = self.processes.sum(total) / self.count

    def plane(self, dims: int) -> tuple[Tensor, float]:
        """At most ``dims`` leading principal components (m, d), and the standard deviation across them."""
        scatter = torch.zeros(len(self.mean), len(self.mean), dtype=torch.float64, device=self.work)
        for rows in self:
            off = rows - self.mean
            scatter.addmm_(off.mT, off)
        values, vectors = torch.linalg.eigh(self.processes.sum(scatter) / self.count)
        values = values.flip(-1)
        size = self.mean.square().sum() + values.clamp_min(0).sum()
        noise = torch.finfo(self.dtype).eps ** 2 * size / len(values)  # what rounding of the rows makes of none
        rank = int((values > torch.maximum(noise, 1e-14 * values[0])).sum())
        if rank == 0:
            raise ValueError("all activations are equal, so there is nothing to fit; pass at least two different rows")
        m, d = min(dims, rank), len(values)
        across = float(values[m:rank].sum() / (d - m)) if m < d else 0.0
        vectors = vectors.flip(-1)[:, :m].mT
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        # LAPACK leaves the signs open, and machines round differently.
        plane, spread = self.processes.first(((vectors * largest.sign()).cpu(), math.sqrt(across)))
        return plane.to(self.work), spread

    def project(self, plane: Tensor) -> Projected:
        return Projected(self, plane)

    def __iter__(self) -> Iterator[Tensor]:
        """The rows again, in float64."""
        return map(self.wide, self.given())

    def given(self) -> Iterator[Tensor]:
        """The rows again, as they are."""
        seen = 0
        for rows in self._source:
            seen += len(rows)
            yield rows
        if seen != self.own:
            raise ValueError(
                f"activations gave {self.own} rows at first and {seen} later; each pass must give the same"
            )

    def wide(self, rows: Tensor) -> Tensor:
        """In float64, where the device has it, or on the CPU; through the link."""
        x = rows.detach().to(self.work).double()
        return x if self._link is None else self._link(x)


class Projected:
    """Coordinates (n, m) of rows in a plane; computed once where they are small enough to keep."""

    def __init__(self, rows: Rows, plane: Tensor) -> None:
        self._rows = rows
        self._plane = plane
        keep = rows.own * len(plane) <= _KEPT
        self._kept = list(self._compute()) if keep else None

    def _compute(self) -> Iterator[Tensor]:
        for rows in self._rows:
            yield (rows - self._rows.mean) @ self._plane.mT

    def __iter__(self) -> Iterator[Tensor]:
        return self._compute() if self._kept is None else iter(self._kept)

    def take(self, index: Tensor) -> Tensor:
        """Rows at increasing positions ``index``, on the CPU, where random choices do not depend on the device."""
        parts, begin = [], self._rows.before
        for batch in self:
            here = index[(index >= begin) & (index < begin + len(batch))] - begin
            parts.append(batch[here.to(batch.device)].cpu())
            begin += len(batch)
        return self._rows.processes.gather(torch.cat(parts))
