"""Total mass T(r) of the classes of a head at each radius r of a sphere, a table of T, and the density of directions.

F (or F_m, in dimension m) is `penult.special.log_sphere_mgf`; w'_y and b'_y are the rows and biases of the head in the
chart of the sphere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult import special
from penult.head import Head

__all__ = [
    "direction_log_prob",
    "direction_log_prob_at",
    "log_mass",
    "log_mass_and_slopes",
    "log_mass_at",
    "radial_table",
]

# --- Mass at a radius ---------------------------------------------------------------------------------------


# Number of (class, radius) pairs evaluated at a time; each takes one or two kilobytes.
_PAIRS = 1 << 16


def log_mass(dim: int, norms: Tensor, offsets: Tensor, radius: Tensor) -> Tensor:
    r"""Return T(r) = log Σ_y exp(b'_y + F(r ‖w'_y‖)) for radii (R,): (R,).

    Args:
        dim: Dimension of the chart.
        norms: ‖w'_y‖ (K,) of the rows in the chart.
        offsets: b'_y (K,), biases at the centre of the chart.
        radius: Radii (R,).
    """
    total = torch.full_like(radius, -torch.inf)
    for rho, b in _parts(norms, offsets, radius):
        total = torch.logaddexp(total, (b + special.log_sphere_mgf(dim, radius * rho)).logsumexp(0))
    return total


def log_mass_and_slopes(dim: int, norms: Tensor, offsets: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return T(r) as `log_mass` does, and its first two derivatives with respect to log r, all (R,)."""
    total = log_mass(dim, norms, offsets, radius)
    first, second = torch.zeros_like(total), torch.zeros_like(total)
    # Slopes are as large as κ and would cancel in the variance, so one of them is subtracted from all.
    base: Tensor | None = None
    for rho, b in _parts(norms, offsets, radius):
        kappa = radius * rho
        share = (b + special.log_sphere_mgf(dim, kappa) - total).exp()
        slope = kappa * special.mean_resultant_length(dim, kappa)
        base = slope.gather(0, share.argmax(0, keepdim=True))[0] if base is None else base
        difference = slope - base
        first += (share * difference).sum(0)
        second += (share * (kappa.square() * special.cosine_variance(dim, kappa) + difference.square())).sum(0)
    assert base is not None
    mean = base + first
    return total, mean, second - first.square() + mean


def _parts(norms: Tensor, offsets: Tensor, radius: Tensor) -> zip[tuple[Tensor, Tensor]]:
    step = max(1, _PAIRS // max(1, len(radius)))
    return zip(norms.unsqueeze(-1).split(step), offsets.unsqueeze(-1).split(step), strict=True)


# --- Table of the mass --------------------------------------------------------------------------------------


# First distance of the knots in log r.
_STEP = 0.12
# Largest error of the table relative to max(1, |T|). Intervals are halved, at most so many times, until the error in
# their middle is a fifth of it.
_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5}
_HALVINGS = 12
# Range of κ: the lower end over the root of the dimension, the upper end over the dimension.
_LOWEST, _HIGHEST = 3e-3, 1e6


def radial_table(dim: int, norms: Tensor, offsets: Tensor, halvings: int = _HALVINGS) -> Tensor:
    r"""Tabulate T(r) = log Σ_y exp(b'_y + F_m(r ‖w'_y‖)) as a piecewise quintic in log r.

    The pieces have the value and the first two derivatives of T at the knots. Intervals are halved until the error is
    below 1e-9 max(1, \|T\|), for κ up to a million times the dimension.

    Args:
        dim: Dimension m of the chart.
        norms: ‖w'_y‖ (K,).
        offsets: b'_y (K,).
        halvings: Largest number of times that an interval is halved. With 0 the error is below 1e-4 for usual heads.

    Returns:
        (1 + intervals, 8), for `log_mass_at`.
    """
    # If all rows are equal, their centered norms are 0 and T is constant.
    largest = float(norms.max()) or 1.0
    low, high = math.log(_LOWEST * math.sqrt(dim) / largest), math.log(_HIGHEST * dim / largest)
    knots = torch.linspace(low, high, math.ceil((high - low) / _STEP) + 1, dtype=norms.dtype, device=norms.device)
    # Rows of (log r, T and its two derivatives) at the knots.
    values = torch.stack([knots, *log_mass_and_slopes(dim, norms, offsets, knots.exp())], dim=-1)
    pieces = _fit_pieces(values[:-1], values[1:])
    accurate = torch.zeros(len(pieces), dtype=torch.bool, device=knots.device)
    for _ in range(halvings):
        middle = (values[:-1, 0] + values[1:, 0])[~accurate] / 2
        exact = log_mass(dim, norms, offsets, middle.exp())
        error = (_quintic(pieces[~accurate], middle) - exact).abs() / exact.abs().clamp_min(1)
        accurate[~accurate] = error < _ERROR[norms.dtype] / 5
        middle = middle[error >= _ERROR[norms.dtype] / 5]
        if not len(middle):
            break
        new_values = torch.stack([middle, *log_mass_and_slopes(dim, norms, offsets, middle.exp())], dim=-1)
        # A knot carries the flag of the interval that ends there. Both halves of a halved interval are not accurate:
        # one ends in a new knot, the other in the knot of the interval itself.
        flags = torch.cat([torch.ones(1, dtype=torch.bool, device=accurate.device), accurate])
        flags = torch.cat([flags, torch.zeros(len(new_values), dtype=torch.bool, device=accurate.device)])
        values = torch.cat([values, new_values])
        order = values[:, 0].argsort()
        values, accurate = values[order], flags[order][1:]
        pieces = _fit_pieces(values[:-1], values[1:])
    at_zero = log_mass(dim, norms, offsets, knots.new_zeros(1))
    # Beyond the last radius R, T = slope r / R - (m - 1)/2 log r + constant.
    slope = values[-1, 2] + (dim - 1) / 2
    ends = torch.cat([values[-1, :2], at_zero, knots.new_tensor([float(dim)]), slope[None], knots.new_zeros(3)])
    return torch.cat([ends[None], pieces])


