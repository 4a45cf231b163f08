"""The pre-activations u of a head that reads h = max(u, 0): followed from the ReLU to the product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from penult._row_blocks import version_of
from penult.head._certificate import HeadCertificate
from penult.head._model import first_input
from penult.head._origin import PASS_THROUGH
from penult.head._products import Product, products

__all__ = ["Rectifiers", "check_rectified", "is_rectified", "refuse_unrectified"]

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a function is given


class Rectifiers:
    """Keeps what each ReLU of a forward reads, for as long as what it gives is alive.

    Dropout, casts, views and selections of a ReLU's output are done to its input, too: they change places, not
    values, so that the two stay h and u. What else is done to an output, also in place, ends it.
    """

    def __init__(self) -> None:
        self._inputs = WeakTensorKeyDictionary()  # output -> its version, and u

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a torch function, and note it."""
        name = getattr(func, "__name__", "")
        u = _read_by_relu(name, args, kwargs)
        if u is not None:
            in_place = _in_place(name, args, kwargs)
            if in_place:
                u = u.clone()  # before it is overwritten
            output = func(*args, **kwargs)
            if not in_place and u.stride() != output.stride():
                u = torch.zeros_like(output).copy_(u)  # so that every view of the output is one of u, too
        elif name in PASS_THROUGH and (replayed := self._replayed(args, kwargs)) is not None:
            output = func(*args, **kwargs)
            # In eval mode dropout does nothing. In training mode it must not draw twice; h then is not max(u, 0).
            u = first_input(*replayed) if "dropout" in name else func(*replayed[0], **replayed[1])
        else:
            return func(*args, **kwargs)
        if isinstance(u, Tensor):  # and not the shape of one, say
            self._inputs[output] = version_of(output), u
        return output

    def read_by(self, product: Product, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What one reading of a call would have for h without the ReLU (..., d); None if no ReLU made it."""
        if product.kind == "cosine":  # whose h is divided by its norm
            return None
        replayed = self._replayed(args, kwargs, but=product.operand)
        if replayed is None:
            return None
        return next(other.h for other in products(func, *replayed) if other.first == product.first)

    def _replayed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], but: Tensor | None = None) -> Call | None:
        """The arguments with u in place of what a ReLU made; None if it made none of them."""

        def known(value: Any) -> bool:
            return isinstance(value, Tensor) and value is not but and self._of(value) is not None

        if not any(map(known, (*args, *kwargs.values()))):
            return None
        return (
            tuple(self._of(value) if known(value) else value for value in args),
            {name: self._of(value) if known(value) else value for name, value in kwargs.items()},
        )

    def _of(self, output: Tensor) -> Tensor | None:
        version, u = self._inputs.get(output, (None, None))
        known = isinstance(u, Tensor) and version == version_of(output)
        return u if known and (u.shape, u.dtype) == (output.shape, output.dtype) else None


def _read_by_relu(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The x of a call that gives max(x, 0); None if it is another one."""
    name = name.rstrip("_")
    x = first_input(args, dict(kwargs))
    if x is None or x.layout != torch.strided or x.is_nested or "out" in kwargs:
        return None
    if name in ("clamp", "clip", "clamp_min"):
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | dict(kwargs)
        low = bounds.get("min")
        return x if isinstance(low, int | float) and low == 0 and bounds.get("max") is None else None
    return x if name == "relu" else None


def _in_place(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return name.endswith("_") or bool(kwargs.get("inplace")) or (name == "relu" and args[1:] == (True,))


@torch.no_grad()
def is_rectified(u: Tensor | None, h: Tensor) -> bool:
    """Whether h is max(u, 0), to the last bit."""
    return u is not None and torch.allclose(u.clamp(min=0), h, rtol=0.0, atol=0.0, equal_nan=True)


def check_rectified(u: Tensor | None, h: Tensor) -> Tensor:
    """The u of an h that the head read in this forward.

    Raises:
        RuntimeError: No ReLU made h, or h is not max(u, 0).
    """
    if u is None:
        raise RuntimeError(
            f"no ReLU stands right before the head in this forward, which reads h of shape {tuple(h.shape)}, as one "
            "did when the head was found: the model has taken another path. Find the head again with a batch like "
            "this one"
        )
    if not is_rectified(u, h):
        error = float((u.detach().clamp(min=0) - h.detach()).abs().max())
        raise RuntimeError(
            f"the h of shape {tuple(h.shape)} that the head read in this forward is not max(u, 0) of what its ReLU "
            f"read: they differ by up to {error:.2g}. A dropout between them that is in training mode does that "
            "(tap.eval() ends it), or a change of u in place"
        )
    return u


def refuse_unrectified(certificate: HeadCertificate) -> None:
    """Raise where no pre-activation stands for h.

    Raises:
        ValueError: The certificate is of no rectified head.
    """
    if certificate.rectified:
        return
    before = certificate.before or ""
    if certificate.folded is not None:
        reason = f"a {certificate.folded} stands right before the head and is folded into it"
    elif certificate.positions not in ("same", "swapped", "picked"):
        reason = f"{certificate.positions!r} makes logits of the head's positions, and so h of several rectified ones"
    elif before.lower().rstrip("_") in ("relu", "clamp", "clip", "clamp_min"):
        reason = (
            f"{before!r} stands before the head, but h was not seen to be max(u, 0) of what it reads (a head that was "
            "found by an older penult has to be found again)"
        )
    else:
        reason = (
            f"what stands right before the head is {repr(before) if before else 'the input of the model'}, and no ReLU"
        )
    raise ValueError(
        f"this head has no pre-activations u with h = max(u, 0): {reason}. Take h: leave pre_activation out"
    )
