"""Moments, principal components and projections of rows that are read in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from penult._checks import as_activations, check_floating, described
from penult.processes import Processes
from penult.special import working_dtype

__all__ = ["Projected", "Rows"]

# Number of elements of a tensor processed at a time.
_ELEMENTS = 1 << 21
# Number of projected elements kept in memory, at most. Larger projections are computed again in every pass.
_KEPT_ELEMENTS = 1 << 24


class Rows:
    """Rows that a distribution is fitted to, read in batches, with their number and mean.

    If processes share the work, iterating gives the rows of this process; everything else refers to all rows.

    Args:
        source: Rows (N, d), or an iterable of rows (n, d) that can be iterated more than once.
        link: Function that is applied to the rows in float64, or None.
        processes: Processes that share the rows. Default: this process alone.
    """

    def __init__(
        self,
        source: Tensor | Iterable[Tensor],
        link: Callable[[Tensor], Tensor] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self._link = link
        self.processes = Processes() if processes is None else processes
        if hasattr(source, "__array__"):
            source = as_activations(source, "activations", "(N, d)")
        if isinstance(source, Tensor):
            if source.dim() != 2:
                raise ValueError(f"activations has shape {tuple(source.shape)}; expected (N, d)")
            size = max(1, _ELEMENTS // max(1, source.shape[1]))
            self._source: Iterable[Tensor] = source.detach().split(size)
        elif isinstance(source, Iterator) or not isinstance(source, Iterable):
            raise TypeError(
                f"activations is {described(source)}; expected a tensor (N, d), or an iterable that gives tensors "
                "(n, d) each time it is iterated, such as a list of batches"
            )
        else:
            self._source = source
        self.own = 0
        total = None
        for rows in self._source:
            check_floating("activations" if isinstance(source, Tensor) else "a batch of activations", rows, "(n, d)")
            if rows.dim() != 2 or rows.shape[1] < 1 or (total is not None and rows.shape[1] != len(total)):
                width = "d" if total is None else len(total)
                raise ValueError(
                    f"a batch of activations has shape {tuple(rows.shape)}; expected (n, {width}) with d >= 1"
                )
            bad = int((~rows.isfinite().all(-1)).sum())
            if bad:
                raise ValueError(
                    f"{bad} of {len(rows)} rows of a batch of activations hold NaN or infinity; leave them out first"
                )
            if total is None:
                self.dtype, self.device = rows.dtype, rows.device
                # Sums need float64, which some devices do not have.
                wide = working_dtype(rows.device) == torch.float64
                self.work = rows.device if wide else torch.device("cpu")
                total = torch.zeros(rows.shape[1], dtype=torch.float64, device=self.work)
            total += self.wide(rows).sum(0)
            self.own += len(rows)
        if total is None:
            raise ValueError("activations has 0 rows; expected at least two")
        counts = self.processes.objects(self.own)
        self.count, self.before = sum(counts), sum(counts[: self.processes.rank])
        if self.count < 2:
            raise ValueError(f"activations has {self.count} rows; expected at least two")
        self.mean = self.processes.sum(total) / self.count

    def plane(self, dims: int) -> tuple[Tensor, float]:
        """Return at most ``dims`` leading principal components (m, d), and the standard deviation across the others."""
        scatter = torch.zeros(len(self.mean), len(self.mean), dtype=torch.float64, device=self.work)
        for rows in self:
            deviations = rows - self.mean
            scatter.addmm_(deviations.mT, deviations)
        values, vectors = torch.linalg.eigh(self.processes.sum(scatter) / self.count)
        values = values.flip(-1)
        size = self.mean.square().sum() + values.clamp_min(0).sum()
        # Rounding of the rows gives zero eigenvalues about this size.
        noise = torch.finfo(self.dtype).eps ** 2 * size / len(values)
        rank = int((values > torch.maximum(noise, 1e-14 * values[0])).sum())
        if rank == 0:
            raise ValueError("all rows of activations are equal; expected at least two different rows")
        m, d = min(dims, rank), len(values)
        across = float(values[m:rank].sum() / (d - m)) if m < d else 0.0
        vectors = vectors.flip(-1)[:, :m].mT
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        # LAPACK does not fix the signs, and machines round differently, so all processes use the result of the first.
        plane, spread = self.processes.first(((vectors * largest.sign()).cpu(), math.sqrt(across)))
        return plane.to(self.work), spread

    def project(self, plane: Tensor) -> Projected:
        """Return the coordinates of the rows in a plane (m, d)."""
        return Projected(self, plane)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the rows in float64, through the link."""
        return map(self.wide, self.given())

    def given(self) -> Iterator[Tensor]:
        """Yield the rows as they were given."""
        seen = 0
        for rows in self._source:
            seen += len(rows)
            yield rows
        if seen != self.own:
            raise ValueError(
                f"activations gave {self.own} rows at first and {seen} later; expected the same rows in each pass"
            )

    def wide(self, rows: Tensor) -> Tensor:
        """Convert rows to float64, on the CPU if their device has no float64, and apply the link."""
        x = rows.detach().to(self.work).double()
        return x if self._link is None else self._link(x)


class Projected:
    """Coordinates (n, m) of rows in a plane, kept in memory if they are small enough."""

    def __init__(self, rows: Rows, plane: Tensor) -> None:
        self._rows = rows
        self._plane = plane
        keep = rows.own * len(plane) <= _KEPT_ELEMENTS
        self._kept = list(self._compute()) if keep else None

    def _compute(self) -> Iterator[Tensor]:
        for rows in self._rows:
            yield (rows - self._rows.mean) @ self._plane.mT

    def __iter__(self) -> Iterator[Tensor]:
        return self._compute() if self._kept is None else iter(self._kept)

    def take(self, index: Tensor) -> Tensor:
        """Return the rows at increasing positions, on the CPU, so that random choices do not depend on the device."""
        parts, begin = [], self._rows.before
        for batch in self:
            here = index[(index >= begin) & (index < begin + len(batch))] - begin
            parts.append(batch[here.to(batch.device)].cpu())
            begin += len(batch)
        return self._rows.processes.gather(torch.cat(parts))
