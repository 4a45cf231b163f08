"""How much mass the classes of a head put at each radius of a sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from penult import special

__all__ = ["log_mass", "log_mass_and_slopes"]

_PAIRS = 1 << 16  # (class, radius) pairs looked at at a time; each takes a kilobyte or two


def log_mass(dim: int, norms: Tensor, offsets: Tensor, radius: Tensor) -> Tensor:
    r"""T(r) = log Σ_y exp(b'_y + F(r ‖w'_y‖)) for radii (R,), shape (R,).

    Args:
        dim: Dimension of the chart.
        norms: ‖w'_y‖ (K,), rows as the chart sees them.
        offsets: b'_y (K,), biases at the chart's centre.
        radius: Radii (R,).
    """
    total = torch.full_like(radius, -torch.inf)
    for rho, b in _parts(norms, offsets, radius):
        total = torch.logaddexp(total, (b + special.log_sphere_mgf(dim, radius * rho)).logsumexp(0))
    return total


def log_mass_and_slopes(dim: int, norms: Tensor, offsets: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T(r) as `log_mass`, and its first two derivatives by log r, each (R,)."""
    total = log_mass(dim, norms, offsets, radius)
    first, second = torch.zeros_like(total), torch.zeros_like(total)
    base: Tensor | None = None  # slopes are as large as κ, and cancel in the variance unless set against one of them
    for rho, b in _parts(norms, offsets, radius):
        kappa = radius * rho
        share = (b + special.log_sphere_mgf(dim, kappa) - total).exp()
        slope = kappa * special.mean_resultant_length(dim, kappa)
        base = slope.gather(0, share.argmax(0, keepdim=True))[0] if base is None else base
        apart = slope - base
        first += (share * apart).sum(0)
        second += (share * (kappa.square() * special.cosine_variance(dim, kappa) + apart.square())).sum(0)
    assert base is not None
    mean = base + first
    return total, mean, second - first.square() + mean


def _parts(norms: Tensor, offsets: Tensor, radius: Tensor) -> zip[tuple[Tensor, Tensor]]:
    step = max(1, _PAIRS // max(1, len(radius)))
    return zip(norms.unsqueeze(-1).split(step), offsets.unsqueeze(-1).split(step), strict=True)
