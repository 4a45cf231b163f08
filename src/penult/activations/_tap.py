"""One differentiable forward that gives activations and logits."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, final

import torch
from torch import Tensor, nn

from penult.head import Head
from penult.head._model import first_input, is_view, linear_at, logits_of, normalized, same_view, unwrap

__all__ = ["Tap"]


@final
class Tap(nn.Module):
    """A model with its penultimate activations laid open: x -> (h, logits) in one differentiable forward.

    The model runs as it is, in whatever mode it is in; a hook listens at the head for the time of one call
    and is removed again, also when the model raises. For a head with a folded norm layer, h is the
    normalised vector before that layer's affine part, so that ``head(h)`` gives the logits (in training
    mode, dropout between the two makes them differ).

    Args:
        model: The classifier; DataParallel, DistributedDataParallel and torch.compile wrappers are opened,
            because hooks do not work in them.
        head: Its head, from `find_head`. The logits of the tap are the model's own; those of a head at another
            temperature differ from them by that factor.

    Raises:
        ValueError: The head has no certificate, or the model has no linear layer where that says.

    Example:
        >>> from penult.head import find_head
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> tap = Tap(model, find_head(model, x))
        >>> h, logits = tap(x)
        >>> h.shape, torch.allclose(tap.head(h), logits)
        (torch.Size([5, 8]), True)
    """

    def __init__(self, model: nn.Module, head: Head) -> None:
        super().__init__()
        if head.certificate is None:
            raise ValueError(
                "this head has no certificate, so nothing says where it sits in the model: use the head that "
                "penult.find_head(model, batch) gives (a rescaled head reads scaled activations and has none)"
            )
        self.model = unwrap(model)
        self.head = head
        self._linear()

    def _linear(self) -> nn.Linear:
        assert self.head.certificate is not None
        path, shape = self.head.certificate.path, self.head.certificate.shape
        linear = linear_at(self.model, path)
        if (linear.out_features, linear.in_features) != shape:
            raise ValueError(
                f"the model's layer at {path!r} is {(linear.out_features, linear.in_features)}, but the head "
                f"was found as {shape}: it belongs to another model"
            )
        return linear

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes by keyword.

        Returns:
            h (..., d) and the model's logits (..., K), both part of the autograd graph.

        Raises:
            RuntimeError: The head did not run in this forward, or reads no view of the folded norm layer.
            TypeError: The model's output holds no logits.
        """
        certificate = self.head.certificate
        assert certificate is not None
        features: list[Tensor] = []
        norms: list[tuple[Tensor, Tensor]] = []

        def at_norm(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = first_input(args, kwargs)
            assert x is not None
            norms.append((output, normalized(module, x.to(torch.promote_types(x.dtype, torch.float32)))))

        def at_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            h = first_input(args, kwargs)
            assert h is not None
            features.append(h.clone() if certificate.folded is None else _unfolded(h, norms))

        with ExitStack() as hooks:
            hooks.callback(self._linear().register_forward_hook(at_head, with_kwargs=True).remove)
            if certificate.norm_path is not None:
                norm = self.model.get_submodule(certificate.norm_path)
                hooks.callback(norm.register_forward_hook(at_norm, with_kwargs=True).remove)
            logits = logits_of(self.model(*args, **kwargs))
        if len(features) <= certificate.call:
            raise RuntimeError(
                f"the head at {certificate.path!r} ran {len(features)} times in this forward, but its call "
                f"number {certificate.call} (from 0) made the logits when the head was found: the model has "
                "taken another path"
            )
        return features[certificate.call], logits

    def _apply(self, fn: Any, recurse: bool = True) -> Tap:
        linear = self._linear()
        shared = self.head.weight.data_ptr() == linear.weight.data_ptr()
        super()._apply(fn, recurse)
        if shared:  # moved apart by now, but W shall take memory once
            self.head.weight = linear.weight.detach()
            self.head.bias = None if linear.bias is None else linear.bias.detach()
        return self


def _unfolded(h: Tensor, norms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What h would be without the norm layer's affine part; `norms` holds its outputs with and without."""
    for output, z in reversed(norms):
        if is_view(h, output):
            return same_view(h, output, z)
    if norms and norms[-1][1].shape == h.shape:
        return norms[-1][1]  # dropout in training mode has made a copy
    raise RuntimeError(
        f"the head reads a tensor of shape {tuple(h.shape)} that is no view of what the folded norm layer "
        "gave; in training mode dropout may stand between: call tap.eval(), or find the head with fold=False"
    )