def log_mass_at(table: Tensor, radius: Tensor) -> Tensor:
    """Return T(r) of a table for radii (*S,), in the precision of the table. It is differentiable in the radii."""
    last_knot, last_value, at_zero, dim, slope = table[0, :5].unbind()
    pieces = table[1:]
    r = radius.to(table.dtype)
    log_r = r.clamp_min(torch.finfo(table.dtype).tiny).log()
    index = torch.searchsorted(pieces[:, 0].contiguous(), log_r.detach(), right=True).sub(1).clamp(min=0)
    # Unlike indexing, torch.func maps an embedding over a single radius.
    inside = _quintic(torch.nn.functional.embedding(index, pieces), log_r)
    # Below the first knot T grows with the square of r, beyond the last one as F does for large arguments.
    below = at_zero + (pieces[0, 2] - at_zero) * (r * (-pieces[0, 0]).exp()).square()
    excess = (log_r - last_knot).clamp_min(0)
    above = last_value + slope * excess.exp().sub(1) - (dim - 1) / 2 * excess
    return torch.where(log_r < pieces[0, 0], below, torch.where(excess > 0, above, inside))


def _fit_pieces(left: Tensor, right: Tensor) -> Tensor:
    """Return pieces (N, 8): first knot, length and six coefficients.

    The ends (N, 4) of the intervals have log r, T and its first two derivatives.
    """
    step = right[:, 0] - left[:, 0]
    a, b, c = left[:, 1], step * left[:, 2], step.square() * left[:, 3] / 2
    # Value, slope and curvature at the right end, minus those of a + b x + c x².
    v, s = right[:, 1] - a - b - c, step * right[:, 2] - b - 2 * c
    k = step.square() * right[:, 3] - 2 * c
    quintic = (a, b, c, 10 * v - 4 * s + k / 2, -15 * v + 7 * s - k, 6 * v - 3 * s + k / 2)
    return torch.stack([left[:, 0], step, *quintic], dim=-1)


def _quintic(pieces: Tensor, log_r: Tensor) -> Tensor:
    """Return the values of pieces (*S, 8) at log r (*S,), which is clamped to the interval of the piece."""
    x = ((log_r - pieces[..., 0]) / pieces[..., 1]).clamp(0, 1)
    value = pieces[..., 7]
    for power in (6, 5, 4, 3, 2):
        value = value * x + pieces[..., power]
    return value


# --- Density of directions ----------------------------------------------------------------------------------


def direction_log_prob(head: Head, h: Tensor, u: Tensor, table: Tensor) -> Tensor:
    """Return log p(u / r | r) of activations h (*S, d) with chart coordinates u (*S, m): (*S,).

    See :meth:`penult.Sphere.direction_log_prob`.
    """
    return direction_log_prob_at(_log_partition(head, h), u, table)


def direction_log_prob_at(log_partition: Tensor, u: Tensor, table: Tensor) -> Tensor:
    """Return log p(u / r | r) for the log-sum-exp of the centered logits (*S,) and chart coordinates u (*S, m)."""
    # Squares could overflow in the dtype of u.
    radius = torch.linalg.vector_norm(u, dim=-1, dtype=table.dtype)
    mass = log_mass_at(table, radius) + special.log_sphere_area(u.shape[-1])
    return (log_partition.to(mass.dtype) - mass).to(u.dtype)


def _log_partition(head: Head, h: Tensor) -> Tensor:
    """Return the log-sum-exp of the centered logits of activations (*S, d): (*S,)."""
    if h.dtype != head.weight.dtype:
        return head.centered_logits(h).logsumexp(-1)
    # Centering the sum takes one product for each h, centering the logits K of them.
    log_sum: Tensor = head(h).logsumexp(-1)
    return log_sum - (h @ head.mean_row.to(h.dtype))
