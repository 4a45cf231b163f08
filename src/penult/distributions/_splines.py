"""Splines of single coordinates over a mixture: the density that a normalizing flow has, and is fitted by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from penult.distributions.principal_mixture import PrincipalMixture

__all__ = ["BOUND", "ELEMENTS", "PARTS", "SLOPE", "log_density", "mixture_of", "splines", "zuko"]

BOUND = 5.0  # standard deviations within which the splines bend; beyond, they are the identity
SLOPE = 1e-3  # the least of a spline, and the inverse of the greatest
ELEMENTS = 1 << 18  # of values handled at a time; a spline makes some tens of numbers of each
PARTS = ("loc", "components", "logits", "means", "scale_tril", "residual_scale")  # of the mixture


def zuko() -> Any:
    """Transforms of zuko.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from zuko import transforms  # not by importlib, which torch.compile does not trace
    except ImportError as error:
        raise ImportError('a NormalizingFlow needs zuko: pip install "penult[flow]"', name=error.name) from error
    return transforms


def mixture_of(parts: Iterable[Tensor], validate_args: bool = False) -> PrincipalMixture:
    """The mixture of `PARTS`."""
    loc, components, logits, means, scale_tril, residual_scale = parts
    return PrincipalMixture(loc, components, logits, means, scale_tril, residual_scale, validate_args=validate_args)


def splines(knots: Tensor) -> Any:
    """The splines (d,) that unconstrained knots (d, 3·bins − 1) stand for."""
    bins = (knots.shape[-1] + 1) // 3
    widths, heights, slopes = knots.split([bins, bins, bins - 1], -1)
    # bound and slope are part of what the numbers mean, so they don't follow zuko's defaults
    return zuko().MonotonicRQSTransform(widths, heights, slopes, bound=BOUND, slope=SLOPE)


def log_density(rows: Tensor, knots: Tensor, base: PrincipalMixture) -> Tensor:
    """Log density of scaled rows (n, d), (n,)."""
    z, slope = splines(knots).call_and_ladj(rows)
    density: Tensor = base.log_prob(z) + slope.sum(-1)
    return density
