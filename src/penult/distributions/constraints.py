"""The unit sphere as a constraint of torch.distributions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions.constraint_registry import transform_to

__all__ = ["NormalizeTransform", "sphere"]


class _Sphere(constraints.Constraint):
    """Unit vectors along the last dimension, up to the accuracy of their dtype."""

    is_discrete = False
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        facts = torch.finfo(value.dtype)
        tolerance = max(1e-6, (20 if facts.bits >= 32 else 2) * facts.eps)
        return torch.le((torch.linalg.vector_norm(value, dim=-1) - 1).abs(), tolerance)

    def __repr__(self) -> str:
        return "Sphere()"


sphere = _Sphere()


class NormalizeTransform(Transform):
    """Projection of real vectors onto the unit sphere, x ↦ x / ‖x‖; not bijective. Zero goes to the first axis.

    ``torch.distributions.transform_to`` returns it for the constraint :data:`sphere`.

    Example:
        >>> from torch.distributions import transform_to
        >>> transform_to(sphere)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    domain = constraints.real_vector
    codomain = sphere

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormalizeTransform)

    def __hash__(self) -> int:
        return hash(NormalizeTransform)

    def _call(self, x: Tensor) -> Tensor:
        # Squares of very small and very large coordinates leave the range of floats, so the largest is scaled to 1.
        largest = x.detach().abs().amax(-1, keepdim=True)
        axis = torch.zeros_like(x)
        axis[..., 0] = 1
        scaled = torch.where(largest > 0, x / largest.where(largest > 0, 1), axis)
        unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return unit

    def _inverse(self, y: Tensor) -> Tensor:
        return y


@transform_to.register(_Sphere)
def _transform_to_sphere(constraint: Any) -> NormalizeTransform:
    return NormalizeTransform()
