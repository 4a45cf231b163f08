"""An exponential tilt of a base measure."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from penult._checks import as_size
from penult.special import _validates_by_default, in_full, in_range, traced

__all__ = ["Tilt", "Tiltable"]


class Tiltable(Protocol):
    """The interface of base measures that can be tilted; :class:`penult.bases.Base` has it."""

    def log_mgf(self, weight: Tensor) -> Tensor:
        """Return log M(w) for rows (*B, d): shape (*B,)."""

    def log_prob(self, h: Tensor) -> Tensor:
        """Return log m(h), with the shape of ``h`` without its last dimension."""

    def project(self, h: Tensor) -> Tensor:
        """Return the point at which the base evaluates its density for ``h``."""

    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample one activation from the tilt by weight[i] for each i of ``index`` (N,): (N, d)."""


class Tilt(Distribution):
    r"""The distribution p(h) = exp(w·h) m(h) / M(w), a base measure m tilted by w.

    Args:
        base: The base measure.
        weight: Tilts w (*B, d).
        validate_args: As in torch.distributions.

    Raises:
        ValueError: ``weight`` has no last dimension or, if validated, is not finite.

    Example:
        >>> import penult
        >>> p = Tilt(penult.Sphere(2.0), torch.eye(3))
        >>> p.batch_shape, p.event_shape, p.mean[0]  # the mean is the gradient of log M
        (torch.Size([3]), torch.Size([3]), tensor([1.0746, 0.0000, 0.0000]))
    """

    arg_constraints = {"weight": constraints.real_vector}  # noqa: RUF012  (torch's own convention)
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, base: Tiltable, weight: Tensor, validate_args: bool | None = None) -> None:
        if weight.dim() < 1:
            raise ValueError("weight is a scalar; expected a tensor (*B, d)")
        self.base = base
        self.weight = weight
        # The constraint of torch refuses NaN alone, but an infinite tilt has no mean and no density.
        validate = _validates_by_default() if validate_args is None else validate_args
        if validate and not traced(weight) and not bool(weight.isfinite().all()):
            raise ValueError("weight holds NaN or infinity; expected finite tilts")
        super().__init__(weight.shape[:-1], weight.shape[-1:], validate_args=validate)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Tilt:
        """Return a view of the distribution with a larger batch shape."""
        new: Tilt = self._get_checked_instance(Tilt, _instance)
        new.base = self.base
        new.weight = self.weight.expand(as_size(batch_shape) + self.event_shape)
        super(Tilt, new).__init__(as_size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """E[h] = ∇ log M(w), shape (*B, d), by automatic differentiation; it is differentiable in w."""
        track = torch.is_grad_enabled() and self.weight.requires_grad
        with torch.inference_mode(False), torch.enable_grad(), in_full(self.weight.device):
            weight = self.weight if track else self.weight.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.base.log_mgf(weight).sum(), weight, create_graph=track)
        return gradient

    def log_prob(self, value: Tensor) -> Tensor:
        """Return w·h + log m(h) − log M(w) at h (*S, *B, d), shape (*S, *B)."""
        if value.dim() < 1 or value.shape[-1:] != self.event_shape or not value.is_floating_point():
            raise ValueError(
                f"value is {value.dtype} of shape {tuple(value.shape)}; "
                f"expected floating activations (..., {self.event_shape[0]})"
            )
        if self._validate_args and not traced(value):
            self._validate_sample(value)
        with in_full(value.device):
            wide, dtype = in_range(value, "value"), torch.promote_types(value.dtype, torch.float32)
            inner = (self.base.project(wide) * self.weight).sum(-1)
            log_density: Tensor = inner + self.base.log_prob(wide) - self.base.log_mgf(self.weight)
            return log_density.to(torch.promote_types(dtype, self.weight.dtype))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Sample activations of shape (*sample_shape, *B, d)."""
        shape = self._extended_shape(as_size(sample_shape))
        rows = self.weight.detach().reshape(-1, shape[-1])
        samples = shape[:-1].numel() // len(rows) if len(rows) else 0
        index = torch.arange(len(rows), device=rows.device).repeat(samples)
        with torch.no_grad(), in_full(rows.device):
            return self.base.draw(rows, index, generator).reshape(shape)


@register_kl(Tilt, Tilt)
def _kl_tilt(p: Tilt, q: Tilt) -> Tensor:
    """Return (w − w′)·E_p[h] − log M(w) + log M(w′), for tilts of the same base."""
    if p.base is not q.base:
        raise ValueError(
            "the bases of the two tilts differ; expected the same base object, for a closed form of the KL"
        )
    with in_full(p.weight.device):
        inner = ((p.weight - q.weight) * p.mean).sum(-1)
        return inner - p.base.log_mgf(p.weight) + p.base.log_mgf(q.weight)
