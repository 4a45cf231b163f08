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

    What they exchange is small: sums, counts and samples. It goes through the CPU, and through the GPU where the group
    is of NCCL, which knows no other way. Every process has to make the same calls, in the same order.

    Args:
        group: Such as ``torch.distributed.group.WORLD``; None for this process alone.

    Attributes:
        rank: The number of this process, from 0.
        count: How many there are.

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
            raise ValueError("this process is not in the group; only those that are may call")

    def share(self, total: int) -> range:
        """The numbers that are this process's own, of 0 to total − 1: all shares follow each other, in order of rank.

        Shares differ by one at most, and are empty where there are more processes than numbers.
        """
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes, of one shape in all."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def total(self, value: float) -> float:
        """The sum of a number over the processes; whole ones stay exact up to 2⁵³."""
        return float(self.sum(torch.tensor(value, dtype=torch.float64)))

    def least(self, value: float) -> float:
        """The least of a number over the processes."""
        return float(self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.MIN))

    def gather(self, rows: Tensor) -> Tensor:
        """Rows (n, *S) of all processes, in order of rank; n may differ, and be 0."""
        if self.count == 1:
            return rows
        counts = self.objects(len(rows))
        room = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self._carrier)
        room[: len(rows)] = rows.to(self._carrier)
        parts = [torch.empty_like(room) for _ in counts]
        dist.all_gather(parts, room, group=self._group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)

    def objects(self, value: Any) -> list[Any]:
        """A small object of each process, in order of rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def first(self, value: Any) -> Any:
        """The object of the first process; what the others give is ignored."""
        return self.objects(value if self.rank == 0 else None)[0]

    def wait(self) -> None:
        """Until all have come here."""
        self.objects(None)

    @property
    def _carrier(self) -> torch.device:
        on_gpu = self._group is not None and dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.count == 1:
            return value
        carried = value.to(self._carrier, copy=True)
        dist.all_reduce(carried, operation, group=self._group)
        return carried.to(value.device)
