"""A mergeable histogram of radii."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RadialHistogram"]

_PER_OCTAVE = 256  # bins between r and 2r: 0.27 % wide, and each keeps the mean of what fell in
_OCTAVES = 128  # from 2^-64 to 2^64


class RadialHistogram:
    """Counts and sums of radii on a fixed logarithmic grid, so that parts of a data set add up.

    Example:
        >>> histogram = RadialHistogram()
        >>> histogram.update(torch.tensor([1.0, 2.0, 2.0, 4.0]))
        >>> histogram.atoms(2)
        (tensor([1.0000, 2.6667], dtype=torch.float64), tensor([0.2500, 0.7500], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(_PER_OCTAVE * _OCTAVES, dtype=torch.float64)
        self.sums = torch.zeros_like(self.counts)

    def update(self, radii: Tensor) -> None:
        """Add radii (N,), all positive and finite."""
        r = radii.detach().double().cpu()
        bins = ((r.log2() + _OCTAVES / 2) * _PER_OCTAVE).floor().long().clamp(0, len(self.counts) - 1)
        self.counts.index_add_(0, bins, torch.ones_like(r))
        self.sums.index_add_(0, bins, r)

    def merge(self, other: RadialHistogram) -> None:
        """Add what another histogram holds."""
        self.counts += other.counts
        self.sums += other.sums

    def atoms(self, count: int) -> tuple[Tensor, Tensor]:
        """At most ``count`` radii, the means of groups of equal mass, and the share of each group."""
        filled = self.counts > 0
        counts, sums = self.counts[filled], self.sums[filled]
        total = counts.sum()
        middle = (counts.cumsum(0) - 0.5 * counts) / total
        group = (middle * count).floor().long().clamp_max(count - 1)
        _, group = group.unique(return_inverse=True)
        mass = counts.new_zeros(int(group.max()) + 1).index_add_(0, group, counts)
        return mass.new_zeros(len(mass)).index_add_(0, group, sums) / mass, mass / total
