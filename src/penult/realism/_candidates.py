"""Bases to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from torch import Tensor

from penult.activations import Activations
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.distributions import Bank
from penult.head import Head

__all__ = ["CANDIDATES", "Candidate"]

Candidate: TypeAlias = Callable[[Head, Tensor | Activations], Base]
"""Fits a base to activations without labels: (head, activations) → base."""


def _sphere(head: Head, rows: Tensor | Activations, shape: Literal["round", "elliptic"] = "round") -> Base:
    return Sphere.fit(head, rows, shape=shape)


def _gaussian(head: Head, rows: Tensor | Activations) -> Base:
    return Gaussian.fit(head, rows)


def _marginal(head: Head, rows: Tensor | Activations, kind: Any) -> Base:
    return Marginal.fit(head, rows, kind=kind)


def _bank(head: Head, rows: Tensor | Activations) -> Base:
    """A row drawn twice would lie in both halves of a test, and give the draws away."""
    bank = Marginal.fit(head, rows, kind="bank").distribution
    return Marginal(head, Bank(bank.activations, replacement=False, rectified=bank.rectified))


CANDIDATES: Mapping[str, Candidate] = MappingProxyType(
    {
        "sphere": _sphere,
        "elliptic": partial(_sphere, shape="elliptic"),
        "gaussian": _gaussian,
        "class": partial(_marginal, kind="class"),
        "mixture": partial(_marginal, kind="mixture"),
        "flow": partial(_marginal, kind="flow"),
        "bank": _bank,
    }
)
"""What :func:`choose` fits by default: the original paper's round sphere, the elliptic sphere, the full Gaussian, and
the kinds of :class:`penult.Marginal`, its bank without replacement. The flow needs the extra ``flow``, and is left
out where that is not installed."""
