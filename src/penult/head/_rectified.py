"""Pre-activations u of heads that read h = max(u, 0), followed from the ReLU to the product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from penult._row_blocks import version_of
from penult.head._certificate import UNMIXED, HeadCertificate
from penult.head._foreign import is_real, name_of
from penult.head._model import first_input
from penult.head._origin import PASS_THROUGH
from penult.head._products import Product, products

__all__ = ["Rectifiers", "check_rectified", "is_rectified", "refuse_unrectified"]

# Positional and keyword arguments of a function.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Rectifiers:
    """Keeps the input u of each ReLU in a forward for as long as its output h is alive.

    Dropout, casts, views and selections that are applied to h are applied to u as well. They move values but do not
    change them, so h = max(u, 0) still holds. After any other operation on h, also in place, u is forgotten.
    """

    def __init__(self) -> None:
        # For each output h of a ReLU: its version, and u.
        self._inputs = WeakTensorKeyDictionary()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a torch function, and remember u if its output is the output of a ReLU."""
        name = name_of(func)
        u = _input_of_relu(name, args, kwargs)
        if u is not None:
            in_place = _is_in_place(name, args, kwargs)
            # An in-place ReLU overwrites its input.
            if in_place:
                u = u.clone()
            output = func(*args, **kwargs)
            # With equal strides, every operation that gives a view of h gives a view of u.
            if not in_place and u.stride() != output.stride():
                u = torch.zeros_like(output).copy_(u)
        elif name in PASS_THROUGH and (arguments := self._with_inputs(args, kwargs)) is not None:
            output = func(*args, **kwargs)
            # In eval mode dropout does nothing. In training mode h is not max(u, 0) after dropout, and a second call
            # would use random numbers.
            u = first_input(*arguments) if "dropout" in name else func(*arguments[0], **arguments[1])
        else:
            return func(*args, **kwargs)
        # Functions such as Tensor.shape.__get__ return no tensor.
        if isinstance(u, Tensor):
            self._inputs[output] = version_of(output), u
        return output

    def pre_activation_of(
        self, product: Product, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the u (..., d) that replaces h in one reading of a call; None if h is not the output of a ReLU."""
        # The h of a cosine is divided by its norm, so it is not max(u, 0).
        if product.kind == "cosine":
            return None
        arguments = self._with_inputs(args, kwargs, skip=product.operand)
        if arguments is None:
            return None
        readings = products(func, *arguments)
        return next((other.h for other in readings if other.signature == product.signature), None)

    def _with_inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], skip: Tensor | None = None
    ) -> Arguments | None:
        """Return the arguments with each output of a ReLU replaced by its input u; None if there is no such output."""
        num_replaced = 0

        def replaced(value: Any) -> Any:
            nonlocal num_replaced
            # Some functions take a list of operands.
            if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
                items = [replaced(item) for item in value]
                return items if isinstance(value, list) else tuple(items)
            if not isinstance(value, Tensor) or value is skip or (u := self._input_of(value)) is None:
                return value
            num_replaced += 1
            return u

        arguments = tuple(map(replaced, args)), {name: replaced(value) for name, value in kwargs.items()}
        return arguments if num_replaced else None

    def _input_of(self, output: Tensor) -> Tensor | None:
        """Return the u of an output of a ReLU that was not changed since, or None."""
        version, u = self._inputs.get(output, (None, None))
        known = isinstance(u, Tensor) and version == version_of(output)
        return u if known and (u.shape, u.dtype) == (output.shape, output.dtype) else None


def _input_of_relu(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the x of a call that computes max(x, 0); None for any other call."""
    name = name.rstrip("_")
    x = first_input(args, dict(kwargs))
    if x is None or "out" in kwargs or not is_real(x):
        return None
    if name in ("clamp", "clip", "clamp_min"):
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | dict(kwargs)
        low = bounds.get("min")
        return x if isinstance(low, int | float) and low == 0 and bounds.get("max") is None else None
    return x if name == "relu" else None


def _is_in_place(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return name.endswith("_") or bool(kwargs.get("inplace")) or (name == "relu" and args[1:] == (True,))


@torch.no_grad()
def is_rectified(u: Tensor | None, h: Tensor) -> bool:
    """Whether h is exactly max(u, 0)."""
    return u is not None and torch.allclose(u.clamp(min=0), h, rtol=0.0, atol=0.0, equal_nan=True)


def check_rectified(u: Tensor | None, h: Tensor) -> Tensor:
    """Return u if h is max(u, 0).

    Raises:
        RuntimeError: There is no u, or h is not max(u, 0).
    """
    if u is None:
        raise RuntimeError(
            f"no ReLU is right before the head in this forward, in which h has shape {tuple(h.shape)}, but one was "
            "when the head was found: the model has taken another path. Find the head again with a batch like this one"
        )
    if not is_rectified(u, h):
        error = float((u.detach().clamp(min=0) - h.detach()).abs().max())
        raise RuntimeError(
            f"the h of shape {tuple(h.shape)} that the head read in this forward is not max(u, 0) of the input u of "
            f"its ReLU: they differ by up to {error:.2g}. The cause is a dropout in training mode between them (call "
            "tap.eval()) or a change of u in place"
        )
    return u


def refuse_unrectified(certificate: HeadCertificate) -> None:
    """Raise unless a head is rectified, so that it has pre-activations.

    Raises:
        ValueError: The head is not rectified; the message says why.
    """
    if certificate.rectified:
        return
    before = certificate.before or ""
    if certificate.folded is not None:
        reason = f"a {certificate.folded} is right before the head and is folded into it"
    elif certificate.positions not in UNMIXED:
        reason = f"the positions {certificate.positions!r} combine several rectified vectors into one h"
    elif before.lower().rstrip("_") in ("relu", "clamp", "clip", "clamp_min"):
        reason = (
            f"{before!r} is before the head, but h was not observed to be max(u, 0) of its input u (a head that was "
            "found by an older penult has to be found again)"
        )
    else:
        reason = f"right before the head is {repr(before) if before else 'the input of the model'}, not a ReLU"
    raise ValueError(
        f"this head has no pre-activations u with h = max(u, 0): {reason}. Use h: leave pre_activation out"
    )
