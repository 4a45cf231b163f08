"""Tensors and attributes of a user's model, read without raising."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from penult._checks import described, unreadable

__all__ = ["attribute", "in_memory", "is_real", "name_of", "own_arguments", "tensor_attribute", "tensors_in"]


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


# --- Copies of the arguments of a forward, so that the caller's own do not change ---------------------------


def own_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward, with a copy in place of each object that the model may change.

    A cache of keys and values, a list or a dict would otherwise grow with each forward. Tensors, modules and numbers
    are passed as they are; tensors within lists, dicts and other objects are cloned, which keeps their gradients.

    Raises:
        TypeError: An argument is an object that cannot be copied.
    """
    return tuple(_own(value) for value in args), {name: _own(value) for name, value in kwargs.items()}


def _own(value: Any, *, in_container: bool = False) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if in_container else value
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | nn.Module):
        return value
    # A tuple cannot change, but its items can.
    if type(value) is tuple:
        return tuple(_own(item, in_container=in_container) for item in value)
    if type(value) is list:
        return [_own(item, in_container=True) for item in value]
    if type(value) is dict:
        return {key: _own(item, in_container=True) for key, item in value.items()}
    try:
        with _Clones():
            return copy.deepcopy(value)
    # An object of another library may raise any error.
    except Exception as error:
        raise TypeError(
            f"an argument of the model is {described(value)}, which copy.deepcopy cannot copy "
            f"({type(error).__name__}: {error}); expected an argument that can be copied, because the model may change "
            "it. Wrap the model in a module that adds this argument itself"
        ) from error


class _Clones(TorchFunctionMode):
    """Lets copy.deepcopy clone tensors, because it refuses those that a gradient flows to."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            # deepcopy looks up objects that occur twice by their id.
            memo[id(tensor)] = clone = tensor.clone()
            return clone
        return func(*args, **(kwargs or {}))
