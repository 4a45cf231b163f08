"""One forward of a model that gives what its head reads and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult.head._certificate import HeadCertificate
from penult.head._layout import Layout
from penult.head._model import compiled_parts_eager, logits_of
from penult.head._origin import gains, without_gain
from penult.head._products import products

__all__ = ["capture"]


def capture(
    model: nn.Module, certificate: HeadCertificate, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Activations (*S, d) and logits (*S, K) of one forward, classes last; both part of the autograd graph.

    The model runs as it is, in whatever mode it is in.

    Raises:
        RuntimeError: The head did not run in this forward.
        TypeError: The model's output holds no logits.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and certificate.forward_call is None:
        raise RuntimeError("this head was found by an older penult: find it again to compile its tap")
    call = certificate.forward_call if compiling and certificate.forward_call is not None else certificate.call
    watch = _Watch((*certificate.shape, certificate.weight_first), call)
    if compiling:  # hooks cannot be traced, so that the whole forward is watched
        with watch:
            output = model(*args, **kwargs)
    else:
        with _inside(model.get_submodule(certificate.path), watch), compiled_parts_eager(model, certificate.path):
            output = model(*args, **kwargs)
    logits = logits_of(output).movedim(certificate.class_axis, -1)
    if watch.found is None:
        raise RuntimeError(
            f"the head at {certificate.path!r} ran {watch.seen} times in this forward, but its call number {call} "
            "(from 0) made the logits when the head was found: the model has taken another path"
        )
    h = Layout(certificate.class_axis, certificate.positions).apply(*watch.found, logits)
    if certificate.folded is not None and certificate.norm_path is not None:
        h = without_gain(h, *gains(model.get_submodule(certificate.norm_path), certificate.unit_offset))
    return h, logits


class _Watch(TorchFunctionMode):
    """Keeps what the n-th product of one shape and order reads and gives."""

    def __init__(self, place: tuple[int, int, bool], call: int) -> None:
        super().__init__()
        self.place = place
        self.call = call
        self.seen = 0
        self.found: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs)
        for product in products(func, args, kwargs):
            if product.place == self.place:
                if self.seen == self.call:
                    # A copy, since the model may go on in place.
                    self.found = product.h.clone(), output.movedim(product.axis, -1)
                self.seen += 1
        return output


@contextmanager
def _inside(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """The mode while this one module runs, so that the rest of the model takes its usual path at its usual speed."""
    with ExitStack() as entered, ExitStack() as hooks:

        def enter(*_: Any) -> None:
            entered.enter_context(mode)

        def leave(*_: Any) -> None:
            entered.close()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
