"""What two sets of features have in common by nearest neighbours, and how near one lies to a third."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Balls", "Overlap", "nearer", "nearest", "overlap"]

_ROWS = 512  # of a block of distances
_POOL = 2048  # its columns: blocks of this size stay in the cache


class Overlap(NamedTuple):
    """Fidelity and variety of generated features by real ones; see `overlap`."""

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Balls:
    """Rows (n, d) in float64, and the distance (n,) of each to its k-th nearest among the others."""

    rows: Tensor
    radii: Tensor
    neighbours: int

    @classmethod
    def of(cls, rows: Tensor, neighbours: int) -> Balls:
        """Of rows (n, d), n > k."""
        wide, start, radii = rows.double(), 0, []
        for block in wide.split(_ROWS):
            distance = _distances(block, wide)
            own = torch.arange(len(block))
            distance[own, start + own] = torch.inf  # no row is a neighbour of itself, though a copy of it is
            radii.append(distance.kthvalue(neighbours, dim=1).values)
            start += len(block)
        return cls(wide, torch.cat(radii), neighbours)


def overlap(real: Balls, made: Balls) -> Overlap:
    r"""How far real rows x_1..x_N and generated ones y_1..y_M lie within each other's balls.

    With B(x_i) the closed ball around x_i up to its k-th nearest neighbour among the real rows, and B(y_j) the like:

    - precision: share of the y_j in some B(x_i), and recall: share of the x_i in some B(y_j);
    - density: number of pairs with y_j in B(x_i), over kM, which is 1 on average where both have one law;
    - coverage: share of the B(x_i) that hold some y_j; for one law and M = N it is
      1 − (N−1)⋯(N−k) / ((2N−1)⋯(2N−k)) on average, nearly 1 − 2⁻ᵏ.

    References:
        Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019.
        Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Args:
        real: Balls of the real rows.
        made: Balls of the generated rows, of as many neighbours.

    Returns:
        Precision, recall, density and coverage.

    Example:
        >>> real = Balls.of(torch.tensor([[0.0], [1.0], [3.0]]), 1)  # radii 1, 1 and 2
        >>> overlap(real, Balls.of(torch.tensor([[2.0], [9.0]]), 1))
        Overlap(precision=0.5, recall=1.0, density=1.0, coverage=0.6666666666666666)
    """
    inside, found, start = 0, 0, 0
    recalled = torch.zeros(len(real.rows), dtype=torch.bool)
    covered = torch.zeros(len(real.rows), dtype=torch.bool)
    for block in made.rows.split(_ROWS):
        distance = _distances(block, real.rows)
        within = distance <= real.radii
        inside += int(within.sum())
        found += int(within.any(1).sum())
        covered |= within.any(0)
        recalled |= (distance <= made.radii[start : start + len(block), None]).any(0)
        start += len(block)
    count = len(made.rows)
    return Overlap(
        found / count,
        float(recalled.double().mean()),
        inside / (real.neighbours * count),
        float(covered.double().mean()),
    )


def nearest(rows: Tensor, pool: Tensor, own: Tensor | None = None) -> Tensor:
    """Distance (n,) of each of rows (n, d) to the nearest of a pool (m, d), in float64.

    Args:
        rows: Rows.
        pool: The pool.
        own: (n,) place of each row in the pool, which is passed over: for rows that were taken out of it.
    """
    middle = pool.mean(0, dtype=torch.float64)  # nearer to zero, products lose fewer digits
    wide = pool.double() - middle
    norms = wide.square().sum(1)
    found = []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS].double() - middle
        best = torch.full((len(block),), torch.inf, dtype=torch.float64)
        place = torch.zeros(len(block), dtype=torch.int64)
        for offset in range(0, len(wide), _POOL):
            part = slice(offset, offset + _POOL)
            score = torch.addmm(norms[part], block, wide[part].T, alpha=-2)
            if own is not None:
                mine = own[start : start + len(block)] - offset
                here = ((mine >= 0) & (mine < score.shape[1])).nonzero().flatten()
                score[here, mine[here]] = torch.inf
            least, column = score.min(1)
            better = least < best
            best = torch.where(better, least, best)
            place = torch.where(better, column + offset, place)
        # Products only say which is the nearest: a copy shall lie at 0, not at the root of a rounding error.
        found.append(torch.linalg.vector_norm(block - wide[place], dim=1))
    return torch.cat(found)


def nearer(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Whether distances (n,) to the training images are smaller than those (m,) of unseen real images.

    References:
        Meehan, Chaudhuri and Dasgupta, "A non-parametric test to detect data-copying in generative models", 2020.

    Returns:
        P(made < real) + P(made = real) / 2 over pairs, and the share of `made` below at least 99% of `real`.

    Example:
        >>> nearer(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
        (0.625, 0.5)
    """
    ordered = real.sort().values
    not_above = torch.searchsorted(ordered, made, right=True).double() / len(ordered)
    below = torch.searchsorted(ordered, made).double() / len(ordered)
    # Of (1 - not_above) >= .99, without the digits that the subtraction loses.
    return float(1 - (below + not_above).mean() / 2), float((not_above <= 0.01).double().mean())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m), difference by difference: equal rows lie at 0, and a row at its neighbour's radius is on the ball."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
