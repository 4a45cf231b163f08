"""One differentiable forward that gives activations and logits."""

from __future__ import annotations

import sys
from typing import Any, final

import torch
from torch import Tensor, nn

from penult.head import Head, _capture_forward, _refuse_unrectified, _submodule, _tensor_at, _unwrap

__all__ = ["Tap"]


@final
class Tap(nn.Module):
    """A model with its penultimate activations laid open: x -> (h, logits) in one differentiable forward.

    The model runs as it is, in whatever mode it is in, and is watched for the time of one call where the certificate
    says that its head is computed; nothing is left behind, also when the model raises. Classes are last in the
    logits and dimensions last in h, whatever the order in the model, and both have the positions of the logits:
    (B, H, W, d) and (B, H, W, K) for a pixel-wise head, (B, T, d) and (B, T, K) for one a token, (B, d) and (B, K)
    where the model pools or picks tokens after its head. ``tap.axes`` names the axes. For a head with a folded norm
    layer, h is the vector before that layer's gain and offset, so that ``head(h)`` gives the logits (for a model
    that returns log-probabilities, up to a number a sample). Where a ReLU stands right before the head,
    `pre_activation` gives what it reads in place of h.

    ``torch.compile(tap)`` works where it does for the model. Where the head is computed in the model's own forward
    rather than in a layer, all of the forward is watched, and `nn.TransformerEncoder` then takes its ordinary path in
    place of its fused one.

    Args:
        model: The classifier; DataParallel, DistributedDataParallel and torch.compile wrappers are opened,
            because calls inside them cannot be watched.
        head: Its head, from `find_head`. The logits of the tap are the model's own; those of a head at another
            temperature differ from them by that factor.

    Raises:
        TypeError: The model is no module or cannot be watched.
        ValueError: The head has no certificate, or the model has no such module, or another weight there.

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
                "this head has no certificate, so nothing says where it sits in the model: use the head that "
                "penult.find_head(model, batch) gives (a rescaled head reads scaled activations and has none)"
            )
        self.model = _unwrap(model)
        self.head = head
        certificate = head.certificate
        _submodule(self.model, certificate.path)
        if certificate.weight is not None:
            weight = _tensor_at(self.model, certificate.weight)
            classes, features = certificate.shape
            if weight is None or weight.numel() != classes * features:
                what = "no such tensor" if weight is None else f"one of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"the head was found as {certificate.shape} with the weight {certificate.weight!r}, but the model "
                    f"has {what}: the head belongs to another model"
                )
        self._shared = _shared(self.model, head)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of h and logits before the last, such as ``("batch", "height", "width")``."""
        assert self.head.certificate is not None
        return self.head.certificate.axes

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes by keyword; what a Hugging Face processor gives goes here, ``tap(**batch)``.

        Returns:
            h (*S, d) and the model's logits (*S, K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward.
            TypeError: The model's output holds no logits.
        """
        assert self.head.certificate is not None
        if not torch.compiler.is_compiling():
            self._share()  # the model may have been moved or loaded by itself
        return _capture_forward(self.model, self.head.certificate, args, kwargs)

    def pre_activation(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model, for what the ReLU right before the head reads in place of what it gives.

        A law of h with a ReLU behind it has atoms at zero; a law of u has none, and rectified it gives them exactly.
        All of the forward is watched. On each one it is checked that the head read max(u, 0), to the last bit.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes by keyword.

        Returns:
            u (*S, d) with h = max(u, 0), and the model's logits (*S, K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward; or what it read is not max(u, 0), as where a dropout
                before it is in training mode; or the call is being compiled.
            TypeError: The model's output holds no logits.
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
                "pre-activations are found by watching the model run, which cannot be compiled: call "
                "tap.pre_activation outside of torch.compile"
            )
        _refuse_unrectified(self.head.certificate)
        self._share()  # the model may have been moved or loaded by itself
        run = _capture_forward
        if "torch._dynamo" in sys.modules:  # before it is loaded, which takes seconds, nothing is compiled
            run = torch.compiler.disable(_capture_forward)
        return run(self.model, self.head.certificate, args, kwargs, pre_activation=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        super()._apply(fn, recurse)
        self._share()  # moved apart by now, but W shall take memory once
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # a copy was made of each

    def _share(self) -> None:
        """Let the head hold the model's own W and b again, where it did from the start."""
        for name, (source, *place) in self._shared.items():
            tensor, held = _tensor_at(self.model, source), getattr(self.head, name)
            if tensor is not None and tensor.data_ptr() != held.data_ptr():
                setattr(self.head, name, tensor.detach().as_strided(*place))


def _shared(model: nn.Module, head: Head) -> dict[str, tuple[Any, ...]]:
    """Which of the model's tensors W and b of a head are views of, and which views."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in ("weight", "bias"):
        held = getattr(head, name)
        for source, tensor in (*model.named_parameters(), *model.named_buffers()):
            if held is not None and tensor.numel() == held.numel() and tensor.data_ptr() == held.data_ptr():
                found[name] = source, held.size(), held.stride(), held.storage_offset()
    return found
