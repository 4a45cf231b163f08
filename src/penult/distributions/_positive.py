"""Maps from the rows x of a Gaussian mixture to non-negative activations h, and their moments."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NEXT_TO_ZERO", "positive_moments", "rectified_moments", "square", "transformed_moments", "unsquare"]

# Fraction of the softness to which smaller activations are raised before a fit.
NEXT_TO_ZERO = 0.09


def square(x: Tensor, b: Tensor) -> Tensor:
    """Return h = (x + √(x² + 4b))² / 4."""
    root = (x.square() + 4 * b).sqrt()
    return torch.where(x > 0, 0.5 * (x + root), 2 * b / (root - x)).square()


def unsquare(h: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return x = √h − b/√h (*S, d) and Σ log dx/dh = Σ log(1 + b/h) − log(2√h), (*S,); 0 and −∞ where h ≤ 0."""
    inside = h > 0
    safe = torch.where(inside, h, 1.0)
    root = safe.sqrt()
    slope = (torch.log1p(b / safe) - math.log(2) - root.log()).sum(-1)
    return torch.where(inside, root - b / root, 0.0), torch.where(inside.all(-1), slope, -math.inf)


def rectified_moments(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of max(x, 0) for normal x.

    The variance is that of x times P + a²PQ + aφ(Q − P) − φ², with a = μ/σ, P = Φ(a), Q = 1 − P and φ the normal
    density at a. In this form no term is large for large a.
    """
    random = variance > 0
    scale = torch.where(random, variance, 1.0).sqrt()
    a = mean / scale
    upper, lower = 0.5 * torch.erfc(-a * math.sqrt(0.5)), 0.5 * torch.erfc(a * math.sqrt(0.5))
    bell = torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    first = scale * (a * upper + bell)
    share = upper + a.square() * upper * lower + a * bell * (lower - upper) - bell.square()
    return torch.where(random, first, mean.clamp_min(0)), torch.where(random, variance * share, 0.0)


def positive_moments(mean: Tensor, variance: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of `square` of normal x, by the trapezoidal rule."""
    # The integrand is smooth and decays at both ends, so the rule is exact up to rounding.
    return transformed_moments(mean, variance, lambda x: square(x, b.to(mean)))


def transformed_moments(mean: Tensor, variance: Tensor, transform: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of a function of normal x, by the trapezoidal rule with 257 nodes."""
    first, second, total = torch.zeros_like(mean), torch.zeros_like(mean), 0.0
    for z in torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu").tolist():
        bell = math.exp(-0.5 * z * z)
        h = transform(mean + z * variance.sqrt())
        first, second, total = first + bell * h, second + bell * h.square(), total + bell
    return first / total, (second / total - (first / total).square()).clamp_min(0)
