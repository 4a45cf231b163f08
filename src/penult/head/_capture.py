"""Capture of the head's activations and logits in one forward of a model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penult._row_blocks import readable
from penult.head._certificate import HeadCertificate
from penult.head._foreign import own_arguments
from penult.head._match import Layout
from penult.head._model import compiled_parts_eager, has_compiled_parts, logits_of, tensor_at
from penult.head._origin import gain_and_offset, without_gain
from penult.head._pieces import joined_rows
from penult.head._products import ElementwiseProducts, products, signature_of
from penult.head._rectified import Rectifiers, check_rectified
from penult.head._tensors import HeadTensors

__all__ = ["capture"]


def capture(
    model: nn.Module,
    certificate: HeadCertificate,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    pre_activation: bool = False,
    head: HeadTensors | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a model and return activations (*S, d) and logits (*S, K), classes last, as part of the autograd graph.

    The model's training mode and the arguments are not changed. With `pre_activation`, for a rectified head, u is
    returned instead of h = max(u, 0).

    Warns:
        UserWarning: The product's W differs from that of `head`, apart from its temperature; its version changes.

    Raises:
        RuntimeError: The head did not run in this forward, its positions became logits in another way than when it was
            found, or h is not max(u, 0).
        TypeError: The model's output holds no logits.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and certificate.forward_call is None:
        raise RuntimeError("this head was found by an older penult: find it again to compile its tap")
    args, kwargs = own_arguments(args, kwargs)
    if certificate.parts:
        return _capture_parts(model, certificate, args, kwargs, pre_activation)
    watch = _Watch(model, certificate, whole_model=compiling or pre_activation, pre_activation=pre_activation)
    # torch.compile cannot trace hooks, and a position is picked, or rectified, outside of the head's module.
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
    watch.check_captured(logits)
    layout = Layout(certificate.class_axis, certificate.positions)
    if watch.picked is not None and watch.picked.shape[:-1] == logits.shape[:-1]:
        h = watch.picked
    else:
        captured, product = _joined(watch.captured, certificate, logits)
        h = layout.apply(captured, product, logits)
        if not compiling and certificate.positions not in ("same", "picked"):
            _check_positions(layout, product, logits, certificate)
    gain: Tensor | None = None
    if certificate.folded is not None and certificate.norm_path is not None:
        gain, offset = gain_and_offset(model.get_submodule(certificate.norm_path), certificate.unit_offset)
        h = without_gain(h, gain, offset)
    if head is not None and watch.operand is not None and readable(watch.operand):
        _check_weight(head, watch.operand, gain, certificate)
    return h, logits


def _capture_parts(
    model: nn.Module,
    certificate: HeadCertificate,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    """Capture the concatenated activations of a head that the model assembles from several products."""
    compiling = torch.compiler.is_compiling()
    watches = [
        _Watch(
            model,
            replace(certificate, parts=(), **vars(part)),
            whole_model=True,
            pre_activation=pre_activation,
        )
        for part in certificate.parts
    ]
    eager = has_compiled_parts(model) and not compiling
    with ExitStack() as entered, compiled_parts_eager(model) if eager else nullcontext():
        for watch in watches:
            entered.enter_context(watch)
        output = model(*args, **kwargs)
    logits = logits_of(output).movedim(certificate.class_axis, -1)
    layout = Layout(certificate.class_axis, "same")
    activations = []
    for watch in watches:
        watch.check_captured(logits)
        activations.append(layout.apply(*watch.captured[0], logits))
    return torch.cat(activations, dim=-1), logits


# Rows and columns of W that are compared.
_GRID = 64


@torch.no_grad()
def _check_weight(head: HeadTensors, operand: Tensor, gain: Tensor | None, certificate: HeadCertificate) -> None:
    """Warn if W (K, d) of a head is not the model's, up to its temperature and a common row."""
    weight = head.weight
    if weight.data_ptr() == operand.data_ptr() or not readable(weight):
        return
    rows, columns = (slice(None, None, max(1, size // _GRID)) for size in weight.shape)
    own, model = (part[rows, columns].to(weight.device, torch.float64, copy=True) for part in (weight, operand))
    if gain is not None:
        model *= gain[columns].to(model)
    own, model = (part - part[:1] for part in (own, model))
    error = float((own - certificate.scale / head.temperature * model).abs().max() / own.abs().max())
    # A folded gain has the precision of float32, and a scale may have been fitted.
    coarse = max(torch.finfo(dtype).eps for dtype in (weight.dtype, operand.dtype, torch.float32))
    if not error <= 16 * coarse + (0 if certificate.scale == 1 else 2e-3):
        # Pairs that were made with this head raise an error from now on.
        head._disagreements += 1
        warnings.warn(
            f"the weight of the model's head at {certificate.path!r} is not that of this tap's head: rows differ by "
            f"{error:.2g} of their largest value. Activations and logits are those of the model as it is now. Find the "
            "head again with penult.find_head(model, inputs), and make a new pair",
            UserWarning,
            stacklevel=4,
        )


def _joined(
    captured: Sequence[tuple[Tensor, Tensor]], certificate: HeadCertificate, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return h (..., d) and the product (..., K), joined if the head runs in several calls."""
    if certificate.positions not in ("pieces", "pieces along axis 1"):
        return captured[0]
    h, product = (joined_rows(parts, certificate.positions, logits.shape[:-1]) for parts in zip(*captured, strict=True))
    if h is None or product is None:
        raise RuntimeError(
            f"the head at {certificate.path!r} gave rows of shapes {[tuple(part.shape) for part, _ in captured]} in "
            f"{len(captured)} calls, which together are not the logits of shape {tuple(logits.shape)}, as they were "
            "when the head was found: the model has taken another path"
        )
    return h, product


@torch.no_grad()
def _check_positions(layout: Layout, product: Tensor, logits: Tensor, certificate: HeadCertificate) -> None:
    """Raise if positions became logits in another way: a mean that leaves out padding, a map of another scale."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    guess = certificate.scale * layout.apply(product, product, logits).to(wide)
    target = logits.to(wide)
    if certificate.log_softmax:
        guess, target = (x - x.mean(-1, keepdim=True) for x in (guess, target))
    error = target - guess
    if certificate.shifted:
        error = error - error.flatten(end_dim=-2).mean(0)
    slack = max(1e-3, 4 * torch.finfo(product.dtype).eps) * float(target.abs().max())
    if float(error.abs().max()) > slack:
        raise RuntimeError(
            f"the positions of the product did not become logits by {certificate.positions!r} in this forward, as they "
            f"did when the head was found (error {float(error.abs().max()):.2g}): a mean may leave out padding, or a "
            "map may be resized by a factor. These do not commute with a head; pool or resize the activations before "
            "the head"
        )


class _Watch(TorchFunctionMode):
    """Captures the input of the head's product (or of the ReLU before it), its output, and the picked position."""

    def __init__(
        self, model: nn.Module, certificate: HeadCertificate, *, whole_model: bool, pre_activation: bool = False
    ) -> None:
        super().__init__()
        self.path = certificate.path
        self.signature = signature_of(certificate.kind, certificate.shape, certificate.weight_first)
        self.elementwise = ElementwiseProducts()
        self.rectifiers = Rectifiers() if pre_activation else None
        # Whether the whole forward is watched, so that calls are counted in the model and not in the module.
        self.whole_model = whole_model
        self.picks = certificate.positions == "picked"
        self.call = certificate.call
        if self.whole_model and certificate.forward_call is not None:
            self.call = certificate.forward_call
        self.weight = None
        if certificate.weight is not None and (certificate.operand or not self.whole_model):
            self.weight = tensor_at(model, certificate.weight)
        self.num_calls = 0
        self.joins = certificate.positions in ("pieces", "pieces along axis 1")
        # h and the product of the head's call, or of each of its calls if it runs in pieces.
        self.captured: list[tuple[Tensor, Tensor]] = []
        self.operand: Tensor | None = None
        self.picked: Tensor | None = None
        # Whether the head ran without gradients in a forward with gradients.
        self.cut_off = False
        self._with_gradients = torch.is_grad_enabled()
        self._product: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        output = func(*args, **kwargs) if self.rectifiers is None else self.rectifiers.run(func, args, kwargs)
        call = self.elementwise.joined(func, args, kwargs)
        for product in products(*call):
            if product.signature == self.signature and self._is_weight(product.operand):
                if self.num_calls == self.call or (self.joins and self.num_calls > self.call):
                    h = product.h
                    if self.rectifiers is not None:
                        h = check_rectified(self.rectifiers.pre_activation_of(product, *call), h)
                    # A copy, because the model may change h in place later.
                    self.captured.append((h.clone(), output.movedim(product.axis, -1)))
                    self._product, self.operand = output, product.weight
                    self.cut_off |= self._with_gradients and not torch.is_grad_enabled()
                self.num_calls += 1
        self.elementwise.remember(func, args, output)
        if self.picks and self.captured and self._product is not None and len(args) > 0:
            self._follow(func, args, output)
        return output

    def check_captured(self, logits: Tensor) -> None:
        """Raise a RuntimeError if the head did not run, or if the graph of the logits does not contain h."""
        if not self.captured:
            raise RuntimeError(
                f"the head at {self.path!r} ran {self.num_calls} times in this forward, but its call number "
                f"{self.call} (from 0) gave the logits when the head was found: the model has taken another path"
            )
        if self.cut_off and logits.requires_grad and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"the head at {self.path!r} ran without gradients in a forward whose logits have gradients, as in "
                "torch.utils.checkpoint with use_reentrant=True; h would have no gradients. Use use_reentrant=False, "
                "or call the tap within torch.no_grad()"
            )

    def _is_weight(self, operand: Tensor) -> bool:
        """Whether an operand is the W of the head, as far as that is known."""
        if self.weight is None:
            return True
        return operand is self.weight if self.whole_model else operand.data_ptr() == self.weight.data_ptr()

    def _follow(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        """Pick the same positions of h as the model picks of the product."""
        # The picked positions cannot be found from the logits, because positions with equal logits may differ in h.
        if args[0] is not self._product:
            return
        if func in _CASTS:
            self._product = output
        elif func is Tensor.__getitem__ and self.picked is None:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            h = self.captured[0][0]
            if len(index) < h.ndim and Ellipsis not in [i for i in index if not isinstance(i, Tensor)]:
                self.picked = h[index]


_CASTS = frozenset({Tensor.to, Tensor.float, Tensor.contiguous, Tensor.clone})


@contextmanager
def _inside(module: nn.Module, mode: TorchFunctionMode) -> Iterator[None]:
    """Enter a mode only while one module runs, so that the other modules run at their usual speed."""
    # Another thread may be using the same model; its calls are ignored.
    own_thread = threading.get_ident()
    with ExitStack() as entered, ExitStack() as hooks:

        def enter(*_: Any) -> None:
            if threading.get_ident() == own_thread:
                entered.enter_context(mode)

        def leave(*_: Any) -> None:
            if threading.get_ident() == own_thread:
                entered.close()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
