"""Tensors and attributes of a user's model, read without raising."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from penult._checks import unreadable

__all__ = ["attribute", "in_memory", "is_real", "name_of", "tensor_attribute", "tensors_in"]


def attribute(owner: Any, name: str) -> Any:
    """Return an attribute of a foreign object, or None if it has none or its property raises."""
    # A property may run any code of the user, for example raise before training has begun.
    try:
        return getattr(owner, name, None)
    except Exception:
        return None


def tensor_attribute(owner: Any, name: str) -> Tensor | None:
    """Return an attribute of a foreign object if it is a tensor in memory, or None."""
    value = attribute(owner, name)
    return value if isinstance(value, Tensor) and in_memory(value) else None


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor is a dense array with an address.

    Lazy, nested, sparse, quantised and offloaded (meta) tensors are not, nor are those inside a vmap and those of
    subclasses that hold other tensors. `find_head` does not read them.
    """
    if torch.compiler.is_compiling():
        return True
    # A subclass of another package may raise any error when it is asked.
    try:
        if (
            isinstance(tensor, UninitializedParameter | UninitializedBuffer)
            or tensor.layout != torch.strided
            or tensor.is_nested
            or tensor.is_quantized
        ):
            return False
        return tensor.numel() == 0 or tensor.data_ptr() != 0
    except Exception:
        return False


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor is a dense array of real floating-point numbers, so that it can be part of a head."""
    return in_memory(tensor) and unreadable(tensor) is None


def name_of(func: Any) -> str:
    """Return the name of a torch function; that of the operator for overloads such as torch.ops.aten.mm.default."""
    return str(getattr(func, "__name__", "")).partition(".")[0]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among some values and directly inside containers among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from (item for item in value.values() if isinstance(item, Tensor))
        elif isinstance(value, tuple | list):
            yield from (item for item in value if isinstance(item, Tensor))
