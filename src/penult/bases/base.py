"""What every base measure offers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penult.distributions import Tilt
from penult.head import Head

__all__ = ["Base", "BaseInfo"]


@dataclass(frozen=True)
class BaseInfo:
    """Facts about a base measure, for tables and reports.

    Attributes:
        name: Short name, e.g. ``"sphere"``.
        reference: The measure that its densities refer to; densities with respect to different reference
            measures must not be compared.
        support: Where its activations lie.
        needs_data: Whether fitting it takes activations (never labels).
        exact_mgf: Whether log M is exact, or an estimate with ``mgf_standard_error``.
        source: Where the construction comes from.
        mgf_standard_error: Standard error of log M where it is estimated, at the worst of the head's rows.
        has_density: Whether ``log_prob`` works; where it does not, draws, prior and posterior do.
    """

    name: str
    reference: str
    support: str
    needs_data: bool
    exact_mgf: bool
    source: str
    mgf_standard_error: float | None = None
    has_density: bool = True


class Base(nn.Module, abc.ABC):
    """A base measure m(h) on activations: what all classes share.

    A subclass stores its tensors as buffers and implements the abstract methods below; then
    :func:`penult.testing.check_base` certifies it, and :class:`penult.GenerativePair` does the rest.
    """

    @property
    @abc.abstractmethod
    def info(self) -> BaseInfo:
        """Facts about this measure."""

    @property
    @abc.abstractmethod
    def in_features(self) -> int | None:
        """The dimension d of activations, or None where any fits."""

    @abc.abstractmethod
    def log_mgf(self, weight: Tensor) -> Tensor:
        """Log M(w) = log ∫ exp(w·h) m(dh) for rows ``weight`` (*B, d): shape (*B,); differentiable."""

    @abc.abstractmethod
    def log_prob(self, h: Tensor) -> Tensor:
        """Log density log m(h) at activations (*S, d), with respect to ``info.reference``: shape (*S,)."""

    @abc.abstractmethod
    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one activation from the tilt by ``weight[i]`` for each i of ``index``: (B, d), (N,) → (N, d)."""

    def project(self, h: Tensor) -> Tensor:
        """The point at which this measure reads ``h``; a measure on all of R^d reads it as it is."""
        return h

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor] | None:
        """Points (Q, d) and log weights (Q,) that integrate over the reference measure, where it has few dimensions.

        None (the default) where there is no such rule; checks then rely on the other laws.
        """
        return None

    def tilt(self, weight: Tensor) -> Tilt:
        """The laws p(h) = exp(w·h) m(h) / M(w), a batch over the rows ``weight`` (*B, d).

        Raises:
            ValueError: If the rows do not have this measure's dimension.
        """
        self._check_features(weight, "weight")
        return Tilt(self, weight, validate_args=False)

    def config(self) -> dict[str, Any]:
        """JSON facts that, with the buffers, rebuild this base in :meth:`from_config`."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: Head) -> Base:
        """Rebuild a saved base of a pair with ``head``; by default its buffers are its constructor's arguments."""
        return cls(**config, **tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> Base:
        """Move as any module, but keep floating buffers in at least float32: a half-precision chart is no chart."""

        def wide(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            narrow = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return t.to(moved.device, torch.promote_types(t.dtype, torch.float32)) if narrow else moved

        super()._apply(wide, recurse)
        return self

    def _check_features(self, h: Tensor, name: str) -> None:
        d = self.in_features
        if d is not None and (h.dim() < 1 or h.shape[-1] != d):
            raise ValueError(
                f"{name} has shape {tuple(h.shape)}, but this {self.info.name} base is for activations of "
                f"dimension {d}: expected (..., {d})"
            )
