"""Moments of the cosine as functions of the concentration, and their inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from penult.special import _bessel
from penult.special._precision import checked_dim, traced, working_dtype

__all__ = [
    "concentration",
    "cosine_variance",
    "log_sphere_area",
    "log_sphere_mgf",
    "log_sphere_mgf_deficit",
    "mean_resultant_deficit",
    "mean_resultant_length",
]


def log_sphere_area(dim: int) -> float:
    r"""Return the logarithm of the surface area of the unit sphere in R^dim, log(2 π^{d/2} / Γ(d/2)).

    Args:
        dim: Dimension of the ambient space, at least 1 (where the "sphere" is two points, area 2).

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer.

    Example:
        >>> round(log_sphere_area(3), 6) == round(math.log(4 * math.pi), 6)
        True
    """
    dim = checked_dim(dim)
    half = dim / 2
    return math.log(2.0) + half * math.log(math.pi) - math.lgamma(half)


def log_sphere_mgf(dim: int, kappa: Tensor) -> Tensor:
    r"""Return F(κ) = log E exp(κ t), where t = u·μ and u is uniform on the unit sphere: log 0F1(; d/2; κ²/4).

    The normaliser of the von Mises-Fisher density is log C(κ) = −log_sphere_area(dim) − F(κ). In one
    dimension F = log cosh κ.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations, any shape, floating. F is even; negative values are allowed.

    Returns:
        Tensor like ``kappa``. Relative error about 1e-15 in float64.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` is not a floating tensor.

    Example:
        >>> log_sphere_mgf(3, torch.tensor([0.0, 1.0]))  # log(sinh κ / κ)
        tensor([0.0000, 0.1614])
    """
    return _in_working_dtype(_bessel.LOG_MGF, dim, kappa)


def mean_resultant_length(dim: int, kappa: Tensor) -> Tensor:
    r"""Return A(κ) = E[t] = I_{d/2}(κ) / I_{d/2−1}(κ), the mean cosine to the mean direction; tanh κ for dim 1.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations, any shape, floating. A is odd.

    Returns:
        Tensor like ``kappa``, in [0, 1) for κ ≥ 0.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` is not a floating tensor.

    Example:
        >>> mean_resultant_length(3, torch.tensor([0.0, 1.0, 1e6]))  # coth κ − 1/κ
        tensor([0.0000, 0.3130, 1.0000])
    """
    return _in_working_dtype(_bessel.MEAN, dim, kappa)


def mean_resultant_deficit(dim: int, kappa: Tensor) -> Tensor:
    r"""Return 1 − A(κ) for κ ≥ 0, with a small relative error even where A is close to 1.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations ≥ 0, any shape, floating.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` is not a floating tensor.

    Example:
        >>> mean_resultant_deficit(3, torch.tensor([1e12], dtype=torch.float64))  # 1/κ
        tensor([1.0000e-12], dtype=torch.float64)
    """
    return _in_working_dtype(_bessel.MEAN_DEFICIT, dim, kappa)


def log_sphere_mgf_deficit(dim: int, kappa: Tensor) -> Tensor:
    r"""Return κ − F(κ) for κ ≥ 0, without cancellation between κ and F; it grows as ((d − 1)/2) log κ.

    With y = 1 − t, the von Mises-Fisher log density is κ − F − κ y − log_sphere_area; in this form it is accurate for
    any concentration.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations ≥ 0, any shape, floating.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` is not a floating tensor.

    Example:
        >>> log_sphere_mgf_deficit(1, torch.tensor([0.0, 50.0]))  # tends to log 2
        tensor([0.0000, 0.6931])
    """
    return _in_working_dtype(_bessel.LOG_MGF_DEFICIT, dim, kappa)


def cosine_variance(dim: int, kappa: Tensor) -> Tensor:
    r"""Return V(κ) = A'(κ) = Var[t], the variance of the cosine; 1/d at κ = 0.

    It is not computed as 1 − A² − (d−1) A/κ, because of cancellation.

    Args:
        dim: Dimension of the ambient space, at least 1.
        kappa: Concentrations, any shape, floating.

    Raises:
        ValueError: ``dim`` is less than 1.
        TypeError: ``dim`` is not an integer, or ``kappa`` is not a floating tensor.

    Example:
        >>> cosine_variance(4, torch.tensor(0.0))
        tensor(0.2500)
    """
    dim = checked_dim(dim, kappa=kappa)
    work = working_dtype(kappa.device)
    return _bessel.variance(kappa.to(work), dim).to(kappa.dtype)


def concentration(dim: int, resultant: Tensor, complement: Tensor | None = None) -> Tensor:
    r"""Invert :func:`mean_resultant_length`: return the κ ≥ 0 with A(κ) = resultant.

    It is the maximum likelihood estimate of κ from a mean resultant length. Computed by three Halley steps from the
    midpoint of Amos's bounds (Amos 1974; Hornik and Grün 2014).

    Args:
        dim: Dimension of the ambient space, at least 1.
        resultant: Mean resultant lengths R in [0, 1], any shape, floating. 0 gives 0 and 1 gives inf.
        complement: 1 − R, same shape, where it is known more accurately than ``1 - resultant``: near R = 1 the error
            of the result depends on it. Gradients flow through ``resultant`` only.

    Returns:
        Tensor like ``resultant``; relative error at most 1e-12 where the complement is given.

    Raises:
        ValueError: ``dim`` is less than 1, a value lies outside [0, 1], or the shapes differ.
        TypeError: ``dim`` is not an integer, or ``resultant`` is not a floating tensor.

    Example:
        >>> concentration(3, mean_resultant_length(3, torch.tensor([0.5, 20.0])))
        tensor([ 0.5000, 20.0000])
    """
    dim = checked_dim(dim, resultant=resultant)
    if complement is not None and complement.shape != resultant.shape:
        raise ValueError(
            f"complement has shape {tuple(complement.shape)}; expected {tuple(resultant.shape)}, the shape of "
            "resultant. Pass 1 - resultant, or None"
        )
    if not traced(resultant) and not bool(((resultant >= 0) & (resultant <= 1)).all()):
        raise ValueError(
            f"resultant has values from {float(resultant.min())} to {float(resultant.max())}; expected values in [0, 1]"
        )
    work = working_dtype(resultant.device)
    r = resultant.to(work)
    c = 1 - r.detach() if complement is None else complement.detach().to(work)
    kappa: Tensor = _Concentration.apply(r, c, dim)
    return kappa.to(resultant.dtype)


def _in_working_dtype(functions: _bessel.FunctionPair, dim: int, kappa: Tensor) -> Tensor:
    """Check the arguments, compute in the working dtype, and round to the dtype of `kappa`."""
    dim = checked_dim(dim, kappa=kappa)
    return _bessel.call(functions, kappa.to(working_dtype(kappa.device)), dim).to(kappa.dtype)


class _Concentration(Function):
    """R ↦ κ with dκ/dR = 1 / V(κ)."""

    @staticmethod
    def forward(r: Tensor, c: Tensor, dim: int) -> Tensor:
        return _invert(dim, r, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[2]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / _bessel.variance(ctx.saved_tensors[0], ctx.dim), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None, None], r: Tensor, c: Tensor, dim: int) -> Any:
        batch_dim = next(i for i in in_dims[:2] if i is not None)
        r, c = (
            x if i == batch_dim else x.unsqueeze(batch_dim) if i is None else x.movedim(i, batch_dim)
            for x, i in zip((r, c), in_dims[:2], strict=True)
        )
        return _Concentration.apply(*torch.broadcast_tensors(r, c), dim), batch_dim


def _invert(dim: int, r: Tensor, c: Tensor) -> Tensor:
    """Compute κ from R and 1 − R."""
    if dim == 1:
        return 0.5 * torch.log1p(2 * r / c)
    nu = dim / 2 - 1

    def bound(a: float, b: float) -> Tensor:
        """Return the κ with R = κ / (a + √(κ² + b²))."""
        return r * (a + (r * r * a * a + c * (2 - c) * b * b).sqrt()) / (c * (2 - c))

    low = torch.maximum(bound(nu, nu + 2), bound(nu + 0.5, nu + 0.5))
    high = bound(nu + 0.5, nu + 1.5)
    kappa = 0.5 * (low + high)
    for _ in range(3):
        a, v = _bessel.in_chunks(_bessel.mean, kappa, dim), _bessel.variance(kappa, dim)
        error = torch.where(r < 0.5, a - r, c - _bessel.in_chunks(_bessel.mean_deficit, kappa, dim))
        bend = -2 * a * v - (dim - 1) * (v - a / kappa) / kappa
        step = error / v / (1 - error * bend / (2 * v * v))
        kappa = torch.minimum(torch.maximum(kappa - step, low), high)
    return torch.where(r <= 0, 0.0, torch.where(c <= 0, torch.inf, kappa))
