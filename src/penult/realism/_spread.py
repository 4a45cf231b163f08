"""Laws of single numbers: the cosine to the row of the class, and the norm."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from penult import special
from penult.bases import Sphere
from penult.realism._distances import kolmogorov_smirnov, wasserstein
from penult.realism._result import Histogram, Spread

__all__ = ["cosine_spread", "exact_cosine", "norm_spread"]

_BINS = 48


def cosine_spread(real: Tensor, drawn: Tensor, other: Tensor) -> Spread:
    """Cosines (M,) of real activations, of draws, and of other real ones."""
    real, drawn, other = (t.clamp(-1, 1) for t in (real.double(), drawn.double(), other.double()))
    return _spread(real, drawn, kolmogorov_smirnov(real, drawn), kolmogorov_smirnov(real, other))


def norm_spread(real: Tensor, drawn: Tensor, other: Tensor) -> Spread:
    """Norms of rows (M, d), likewise."""
    r, drawn_r, other_r = (torch.linalg.vector_norm(rows.double(), dim=-1) for rows in (real, drawn, other))
    sd = float(r.std(correction=0))
    scale = sd if sd > 0 else 1.0
    return _spread(r, drawn_r, wasserstein(r, drawn_r) / scale, wasserstein(r, other_r) / scale)


def exact_cosine(base: Sphere, rows: Tensor, counts: Tensor, spread: Spread) -> Spread:
    """The same with mean and deviation of the cosine under the tilts by rows (B, d), each ``counts`` (B,) times."""
    rows = rows.to(special.working_dtype(rows.device))
    share, kappa = base.radial_law(rows), base.kappa(rows)
    m = base.read(rows).shape[-1]
    mean, variance = special.mean_resultant_length(m, kappa), special.cosine_variance(m, kappa)
    weight = (counts / counts.sum()).to(share)
    first = float(weight @ (share * mean).sum(-1))
    second = float(weight @ (share * (variance + mean.square())).sum(-1))
    return dataclasses.replace(spread, law_mean=first, law_sd=max(second - first * first, 0.0) ** 0.5)


def _spread(real: Tensor, drawn: Tensor, distance: float, real_distance: float) -> Spread:
    low, high = (float(v) for v in torch.cat([real, drawn]).aminmax())
    edges = torch.linspace(low, high if high > low else low + 1e-6, _BINS + 1, dtype=torch.float64)
    counts = {}
    for name, sample in (("real", real), ("drawn", drawn)):
        place = (torch.searchsorted(edges, sample, right=True) - 1).clamp(0, _BINS - 1)
        counts[name] = tuple(place.bincount(minlength=_BINS).tolist())
    return Spread(
        real_mean=float(real.mean()),
        real_sd=float(real.std(correction=0)),
        drawn_mean=float(drawn.mean()),
        drawn_sd=float(drawn.std(correction=0)),
        distance=distance,
        real_distance=real_distance,
        histogram=Histogram(tuple(edges.tolist()), counts),
    )
