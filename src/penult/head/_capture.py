"""One forward of a model that gives what its head reads and what it makes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult.head._certificate import HeadCertificate
from penult.head._match import Layout
from penult.head._model import compiled_parts_eager, has_compiled_parts, logits_of, tensor_at
from penult.head._origin import gains, without_gain
from penult.head._products import products
from penult.head._rectified import Rectifiers, check_rectified

__all__ = ["capture"]


def capture(
    model: nn.Module,
    certificate: HeadCertificate,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    pre_activation: bool = False,
) -> tuple[Tensor, Tensor]:
    """Activations (*S, d) and logits (*S, K) of one forward, classes last; both part of the autograd graph.

    The model runs as it is, in whatever mode it is in. With `pre_activation`, of a rectified head, the u of
    h = max(u, 0) stands in place of h.

    Raises:
        RuntimeError: The head did not run in this forward, or its positions became logits in another way than when it
            was found; or what it read is not max(u, 0).
        TypeError: The model's output holds no logits.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and certificate.forward_call is None:
        raise RuntimeError("this head was found by an older penult: find it again to compile its tap")
    watch = _Watch(model, certificate, compiling=compiling, pre_activation=pre_activation)
    # Hooks cannot be traced, and what picks a position, or rectifies, stands outside of the head's module.
    if pre_activation:
        with compiled_parts_eager(model) if has_compiled_parts(model) else nullcontext(), watch:
            output = model(*args, **kwargs)
    elif compiling or certificate.positions == "picked":
        with watch:
            output = model(*args, **kwargs)
    else:
        with _inside(model.get_submodule(certificate.path), watch), compiled_parts_eager(model, certificate.path):
            output = model(*args, **kwargs)
    logits = logits_of(output).movedim(certificate.class_axis, -1)
    if watch.found is None:
        raise RuntimeError(
            f"the head at {certificate.path!r} ran {watch.seen} times in this forward, but its call number "
            f"{watch.call} (from 0) made the logits when the head was found: the model has taken another path"
        )
    layout = Layout(certificate.class_axis, certificate.positions)
    if watch.picked is not None and watch.picked.shape[:-1] == logits.shape[:-1]:
        h = watch.picked
    else:
        h = layout.apply(*watch.found, logits)
        if not compiling and certificate.positions not in ("same", "picked"):
            _check_positions(layout, watch.found[1], logits, certificate)
    if certificate.folded is not None and certificate.norm_path is not None:
        h = without_gain(h, *gains(model.get_submodule(certificate.norm_path), certificate.unit_offset))
    return h, logits


@torch.no_grad()
def _check_positions(layout: Layout, product: Tensor, logits: Tensor, certificate: HeadCertificate) -> None:
    """Raise where positions became logits in another way: a mean that leaves out padding, a map of another scale."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    guess = certificate.scale * layout.apply(product, product, logits).to(wide)
    theirs = logits.to(wide)
    if certificate.log_softmax:
        guess, theirs = (x - x.mean(-1, keepdim=True) for x in (guess, theirs))
    error = theirs - guess
    if certificate.shifted:
        error = error - error.flatten(end_dim=-2).mean(0)
    slack = max(1e-3, 4 * torch.finfo(product.dtype).eps) * max(1.0, float(theirs.abs().max()))
    if float(error.abs().max()) > slack:
        raise RuntimeError(
            f"the positions of the product did not become logits by {certificate.positions!r} in this forward, as they "
            f"did when the head was found (off by {float(error.abs().max()):.2g}): a mean may leave out padding, or a "
            "map be resized by a factor. No head stands for that; pool or resize the activations before the head"
        )


class _Watch(TorchFunctionMode):
    """Keeps what the head's product reads (or would without its ReLU) and gives, and which position the model picks."""

    def __init__(
        self, model: nn.Module, certificate: HeadCertificate, *, compiling: bool, pre_activation: bool
    ) -> None:
        super().__init__()
        self.place = (*certificate.shape, certificate.weight_first)
        self.rectifiers = Rectifiers() if pre_activation else None
        self.everywhere = compiling or pre_activation  # so that calls are counted in the model, not in the module
        self.picks = certificate.positions == "picked"
        self.call = certificate.call
        if self.everywhere and certificate.forward_call is not None:
            self.call = certificate.forward_call
        self.weight = None
        if certificate.weight is not None and (certificate.operand or not self.everywhere):
            self.weight = tensor_at(model, certificate.weight)
        self.seen = 0
        self.found: tuple[Tensor, Tensor] | None = None
        self.picked: Tensor | None = None
        self._product: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs) if self.rectifiers is None else self.rectifiers.run(func, args, kwargs)
        for product in products(func, args, kwargs):
            if product.place == self.place and self._is_w(product.operand):
                if self.seen == self.call:
                    h = product.h
                    if self.rectifiers is not None:
                        h = check_rectified(self.rectifiers.read_by(product, func, args, kwargs), h)
                    # A copy, since the model may go on in place.
                    self.found = h.clone(), output.movedim(product.axis, -1)
                    self._product = output
                self.seen += 1
        if self.picks and self.found is not None and self._product is not None and len(args) > 0:
            self._follow(func, args, output)
        return output

    def _is_w(self, operand: Tensor) -> bool:
        if self.weight is None:
            return True
        return operand is self.weight if self.everywhere else operand.data_ptr() == self.weight.data_ptr()

    def _follow(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        """What the model picks of the product, picked of h: two positions with equal logits may have different h."""
        if args[0] is not self._product or self.found is None:
            return
        if func in _CASTS:
            self._product = output
        elif func is Tensor.__getitem__ and self.picked is None:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if len(index) < self.found[0].ndim and Ellipsis not in [i for i in index if not isinstance(i, Tensor)]:
                self.picked = self.found[0][index]


_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.contiguous, Tensor.clone})


@contextmanager
def _inside(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """The mode while this one module runs, so that the rest of the model takes its usual path at its usual speed."""
    mine = threading.get_ident()
    with ExitStack() as entered, ExitStack() as hooks:

        def enter(*_: Any) -> None:
            if threading.get_ident() == mine:  # another thread may be using the same model
                entered.enter_context(mode)

        def leave(*_: Any) -> None:
            if threading.get_ident() == mine:
                entered.close()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
