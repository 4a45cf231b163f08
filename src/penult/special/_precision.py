"""Argument checks and numerical precision of the special functions."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from penult._checks import check_floating, check_integer
from penult._row_blocks import readable

__all__ = [
    "checked_dim",
    "in_double",
    "in_full",
    "in_range",
    "outside_transforms",
    "traced",
    "validates_by_default",
    "working_dtype",
]

# Device types without float64.
SINGLE_ONLY = frozenset({"mps"})
# Device types for which torch.is_autocast_enabled raises an error.
NO_AUTOCAST = frozenset({"meta"})


def working_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which scalar special functions are computed on a device."""
    return torch.float32 if device.type in SINGLE_ONLY else torch.float64


def in_double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU if its device has no float64. For sums that a fit computes once."""
    return (tensor.cpu() if tensor.device.type in SINGLE_ONLY else tensor).double()


# Largest value whose products and squares are computed in float32, and largest one of all.
_LARGE, _LARGEST = 2.0**20, 1e150


def in_range(h: Tensor, name: str = "h") -> Tensor:
    """Return a tensor in float32 or wider, and in float64 if it has values whose squares could overflow in float32.

    Values are not looked at under torch.compile and inside torch.func transforms.

    Raises:
        ValueError: A finite value is above 1e150, or one is above 1e18 on a device without float64.

    Example:
        >>> in_range(torch.tensor([1e20, 1.0])).dtype, in_range(torch.ones(2).half()).dtype
        (torch.float64, torch.float32)
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if not readable(h) or not h.numel():
        return wide
    largest = float(h.detach().abs().amax())
    if largest <= _LARGE:
        return wide
    single = h.device.type in SINGLE_ONLY
    limit = 1e18 if single else _LARGEST
    if limit < largest < float("inf"):
        raise ValueError(f"the largest value of {name} is {largest:.3g}; expected at most {limit:.0e}. Scale the rows")
    return wide if single else wide.double()


def in_full(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context that turns torch.autocast off on a device, so that products keep the dtype of their factors.

    bfloat16 has too few digits for log densities in the thousands, and for logits that are compared with a softmax. Do
    not use it around a model's own forward, which runs in the precision that the user chose.

    Example:
        >>> x = torch.eye(2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     rounded = x @ x
        ...     with in_full(x.device):
        ...         exact = x @ x
        >>> rounded.dtype, exact.dtype
        (torch.bfloat16, torch.float32)
    """
    kind = device.type
    if kind not in NO_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    # Entering torch.autocast takes twenty microseconds, a null context almost nothing.
    return nullcontext()


def outside_transforms() -> AbstractContextManager[Any]:
    """Return a context that hides running torch.func transforms, for tensors that are cached beyond them.

    Inside a transform, results are wrapped even if they depend on no transformed tensor, and the wrapper is invalid
    once the transform has ended.

    Example:
        >>> def cached_product(x):
        ...     with outside_transforms():
        ...         cache.append(2 * torch.ones(()))
        ...     return x * cache[0]
        >>> cache = []
        >>> float(torch.func.grad(cached_product)(torch.tensor(3.0))), cache
        (2.0, [tensor(2.)])
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    # Imported here because the import is slow; where a transform is running, the module is already loaded.
    from torch._functorch import pyfunctorch

    return pyfunctorch.temporarily_clear_interpreter_stack()


def traced(*values: Any) -> bool:
    """Whether the values of tensors are unavailable: under torch.compile or inside a torch.func transform."""
    return torch.compiler.is_compiling() or any(
        isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value) for value in values
    )


def checked_dim(dim: int, **tensors: Tensor) -> int:
    """Validate `dim`, and that all named tensors are floating; return `dim`."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        dim = check_integer("dim", dim)
    for name, tensor in tensors.items():
        check_floating(name, tensor, "of any shape")
    # range(dim).stop equals dim, but torch.compile makes it a constant, so that each dimension gets its own graph.
    return range(dim).stop


def validates_by_default() -> bool:
    """Whether distributions check values by default, as ``Distribution.set_default_validate_args`` says.

    The first use of torch.compile turns that switch off for good in the whole process. The user did not ask for this,
    so it is ignored: pass ``validate_args=False`` in such a process.
    """
    if Distribution._validate_args:
        return True
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    patch = getattr(getattr(compiler, "TorchPatcher", None), "patch", None)
    # The patch is cached, so that its cache shows whether torch.compile has applied it. These names of torch are not
    # public: where they are missing, the switch is taken as it is.
    count = getattr(patch, "cache_info", None)
    return __debug__ and callable(count) and getattr(count(), "currsize", 0) > 0
