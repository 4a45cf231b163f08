"""Which class of a head a given row belongs to."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from penult.head import Head
from penult.special import outside_transforms

__all__ = ["RowIndex"]

_SEARCHED = 4  # neighbours looked at on either side of a row's place


class RowIndex:
    """Finds rows of a head among its centered rows, in O(log K) each and without a second W.

    Rows are ordered by their product with one fixed vector; those of equal product are compared in full.
    """

    def __init__(self, head: Head) -> None:
        self._head = head
        self._weight, self._version = head.weight, head.version
        d = head.in_features
        # No random numbers, which torch.func.vmap would refuse.
        with nullcontext() if torch.compiler.is_compiling() else outside_transforms():
            self._probe = torch.sin(torch.arange(1, d + 1, dtype=torch.float64).square())
            keys = torch.cat([self._keys(rows) for _, rows in head.centered_blocks()])
            self._keys_sorted, self._order = keys.sort()

    def current(self, head: Head) -> bool:
        """Whether it is that of this head as it is now."""
        same = self._head is head and self._weight is head.weight
        return same and (torch.compiler.is_compiling() or self._version == head.version)  # no versions while it traces

    def classes(self, weight: Tensor) -> Tensor:
        """The classes of rows (*B, d), (*B,); −1 for a row that is not the head's."""
        rows = weight.detach().reshape(-1, weight.shape[-1])
        narrow = min(rows.dtype, self._head.weight.dtype, key=lambda dtype: dtype.itemsize)
        eps = torch.finfo(torch.promote_types(narrow, torch.float32)).eps
        place = torch.searchsorted(self._keys_sorted, self._keys(rows))
        found = torch.full_like(place, -1)
        nearest = torch.full_like(place, torch.inf, dtype=torch.float32)
        for step in range(-_SEARCHED, _SEARCHED):
            candidate = self._order[(place + step).clamp(0, len(self._order) - 1)]
            theirs = self._head.centered_weight(candidate)
            off = (rows.to(theirs.dtype) - theirs).abs().amax(-1).float()
            # Rows are differences with the mean row, whose rounding they carry.
            scale = theirs.abs().amax(-1) + self._head.mean_row.abs().amax()
            better = (off <= 16 * eps * scale) & (off < nearest)
            found, nearest = torch.where(better, candidate, found), torch.where(better, off, nearest)
        return found.reshape(weight.shape[:-1])

    def _keys(self, rows: Tensor) -> Tensor:
        if rows.device.type == "mps":
            return (rows.cpu().double() @ self._probe).float().to(rows.device)
        return rows.double() @ self._probe.to(rows.device)
