"""What the special functions accept, and the precision they work in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_dim", "check_floating", "in_double", "in_full", "outside_transforms", "traced", "working_dtype"]

SINGLE_ONLY = frozenset({"mps"})  # device types without float64
NO_AUTOCAST = frozenset({"meta"})  # device types of which torch.is_autocast_enabled will not say


def working_dtype(device: torch.device) -> torch.dtype:
    """The precision in which scalar special functions are computed on a device."""
    return torch.float32 if device.type in SINGLE_ONLY else torch.float64


def in_double(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has none: for sums that a fit makes once."""
    return (tensor.cpu() if tensor.device.type in SINGLE_ONLY else tensor).double()


def in_full(device: torch.device) -> AbstractContextManager[Any]:
    """A stretch of code in which torch.autocast makes no product on a device less precise than its factors.

    Eight bits of a log density in the thousands, or of a logit that a softmax shall agree with, are no result. A
    model's own forward is not for such a stretch: it is computed as the user has it.

    Example:
        >>> x = torch.eye(2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     lost = x @ x
        ...     with in_full(x.device):
        ...         kept = x @ x
        >>> lost.dtype, kept.dtype
        (torch.bfloat16, torch.float32)
    """
    kind = device.type
    if kind not in NO_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()  # entering torch's own costs twenty microseconds


def outside_transforms() -> AbstractContextManager[Any]:
    """A stretch of code that torch.func transforms do not see, for what is kept beyond them.

    What is computed inside of one, even of tensors that it does not transform, is wrapped for the time of it alone.

    Example:
        >>> def remembering(x):
        ...     with outside_transforms():
        ...         kept.append(2 * torch.ones(()))
        ...     return x * kept[0]
        >>> kept = []
        >>> float(torch.func.grad(remembering)(torch.tensor(3.0))), kept
        (2.0, [tensor(2.)])
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch import pyfunctorch  # loaded where a transform is running, and slow to load where none is

    return pyfunctorch.temporarily_clear_interpreter_stack()


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
