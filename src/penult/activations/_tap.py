"""Tap: one differentiable forward that returns activations and logits."""

from __future__ import annotations

import sys
import warnings
from typing import Any, final

import torch
from torch import Tensor, nn

from penult.head import Head, _capture_forward, _in_memory, _refuse_unrectified, _submodule, _tensor_at, _unwrap

__all__ = ["Tap", "tap_in"]


@final
class Tap(nn.Module):
    """Module that runs a model and returns its penultimate activations too: x -> (h, logits), differentiable.

    The model runs unchanged, in the mode that it is in. It gets copies of lists, dicts and other objects among its
    arguments, so that a cache of keys and values does not grow in the caller's hands. Hooks record the inputs of the
    head during one call and are removed after it, also if the model raises. The last axis of the logits is the class
    and the last axis of h the dimension, for every order of axes in the model, and both have the positions of the
    logits: (B, H, W, d) and (B, H, W, K) for a pixel-wise head, (B, T, d) and (B, T, K) for one that reads tokens, (B,
    d) and (B, K) if the model pools or selects tokens after its head. ``tap.axes`` names the axes. For a head with a
    folded norm layer, h is the vector before that layer's gain and offset, so that ``head(h)`` gives the logits (for a
    model that returns log-probabilities, up to one number per sample). If a ReLU stands right before the head,
    `pre_activation` returns the input of the ReLU instead of h.

    ``torch.compile(tap)`` works if it does for the model. If the head is computed in the model's own forward and not in
    a layer, all operations of the forward are observed, and `nn.TransformerEncoder` then takes its ordinary path
    instead of its fused one.

    Args:
        model: The classifier. Wrappers (DataParallel, DistributedDataParallel, torch.compile) are removed, because
            calls inside them cannot be observed.
        head: Its head, from `find_head`. The logits of the tap are those of the model; the logits of a head at another
            temperature differ from them by that factor.

    Raises:
        TypeError: The model is not a module or cannot be observed.
        ValueError: The head has no certificate, or the model does not have the head's module or weight.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> tap = Tap(model, find_head(model, x))
        >>> h, logits = tap(x)
        >>> h.shape, torch.allclose(tap.head(h), logits)
        (torch.Size([5, 8]), True)
        >>> tap.axes
        ('batch',)
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        if head.certificate is None:
            raise ValueError(
                "head has no certificate, which says where it stands in the model. Use the head from "
                "penult.find_head(model, batch); a rescaled head reads scaled activations and has no certificate"
            )
        certificate = head.certificate
        if certificate.origin is not None:
            raise ValueError(
                f"head is of no model ({certificate.origin}), so that no module of the model computes its logits. "
                "Compute activations with the model itself and pass them to the head"
            )
        self.model = _unwrap(model)
        self.head = head
        _submodule(self.model, certificate.path)
        if certificate.weight is not None:
            weight = _tensor_at(self.model, certificate.weight)
            classes, features = certificate.shape
            if weight is None or weight.numel() != classes * features:
                actual = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"the weight {certificate.weight!r} of the model is {actual}; expected {certificate.shape}, as the "
                    "head was found with. The head belongs to another model"
                )
        self._shared = _shared(self.model, head)
        self._warned = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of h and logits before the last, such as ``("batch", "height", "width")``."""
        assert self.head.certificate is not None
        return self.head.certificate.axes

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            *args: Inputs of the model.
            **kwargs: Inputs of the model by keyword, such as the output of a Hugging Face processor, ``tap(**batch)``.

        Returns:
            h (*S, d) and the model's logits (*S, K), both part of the autograd graph.

        Warns:
            UserWarning: The model's head has another W than `head`, whose tensors are its own, as after a clone.

        Raises:
            RuntimeError: The head did not run in this forward, or ran without gradients though the logits have
                gradients, as in a reentrant checkpoint.
            TypeError: The model's output has no logits.
        """
        assert self.head.certificate is not None
        if not torch.compiler.is_compiling():
            # The model may have been moved, or its state loaded, outside of the tap.
            self._share()
            self._warn_of_training_mode()
        return _capture_forward(self.model, self.head.certificate, args, kwargs, head=self.head)

    def pre_activation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model and return the input of the ReLU right before the head instead of its output.

        After a ReLU, many values of h are exactly zero, which no density can describe. The values of u have a density,
        and max(u, 0) has the exact zeros again. All operations of the forward are observed, and each call checks that
        the head reads max(u, 0), to the last bit.

        Args:
            *args: Inputs of the model.
            **kwargs: Inputs of the model by keyword.

        Returns:
            u (*S, d) with h = max(u, 0), and the model's logits (*S, K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward; or its input is not max(u, 0), as after a dropout in
                training mode; or the call is being compiled.
            TypeError: The model's output has no logits.
            ValueError: No ReLU stands right before the head (``head.certificate.rectified`` is False).

        Example:
            >>> from penult.head import find_head
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> x = torch.randn(5, 4)
            >>> tap = Tap(model, find_head(model, x))
            >>> u, logits = tap.pre_activation(x)
            >>> torch.equal(u, model[0](x)), torch.equal(u.clamp(min=0), tap(x)[0])
            (True, True)
        """
        assert self.head.certificate is not None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "pre-activations are found by observing the operations of the model, which torch.compile cannot trace. "
                "Call tap.pre_activation outside of torch.compile"
            )
        _refuse_unrectified(self.head.certificate)
        # The model may have been moved, or its state loaded, outside of the tap.
        self._share()
        self._warn_of_training_mode()
        run = _capture_forward
        # Nothing is compiled before torch._dynamo is imported, which takes seconds.
        if "torch._dynamo" in sys.modules:
            run = torch.compiler.disable(_capture_forward)
        return run(self.model, self.head.certificate, args, kwargs, pre_activation=True, head=self.head)

    def _warn_of_training_mode(self) -> None:
        """Warn once if activations are read without gradients while layers behave as in training."""
        if self._warned or torch.is_grad_enabled() or not self.model.training:
            return
        kinds = sorted({type(module).__name__ for module in self.model.modules() if _behaves_as_in_training(module)})
        if kinds:
            self._warned = True
            warnings.warn(
                f"the model is in training mode and gradients are off: {', '.join(kinds)} then use the statistics of "
                "the batch, or set values to zero at random. Call tap.eval() first",
                UserWarning,
                stacklevel=4,
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        super()._apply(fn, recurse)
        # Model and head have moved W separately; one copy of it is enough.
        self._share()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of version 0.1 have no such entry.
        super().__setstate__({"_warned": False, **state})
        # Pickle and copy create a tensor for the model and another for the head.
        self._share()

    def _share(self) -> None:
        """Make W and b of the head views of the model's tensors again, if they were when the tap was made."""
        for name, (source, *layout) in self._shared.items():
            tensor, current = _tensor_at(self.model, source), getattr(self.head, name)
            # Weights that are offloaded at the moment cannot be shared; the head keeps its own.
            if tensor is None or not _in_memory(tensor) or tensor.numel() != current.numel():
                continue
            if tensor.data_ptr() != current.data_ptr():
                setattr(self.head, name, tensor.detach().as_strided(*layout))


def tap_in(value: Any) -> Tap | None:
    """Return a tap, also from within wrappers such as torch.compile and DataParallel; None for anything else."""
    inner = _unwrap(value) if isinstance(value, nn.Module) else None
    return inner if isinstance(inner, Tap) else None


def _behaves_as_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def _shared(model: nn.Module, head: Head) -> dict[str, tuple[Any, ...]]:
    """Return the names of the model's tensors that W and b of a head are views of, and the layout of the views."""
    views: dict[str, tuple[Any, ...]] = {}
    for name in ("weight", "bias"):
        view = getattr(head, name)
        for source, tensor in (*model.named_parameters(), *model.named_buffers()):
            if view is None or not _in_memory(tensor) or tensor.numel() != view.numel():
                continue
            if tensor.data_ptr() == view.data_ptr():
                views[name] = source, view.size(), view.stride(), view.storage_offset()
    return views
