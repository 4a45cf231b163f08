"""What the special functions accept, and the precision they work in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dim", "check_floating", "traced", "working_dtype"]

SINGLE_ONLY = frozenset({"mps"})  # device types without float64


def working_dtype(device: torch.device) -> torch.dtype:
    """The precision in which scalar special functions are computed on a device."""
    return torch.float32 if device.type in SINGLE_ONLY else torch.float64


def traced(*tensors: Tensor) -> bool:
    """Whether values cannot be looked at: under torch.compile or inside a torch.func transform."""
    return torch.compiler.is_compiling() or any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def check_dim(dim: int) -> int:
    """The dimension, made sure of; under torch.compile a constant, so that there is one graph a dimension."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a positive integer, the dimension of the ambient space; got {dim!r}")
    return range(dim).stop  # the same number; torch.compile makes the ends of a range constants


def check_floating(dim: int, value: Tensor) -> int:
    """The dimension, made sure of as well as that ``value`` is a floating tensor."""
    dim = check_dim(dim)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"expected a floating tensor, got {kind}; convert it with torch.as_tensor(..., dtype=...)")
    return dim
