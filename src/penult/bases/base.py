"""Abstract class of base measures."""

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
        reference: Reference measure of its densities; densities with respect to different reference measures must not
            be compared.
        support: Set that contains its activations.
        needs_data: Whether it is fitted to activations (never to labels).
        exact_mgf: Whether log M is exact, or an estimate with ``mgf_standard_error``.
        source: Reference for the construction.
        mgf_standard_error: Largest standard error of log M over the head's rows, if it is estimated.
        has_density: Whether ``log_prob`` works. Sampling, prior and posterior need no density.
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
    """Base measure m(h) on activations, which all classes share.

    A subclass stores its tensors as buffers and implements the abstract methods below. Check it with
    :func:`penult.testing.check_base` and use it in a :class:`penult.GenerativePair`.

    Attributes:
        reference: Digest of the whole set of activations that the base was fitted to, None if it is not known. Files of
            pairs keep it.
    """

    reference: str | None = None

    @property
    @abc.abstractmethod
    def info(self) -> BaseInfo:
        """Facts about this measure."""

    @property
    @abc.abstractmethod
    def in_features(self) -> int | None:
        """Dimension d of activations, or None for any dimension."""

    @abc.abstractmethod
    def log_mgf(self, weight: Tensor) -> Tensor:
        """Return log M(w) = log ∫ exp(w·h) m(dh) for rows ``weight`` (*B, d): (*B,), differentiable."""

    @abc.abstractmethod
    def log_prob(self, h: Tensor) -> Tensor:
        """Return log m(h) at activations (*S, d), with respect to ``info.reference``: (*S,)."""

    @abc.abstractmethod
    def draw(self, weight: Tensor, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """Sample one activation from the tilt by ``weight[i]`` for each i of ``index``: (B, d), (N,) → (N, d)."""

    def project(self, h: Tensor) -> Tensor:
        """Return the point at which the density at ``h`` is evaluated: ``h`` itself for a measure on all of R^d."""
        return h

    def quadrature(self, nodes: int) -> tuple[Tensor, Tensor] | None:
        """Return points (Q, d) and log weights (Q,) of a quadrature of the reference measure, in few dimensions.

        None (the default) if there is no such rule; checks then omit the integrals.
        """
        return None

    def tilt(self, weight: Tensor) -> Tilt:
        """Return the distributions p(h) = exp(w·h) m(h) / M(w), a batch over the rows ``weight`` (*B, d).

        Raises:
            ValueError: The rows are of another dimension than this measure.
        """
        self._check_features(weight, "weight")
        return Tilt(self, weight, validate_args=False)

    def config(self) -> dict[str, Any]:
        """Return a dictionary for JSON, from which :meth:`from_config` rebuilds this base, given its buffers."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: Head) -> Base:
        """Rebuild a saved base of a pair with ``head``. Default: pass config and buffers to the constructor.

        The buffers are then those of the file to the last bit, also if the constructor normalises its arguments.
        """
        base = cls(**config, **tensors)
        for name, tensor in tensors.items():
            buffer = dict(base.named_buffers()).get(name)
            if buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype):
                setattr(base, name, tensor)
        return base

    def _apply(self, fn: Any, recurse: bool = True) -> Base:
        """Apply a function to all buffers, and keep floating ones in float32 or wider."""

        # Half precision has too few digits for a mean, a Cholesky factor or orthonormal rows.
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
                f"{name} has shape {tuple(h.shape)}; expected (..., {d}), since this {self.info.name} base is for "
                f"activations of dimension {d}"
            )
