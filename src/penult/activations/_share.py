"""The part of a loader that is one process's own."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler

from penult.processes import Processes

__all__ = ["share_of"]


def share_of(loader: Iterable[Any], processes: Processes) -> tuple[int, Iterable[Any]]:
    """The number of a process's first batch, and its batches.

    Raises:
        TypeError: Processes share the work, and the loader does not say how many batches it has.
        ValueError: Its order is not the same in all of them, or it is a part of the data already.
    """
    if processes.count == 1:
        return 0, loader
    total = operator.length_hint(loader, -1)
    if total < 0:
        raise TypeError(
            f"the loader, a {type(loader).__name__}, does not say how many batches it has, so processes cannot share "
            "them: give a DataLoader of a data set with a length, or a list"
        )
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler | DistributedSampler):
        raise ValueError(
            f"the loader has a {type(sampler).__name__}, so that its batches are not the same in all processes; give "
            "each process the whole loader with shuffle=False, which is then shared out"
        )
    own = processes.share(total)
    return own.start, _narrow(loader, own.start, own.stop)


def _narrow(loader: Iterable[Any], start: int, stop: int) -> Iterable[Any]:
    """Batches start to stop; a DataLoader loads no others."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _Part(loader, start, stop)
    part = copy.copy(loader)  # of whatever class, with all that it was given
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(part)[name] = _Part(getattr(loader, name), start, stop)  # DataLoader forbids to set it
    vars(part)["_iterator"] = None  # of persistent workers
    return part


class _Part:
    """Items start to stop of what can be iterated."""

    def __init__(self, whole: Iterable[Any], start: int, stop: int) -> None:
        self._whole, self._start, self._stop = whole, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._whole), self._start, self._stop)
