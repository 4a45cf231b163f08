"""The mass that all classes put at a radius, tabulated: it is a function of the radius alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult import special

__all__ = ["log_mass", "log_mass_and_slopes", "log_mass_at", "radial_table"]

# --- How much mass the classes of a head put at each radius of a sphere -------------------------------------


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


_STEP = 0.12  # between knots at first, in log r
_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5}  # at most, over max(1, |T|)
_HALVINGS = 12  # of an interval at most, until the error in its middle is a fifth of that
_LEAST, _MOST = 3e-3, 1e6  # of κ, over the root of the dimension and over the dimension


def radial_table(dim: int, norms: Tensor, offsets: Tensor, halvings: int = _HALVINGS) -> Tensor:
    r"""Coefficients of T(r) = log Σ_y exp(b'_y + F_m(r ‖w'_y‖)), a quintic in log r between each two knots.

    T is matched at the knots in value and first two derivatives. An interval in which that is not enough is halved,
    until the error is below 1e-9 max(1, \|T\|): for κ up to a million times the dimension.

    Args:
        dim: Dimension m of the chart.
        norms: ‖w'_y‖ (K,).
        offsets: b'_y (K,).
        halvings: How often an interval may be halved; without any, the error is below 1e-4 for usual heads.

    Returns:
        (1 + intervals, 8), for `log_mass_at`.
    """
    largest = float(norms.max()) or 1.0  # of equal rows, for which T is a constant
    low, high = math.log(_LEAST * math.sqrt(dim) / largest), math.log(_MOST * dim / largest)
    knots = torch.linspace(low, high, math.ceil((high - low) / _STEP) + 1, dtype=norms.dtype, device=norms.device)
    known = torch.stack([knots, *log_mass_and_slopes(dim, norms, offsets, knots.exp())], dim=-1)
    pieces = _matched(known[:-1], known[1:])
    sure = torch.zeros(len(pieces), dtype=torch.bool, device=knots.device)  # intervals that are close enough
    for _ in range(halvings):
        middle = (known[:-1, 0] + known[1:, 0])[~sure] / 2
        exact = log_mass(dim, norms, offsets, middle.exp())
        error = (_quintic(pieces[~sure], middle) - exact).abs() / exact.abs().clamp_min(1)
        sure[~sure] = error < _ERROR[norms.dtype] / 5
        middle = middle[error >= _ERROR[norms.dtype] / 5]
        if not len(middle):
            break
        fresh = torch.stack([middle, *log_mass_and_slopes(dim, norms, offsets, middle.exp())], dim=-1)
        marks = torch.cat([torch.ones(1, dtype=torch.bool, device=sure.device), sure])  # of the interval before a knot
        known = torch.cat([known, fresh])
        order = known[:, 0].argsort()
        known = known[order]
        # An interval is still sure if it was, and both its ends stand where they stood.
        old = torch.cat([marks, torch.zeros(len(fresh), dtype=torch.bool, device=sure.device)])[order]
        sure = old[1:]
        pieces = _matched(known[:-1], known[1:])
    nought = log_mass(dim, norms, offsets, knots.new_zeros(1))
    far = known[-1, 2] + (dim - 1) / 2  # T = far r / R - (m - 1)/2 log r + constant, beyond the last radius R
    facts = torch.cat([known[-1, :2], nought, knots.new_tensor([float(dim)]), far[None], knots.new_zeros(3)])
    return torch.cat([facts[None], pieces])


def log_mass_at(table: Tensor, radius: Tensor) -> Tensor:
    """T(r) of a table for radii (*S,), in the table's precision; part of the autograd graph of the radii."""
    last, end, nought, dim, far = table[0, :5].unbind()
    pieces = table[1:]
    r = radius.to(table.dtype)
    place = r.clamp_min(torch.finfo(table.dtype).tiny).log()
    index = torch.searchsorted(pieces[:, 0].contiguous(), place.detach(), right=True).sub(1).clamp(min=0)
    inside = _quintic(torch.nn.functional.embedding(index, pieces), place)  # which torch.func maps over a single place
    # Below the first knot T grows with the square of r, beyond the last as F does far out.
    near = nought + (pieces[0, 2] - nought) * (r * (-pieces[0, 0]).exp()).square()
    beyond = (place - last).clamp_min(0)
    away = end + far * beyond.exp().sub(1) - (dim - 1) / 2 * beyond
    return torch.where(place < pieces[0, 0], near, torch.where(beyond > 0, away, inside))


def _matched(left: Tensor, right: Tensor) -> Tensor:
    """Pieces (N, 8): first knot, length, six coefficients; from log r, T and two derivatives at either end, (N, 4)."""
    step = right[:, 0] - left[:, 0]
    a, b, c = left[:, 1], step * left[:, 2], step.square() * left[:, 3] / 2
    # What is left of value, slope and curvature at the right end, after a + b x + c x².
    v, s = right[:, 1] - a - b - c, step * right[:, 2] - b - 2 * c
    k = step.square() * right[:, 3] - 2 * c
    quintic = (a, b, c, 10 * v - 4 * s + k / 2, -15 * v + 7 * s - k, 6 * v - 3 * s + k / 2)
    return torch.stack([left[:, 0], step, *quintic], dim=-1)


def _quintic(pieces: Tensor, place: Tensor) -> Tensor:
    """Each piece (*S, 8) at its log r (*S,), held at its ends."""
    x = ((place - pieces[..., 0]) / pieces[..., 1]).clamp(0, 1)
    value = pieces[..., 7]
    for power in (6, 5, 4, 3, 2):
        value = value * x + pieces[..., power]
    return value
