"""Sampling on the unit sphere in two steps: the cosine to the mean direction, then the direction around it.

The cosine t is represented by y = 1 − t, so that concentrated samples keep the digits of their distance from the mean.
It is sampled by Ulrich's and Wood's rejection scheme (Ulrich 1984, Wood 1994), in a form without cancellation that
holds for every κ ≥ 0: with u the first coordinate of a uniform point on the sphere,

    b = m / (2κ + √(4κ² + m²)),  x₀ = (1 − b) / (1 + b),  v = x₀ u,  m = d − 1
    accept iff log U ≤ −m [log(1 + v) − v / (1 + v)],  then y = (1 − x₀)(1 − u) / (1 + v).

The acceptance rate is at least 0.66.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penult.special import working_dtype

__all__ = ["around", "cosine_complement"]

# Number of proposals processed at a time.
_SCALARS = 1 << 15
# Number of vector elements processed at a time: a block stays in the cache between passes.
_ELEMENTS = 1 << 18
# Rounds of rejection; the probability 0.37^200 that one is not enough is negligible.
_ROUNDS = 200
# Below this dimension |x|² − (x·μ)² loses digits, and x is projected explicitly.
_CANCELS = 32


def cosine_complement(dim: int, kappa: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Sample y = 1 − t for each element of ``kappa``.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations ≥ 0, any shape (expanded views are fine).
        dtype: Dtype of the vectors that y is used for; float64 needs slower, more precise normals.
        generator: Source of randomness, or None for torch's default.

    Returns:
        Tensor of the shape of ``kappa`` in working precision; NaN where ``kappa`` is.

    Raises:
        RuntimeError: A proposal is refused 200 times in a row, which happens with a broken generator only.
    """
    work = working_dtype(kappa.device)
    shape, constant = (
        kappa.shape,
        all(s == 0 for s, n in zip(kappa.stride(), kappa.shape, strict=True) if n > 1),
    )
    n = kappa.numel()
    y = torch.empty(n, dtype=work, device=kappa.device)
    if n == 0:
        return y.reshape(shape)
    flat = (kappa.flatten()[:1] if constant else kappa.reshape(-1)).to(work)
    if dim == 1:
        heads = torch.rand(n, dtype=work, device=y.device, generator=generator)
        return (2.0 * (heads < torch.sigmoid(-2 * flat))).reshape(shape)
    m = dim - 1
    h = torch.hypot(2 * flat, flat.new_tensor(float(m)))
    b = m / (2 * flat + h)
    x0 = (2 * flat + 4 * flat * flat / (h + m)) / (2 * flat + h) / (1 + b)
    y0 = 2 * b / (1 + b)
    fine = dtype if dtype == torch.float64 and work == torch.float64 else torch.float32
    rejected: list[Tensor] = []
    for start in range(0, n, _SCALARS):
        stop = min(start + _SCALARS, n)
        x, top = (x0, y0) if constant else (x0[start:stop], y0[start:stop])
        y[start:stop], refused = _propose(dim, x, top, stop - start, fine, generator)
        rejected.append(refused.nonzero().squeeze(-1) + start)
    left = torch.cat(rejected)
    for _ in range(_ROUNDS):
        if left.numel() == 0:
            return y.reshape(shape)
        x, top = (x0, y0) if constant else (x0[left], y0[left])
        y[left], refused = _propose(dim, x, top, left.numel(), fine, generator)
        left = left[refused]
    raise RuntimeError(
        f"{left.numel()} of {n} von Mises-Fisher proposals were refused {_ROUNDS} times in a row; "
        "the random generator in use does not return uniform numbers"
    )


