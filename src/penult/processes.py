"""Processes that share one piece of work, by torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Processes"]


@final
class Processes:
    """The processes of a torch.distributed group, or this one alone.

    They exchange small data only: sums, counts and samples. The data is sent from the CPU, or from the GPU if the
    group uses NCCL, which supports nothing else. All processes must make the same calls in the same order.

    Args:
        group: For example ``torch.distributed.group.WORLD``; None for this process alone.

    Attributes:
        rank: Index of this process, from 0.
        count: Number of processes.

    Raises:
        ValueError: This process is not in the group.

    Example:
        >>> from penult.processes import Processes
        >>> alone = Processes()
        >>> alone.rank, alone.count, alone.share(10)
        (0, 1, range(0, 10))
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.count = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise ValueError("this process is not in the group; only processes of the group may make this call")

    def share(self, total: int) -> range:
        """Return the part of the range 0 to total − 1 that belongs to this process.

        The shares are consecutive, in order of rank. Their lengths differ by at most one, and some are empty if there
        are more processes than numbers.
        """
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes of a tensor, which has the same shape in all of them."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def total(self, value: float) -> float:
        """Return the sum of a number over the processes; integers stay exact up to 2⁵³."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64, device="cpu")))

    def least(self, value: float) -> float:
        """Return the minimum of a number over the processes."""
        return float(self._reduced(torch.tensor(value, dtype=torch.float64, device="cpu"), dist.ReduceOp.MIN))

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows (n, *S) of all processes, in order of rank; n may differ, and may be 0."""
        if self.count == 1:
            return rows
        counts = self.objects(len(rows))
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self._exchange_device)
        padded[: len(rows)] = rows.to(self._exchange_device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)

    def objects(self, value: Any) -> list[Any]:
        """Return a small object of each process, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def first(self, value: Any) -> Any:
        """Return the object of the first process; the arguments of the others are ignored."""
        return self.objects(value if self.rank == 0 else None)[0]

    def wait(self) -> None:
        """Wait until all processes have made this call."""
        self.objects(None)

    @property
    def _exchange_device(self) -> torch.device:
        on_gpu = self._group is not None and dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.count == 1:
            return value
        reduced = value.to(self._exchange_device, copy=True)
        dist.all_reduce(reduced, operation, group=self._group)
        return reduced.to(value.device)
