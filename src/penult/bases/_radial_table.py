"""The mass that all classes put at a radius, tabulated: it is a function of the radius alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult.bases._radial_mass import log_mass, log_mass_and_slopes

__all__ = ["log_mass_at", "radial_table"]

_STEP = 0.06  # between knots, in log r, at most
_ERROR = {torch.float64: 1e-9, torch.float32: 1e-5}  # at most, over max(1, |T|)
_HALVINGS = 5  # of the step at most, until the error is below that
_LEAST, _MOST = 3e-3, 1e6  # of κ, over the root of the dimension and over the dimension
_FACTS = 5  # numbers in the first row: log of the first radius, step, T(0), dimension, slope of T far out


def radial_table(dim: int, norms: Tensor, offsets: Tensor, halvings: int = _HALVINGS) -> Tensor:
    r"""Coefficients of T(r) = log Σ_y exp(b'_y + F_m(r ‖w'_y‖)), a quintic in log r between each two knots.

    T is matched at the knots in value and first two derivatives, which are brought together until its error between
    them is below 1e-9 max(1, \|T\|): for κ up to a million times the dimension.

    Args:
        dim: Dimension m of the chart.
        norms: ‖w'_y‖ (K,).
        offsets: b'_y (K,).
        halvings: How often knots may be brought together; without any, the error is below 1e-5 for usual heads.

    Returns:
        (1 + intervals, 6), for `log_mass_at`.
    """
    low = math.log(_LEAST * math.sqrt(dim) / float(norms.max()))
    high = math.log(_MOST * dim / float(norms.max()))
    count, table = math.ceil((high - low) / _STEP), None
    for halving in range(halvings + 1):
        step = _STEP / 2**halving
        knots = low + step * torch.arange((count << halving) + 1, dtype=norms.dtype, device=norms.device)
        table = _matched(dim, norms, offsets, knots, step)
        if not halvings:
            break
        between = (knots[:-1] + step / 2).exp()
        exact = log_mass(dim, norms, offsets, between)
        if float(((log_mass_at(table, between) - exact) / exact.abs().clamp_min(1)).abs().max()) < _ERROR[norms.dtype]:
            break
    assert table is not None
    return table


def _matched(dim: int, norms: Tensor, offsets: Tensor, knots: Tensor, step: float) -> Tensor:
    """Coefficients between knots (N,) in log r, for `log_mass_at`."""
    value, first, second = log_mass_and_slopes(dim, norms, offsets, knots.exp())
    first, second = step * first, step**2 * second
    a, rise = value[:-1], value[1:] - value[:-1]
    b, c = first[:-1], second[:-1] / 2
    # What is left of value, slope and curvature at the right end, after a + b x + c x².
    v, s, k = rise - b - c, first[1:] - b - 2 * c, second[1:] - 2 * c
    quintic = torch.stack([a, b, c, 10 * v - 4 * s + k / 2, -15 * v + 7 * s - k, 6 * v - 3 * s + k / 2], dim=-1)
    nought = log_mass(dim, norms, offsets, knots.new_zeros(1))
    facts = quintic.new_zeros(1, 6)
    far = first[-1] / step + (dim - 1) / 2  # T = far r / R - (m - 1)/2 log r + constant, beyond R
    facts[0, :_FACTS] = torch.stack([knots[0], knots.new_tensor(step), nought[0], knots.new_tensor(float(dim)), far])
    return torch.cat([facts, quintic])


def log_mass_at(table: Tensor, radius: Tensor) -> Tensor:
    """T(r) of a table for radii (*S,), in the table's precision; part of the autograd graph of the radii."""
    low, step, nought, dim, far = table[0, :_FACTS].unbind()
    count = len(table) - 1
    r = radius.to(table.dtype)
    safe = r.clamp_min(torch.finfo(table.dtype).tiny)
    place = (safe.log() - low) / step
    index = place.detach().floor().clamp(0, count - 1)
    x = (place - index).clamp(0, 1)
    a = table[1 + index.long()]
    inside = a[..., 5]
    for power in (4, 3, 2, 1, 0):
        inside = inside * x + a[..., power]
    # Below the first knot T grows with the square of r, beyond the last as F does far out.
    near = nought + (table[1, 0] - nought) * (r * (-low).exp()).square()
    end = table[count].sum()
    beyond = ((place - count) * step).clamp_min(0)
    away = end + far * beyond.exp().sub(1) - (dim - 1) / 2 * beyond
    return torch.where(place < 0, near, torch.where(beyond > 0, away, inside))
