"""Distribution of the cosine to the mean direction."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from penult.special._moments import log_sphere_mgf_deficit, mean_resultant_deficit
from penult.special._precision import checked_dim, working_dtype

__all__ = ["cosine_cdf", "cosine_log_prob", "cosine_shift", "gauss_legendre"]

# Number of nodes of the Gauss-Legendre rule along one tail of the angle.
_NODES = 24
# Standard deviations from the mode at which a tail is cut: exp(−9²/2) ~ 3e-18.
_REACH = 9.0


def cosine_log_prob(dim: int, kappa: Tensor, t: Tensor, complement: Tensor | None = None) -> Tensor:
    r"""Return the log density of the cosine t = x·μ of a von Mises-Fisher variable x.

    .. math:: \log p(t) = \kappa t + \tfrac{d-3}{2} \log(1-t^2) - F(\kappa)
              + \log \frac{\Gamma(d/2)}{\sqrt\pi\,\Gamma((d-1)/2)}

    with respect to dt on (−1, 1); in one dimension, the log probability of t = ±1.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations ≥ 0, broadcast against ``t``.
        t: Cosines in [−1, 1].
        complement: 1 − t with the shape of ``t``, where it is known more accurately than by subtraction.

    Returns:
        Tensor of the broadcast shape.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` or ``t`` is not a floating tensor.

    Example:
        >>> cosine_log_prob(3, torch.tensor(0.0), torch.tensor([-0.5, 0.9])).exp()  # uniform on [-1, 1]
        tensor([0.5000, 0.5000])
    """
    dim = checked_dim(dim, kappa=kappa, t=t)
    dtype = torch.promote_types(kappa.dtype, t.dtype)
    work = working_dtype(t.device)
    k, t = kappa.to(work), t.to(work)
    y = 1 - t if complement is None else complement.to(work)
    log_prob = log_sphere_mgf_deficit(dim, k) - k * y - (math.log(2.0) if dim == 1 else -_log_polar_constant(dim))
    # The exponent is zero in dimension 3, where 0·log 0 would give NaN at the end points.
    if dim not in (1, 3):
        log_prob = log_prob + (dim - 3) / 2 * (y * (2 - y)).log()
    inside = (y == 0) | (y == 2) if dim == 1 else (y >= 0) & (y <= 2)
    return torch.where(inside, log_prob, -torch.inf).to(dtype)


def cosine_cdf(dim: int, kappa: Tensor, t: Tensor, complement: Tensor | None = None) -> Tensor:
    r"""Return P(x·μ ≤ t) for a von Mises-Fisher variable x with concentration κ.

    Integrates over the angle with a Gauss-Legendre rule, along the tail on the side of the mode where t lies, so that
    both tails have a small relative error. In one dimension it is a step function.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations ≥ 0, broadcast against ``t``.
        t: Cosines; values outside [−1, 1] give 0 or 1.
        complement: 1 − t with the shape of ``t``, where it is known more accurately than by subtraction.

    Returns:
        Tensor of the broadcast shape; not differentiable.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` or ``t`` is not a floating tensor.

    Example:
        >>> cosine_cdf(3, torch.tensor(0.0), torch.tensor([-1.0, 0.0, 0.5]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    dim = checked_dim(dim, kappa=kappa, t=t)
    dtype = torch.promote_types(kappa.dtype, t.dtype)
    work = working_dtype(t.device)
    with torch.no_grad():
        k, t = torch.broadcast_tensors(kappa.to(work), t.to(work))
        y = (1 - t if complement is None else complement.to(work).expand(t.shape)).clamp(0, 2)
        if dim == 1:
            lower = torch.sigmoid(-2 * k)
            return torch.where(t < -1, 0.0, torch.where(t < 1, lower, 1.0)).to(dtype)
        near = y < mean_resultant_deficit(dim, k)
        log_angle_density = cosine_log_prob(dim, k, 1 - y, y) + 0.5 * (y * (2 - y)).log()
        tail = log_angle_density.exp() * _tail(dim, k, y, near, 4 * _NODES, mean_shift=False)
        cdf = torch.where(near, 1 - tail, tail)
        return torch.where(y <= 0, 1.0, torch.where(y >= 2, 0.0, cdf)).to(dtype)


def cosine_shift(dim: int, kappa: Tensor, complement: Tensor) -> Tensor:
    r"""Return ∂t/∂κ of a cosine at a fixed probability, given 1 − t (implicit reparameterisation).

    From the angle θ with density ∝ f(φ) = sin^{d−2}φ e^{κ cos φ},

    .. math:: \frac{dt}{d\kappa} &= \frac{\sin\theta}{f(\theta)} \int_0^\theta (\cos\phi - A) f(\phi)\,d\phi \\
              &= -\frac{\sin\theta}{f(\theta)} \int_\theta^\pi (\cos\phi - A) f(\phi)\,d\phi,

    the integral is taken over the side where the integrand does not change sign (principle: Figurnov, Mohamed, Mnih
    2018).

    Args:
        dim: Dimension of the ambient space, at least 2.
        kappa: Concentrations ≥ 0, same shape as ``complement``.
        complement: 1 − t in [0, 2].

    Returns:
        Tensor of the same shape, non-negative, relative error about 1e-11.
    """
    near = complement < mean_resultant_deficit(dim, kappa)
    sine = (complement * (2 - complement)).clamp_min(0).sqrt()
    shift = sine * _tail(dim, kappa, complement, near, _NODES, mean_shift=True)
    return torch.where((complement <= 0) | (complement >= 2), 0.0, shift)


@functools.cache
def gauss_legendre(nodes: int) -> tuple[tuple[float, float], ...]:
    """Return the nodes and weights on [0, 1], by Newton's method on the Legendre recurrence."""
    rule = []
    for i in range(nodes):
        x = math.cos(math.pi * (i + 0.75) / (nodes + 0.5))
        slope = 0.0
        for _ in range(6):
            before, value = 1.0, x
            for j in range(2, nodes + 1):
                before, value = value, ((2 * j - 1) * x * value - (j - 1) * before) / j
            slope = nodes * (x * value - before) / (x * x - 1)
            x -= value / slope
        rule.append((0.5 * (1 + x), 1 / ((1 - x * x) * slope * slope)))
    return tuple(rule)


def _log_polar_constant(dim: int) -> float:
    """Return log Γ(d/2) / (√π Γ((d−1)/2)), the log density of the cosine under the uniform distribution, at 0."""
    x, ratio = (dim - 1) / 2, 1.0
    # Γ(x + ½) / Γ(x) by recurrence up to the x from which its asymptotic series is exact (DLMF 5.11.13).
    while x < 64:
        ratio *= x / (x + 0.5)
        x += 1
    y = 1 / (8 * x)
    series = 1 + y * (-1 + y * (0.5 + y * (2.5 + y * (-2.625 + y * (-49.875 + y * 54.3125)))))
    return math.log(ratio * series) + 0.5 * math.log(x / math.pi)


def _tail(dim: int, kappa: Tensor, y: Tensor, near: Tensor, nodes: int, mean_shift: bool) -> Tensor:
    """Return ∫ g f dφ / f(θ) over the angles from θ to the pole on its side of the mean cosine, cos θ = 1 − y.

    f(φ) = sin^{d−2}φ e^{κ cos φ}; g is 1, or |cos φ − A| with ``mean_shift``. ``near`` is True for angles θ between
    the mean direction (φ = 0) and the mean cosine.
    """
    theta = 2 * (y / 2).clamp(0, 1).sqrt().asin()
    m = dim - 2
    h = torch.hypot(2 * kappa, kappa.new_tensor(float(m)))
    tiny = torch.finfo(kappa.dtype).tiny
    mode = (m + m * m / (h + 2 * kappa).clamp_min(tiny)) / (m + h).clamp_min(tiny)  # 1 − cos of the mode
    angle = 2 * (mode / 2).sqrt().asin()
    stiffness = m / (mode * (2 - mode)).clamp_min(tiny) + kappa * (1 - mode)
    reach = _REACH / stiffness.clamp_min(tiny).sqrt()
    low = torch.where(near, (torch.minimum(theta, angle) - reach).clamp_min(0), theta)
    high = torch.where(near, theta, (torch.maximum(theta, angle) + reach).clamp_max(math.pi))
    total = torch.zeros_like(theta)
    deficit = mean_resultant_deficit(dim, kappa) if mean_shift else None
    for x, weight in gauss_legendre(nodes):
        phi = low + (high - low) * x
        fall = 2 * (phi / 2).sin() ** 2
        density = kappa * (y - fall)
        if m:
            density = density + m * (phi.sin() / theta.sin()).log()
        term = weight * density.exp()
        total = total + (term if deficit is None else term * (deficit - fall).abs())
    return total * (high - low)
