"""Copies of the arguments of a forward, so that the caller's own do not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult._checks import described

__all__ = ["own_arguments"]


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