def _propose(
    dim: int, x0: Tensor, y0: Tensor, n: int, dtype: torch.dtype, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return n proposals of y and whether they are refused; NaN is never refused, so that the rejection ends."""
    device, work = x0.device, x0.dtype
    log_uniform = torch.rand(n, dtype=dtype, device=device, generator=generator).log_()
    if dim == 2:
        u = (math.pi * torch.rand(n, dtype=work, device=device, generator=generator)).cos_()
        bound = torch.zeros_like(u)
    elif dim == 3:
        u = 2 * torch.rand(n, dtype=work, device=device, generator=generator) - 1
        bound = torch.zeros_like(u)
    else:
        # u = N / √(N² + 2G), with G ~ Gamma(m/2) by Marsaglia and Tsang (2000). Their rejection test and the one above
        # are made at once, with one uniform number.
        normals = torch.randn(2, n, dtype=dtype, device=device, generator=generator)
        first, z = normals[0].to(work), normals[1].to(work)
        shape = (dim - 1) / 2 - 1 / 3
        w = (z / math.sqrt(9 * shape)).add_(1).clamp_min_(1e-30)
        cube = w * w * w
        bound = (z * z).mul_(0.5).add_(shape).add_(w.log_(), alpha=3 * shape).sub_(cube, alpha=shape)
        u = first * torch.addcmul(cube.mul_(2 * shape), first, first).rsqrt_()
    v = x0 * u
    inverse = 1 / (1 + v)
    bound.sub_(torch.log1p(v).sub_(v.mul_(inverse)), alpha=dim - 1)
    return (1 - u).mul_(y0).mul_(inverse), log_uniform > bound


def around(loc: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sample unit vectors at cosine 1 − y to their mean directions, uniformly around them.

    Args:
        loc: Mean directions (*B, d), unit; float32 or float64.
        y: One minus the cosines (*S, *B), in working precision.
        generator: Source of randomness, or None for torch's default.

    Returns:
        Tensor (*S, *B, d) of the dtype of ``loc``.
    """
    dim = loc.shape[-1]
    x = torch.empty(*y.shape, dim, dtype=loc.dtype, device=loc.device)
    batch = loc.shape[:-1].numel()
    samples = y.numel() // batch if batch else 0
    if y.numel() == 0:
        return x
    t, sine = 1 - y, (y * (2 - y)).clamp_min(0).sqrt()
    if dim == 1:
        return x.copy_(t.unsqueeze(-1) * loc)
    if dim == 2:
        sign = 2 * torch.randint(2, y.shape, device=y.device, generator=generator) - 1
        normal = torch.stack([-loc[..., 1], loc[..., 0]], dim=-1)
        return x.copy_(t.unsqueeze(-1) * loc + (sine * sign).unsqueeze(-1) * normal)
    rows, mean = x.view(samples, batch, dim), loc.reshape(batch, dim)
    t, sine = t.to(x.dtype).reshape(samples, batch), sine.to(x.dtype).reshape(samples, batch)
    if batch == 1:
        rows, mean, t, sine = rows[:, 0], mean[0], t[:, 0], sine[:, 0]
        _fill(rows, mean, t, sine, max(1, _ELEMENTS // dim), generator)
    elif batch * dim <= _ELEMENTS:
        _fill(rows, mean, t, sine, max(1, _ELEMENTS // (batch * dim)), generator)
    else:
        step = max(1, _ELEMENTS // dim)
        for i in range(samples):
            for b in range(0, batch, step):
                part = slice(b, b + step)
                _fill(rows[i, part], mean[part], t[i, part], sine[i, part], step, generator)
    return x


def _fill(rows: Tensor, mean: Tensor, t: Tensor, sine: Tensor, step: int, generator: torch.Generator | None) -> None:
    """Fill rows (n, ..., d) in blocks of ``step`` along the first dimension; mean is (d,) or (..., d)."""
    own_means = rows.dim() == mean.dim()
    for i in range(0, rows.shape[0], step):
        x, mu = rows[i : i + step], mean[i : i + step] if own_means and mean.dim() > 1 else mean
        x.normal_(generator=generator)
        along = torch.mv(x, mu) if mu.dim() == 1 else (x * mu).sum(-1)
        if x.shape[-1] < _CANCELS:
            x.addcmul_(along.unsqueeze(-1), mu, value=-1)
            along = (x * mu).sum(-1)
            x.addcmul_(along.unsqueeze(-1), mu, value=-1)
            scale = x.square().sum(-1)
            along.zero_()
        else:
            scale = torch.linalg.vector_norm(x, dim=-1).square_().addcmul_(along, along, value=-1)
        scale.clamp_min_(torch.finfo(scale.dtype).tiny).rsqrt_().mul_(sine[i : i + step])
        shift = torch.addcmul(t[i : i + step], along, scale, value=-1)
        x.mul_(scale.unsqueeze(-1)).addcmul_(shift.unsqueeze(-1), mu)
