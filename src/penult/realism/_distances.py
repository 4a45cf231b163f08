"""Distances between two sets of activations, or of numbers, that need no classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from penult.special import working_dtype

__all__ = ["energy_coefficient", "expected_calibration_error", "kolmogorov_smirnov", "wasserstein"]

_BLOCK = 1024  # rows whose distances to as many others are held at a time


def energy_coefficient(x: Tensor, y: Tensor) -> float:
    r"""The energy distance of two samples as a share of their distance to each other, without bias.

    .. math:: \frac{2\,E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|}{2\,E\|X - Y\|}

    It lies in [0, 1] for laws, 0 where they are equal; each mean is taken over distinct pairs, so that two samples
    of one law give 0 on average, and can fall a little below. No (N, M) matrix is kept.

    References:
        Székely and Rizzo, "Energy statistics: a class of statistics based on distances", 2013.

    Args:
        x: Rows (N, d), N ≥ 2.
        y: Rows (M, d), M ≥ 2.

    Raises:
        ValueError: If the shapes do not fit, or there are fewer than two rows.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> energy_coefficient(x, x + 2), energy_coefficient(torch.zeros(2, 3), torch.zeros(2, 3))
        (0.5, 0.0)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or len(x) < 2 or len(y) < 2:
        raise ValueError(f"x and y must be rows (N, d) and (M, d), N, M >= 2; got {tuple(x.shape)}, {tuple(y.shape)}")
    work = working_dtype(x.device)
    centre = (x.to(work).mean(0) + y.to(work).mean(0)) / 2  # distances as differences of squares: keep these small
    x, y = x.to(work) - centre, y.to(work) - centre
    across = _distances(x, y) / (len(x) * len(y))
    if across == 0:
        return 0.0
    within = _distances(x, x) / (len(x) * (len(x) - 1)) + _distances(y, y) / (len(y) * (len(y) - 1))
    return 1 - within / (2 * across)


def _distances(x: Tensor, y: Tensor) -> float:
    """The sum of distances of all rows of x to all of y; those of a row to itself are exactly 0."""
    total = 0.0
    for i, a in enumerate(x.split(_BLOCK)):
        for j, b in enumerate(y.split(_BLOCK)):
            if x is y and j < i:
                continue  # the mirror image
            apart = torch.cdist(a, b)
            if x is y and i == j:
                apart.fill_diagonal_(0)
            total += float(apart.sum()) * (2 if x is y and i != j else 1)
    return total


def kolmogorov_smirnov(x: Tensor, y: Tensor) -> float:
    """The largest difference between the distribution functions of two samples of numbers (N,) and (M,).

    Example:
        >>> kolmogorov_smirnov(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
        0.5
    """
    x, y = x.sort().values, y.sort().values
    at = torch.cat([x, y])
    shares = [torch.searchsorted(each, at, right=True).double() / len(each) for each in (x, y)]
    return float((shares[0] - shares[1]).abs().max())


def wasserstein(x: Tensor, y: Tensor) -> float:
    """The first Wasserstein distance of two samples of numbers of one size (N,): the mean of |x_(i) − y_(i)|.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        2.0
    """
    return float((x.sort().values - y.sort().values).double().abs().mean())


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""How far confidence is from accuracy: Σ_bins (n_bin / N) \|accuracy − mean confidence\|, bins of equal width.

    References:
        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017.

    Args:
        confidence: Largest class probabilities (N,).
        correct: Whether that class is right (N,).
        bins: How many.

    Example:
        >>> confidence, correct = torch.tensor([0.9, 0.9, 0.55]), torch.tensor([True, False, True])
        >>> round(expected_calibration_error(confidence, correct, bins=2), 4)  # one bin of three: .667 against .783
        0.1167
    """
    which = (confidence * bins).long().clamp(0, bins - 1)
    gap = correct.double() - confidence.double()
    sums = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, which, gap)
    return float(sums.abs().sum() / max(len(gap), 1))
