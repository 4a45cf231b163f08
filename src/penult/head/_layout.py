"""From the product that a model computes to the logits that it returns: where the classes are, and which positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Layout", "Positions", "axes_of", "class_axes", "layouts"]

Positions = Literal[
    "same",
    "swapped",
    "mean",
    "picked",
    "nearest",
    "linear",
    "bilinear",
    "bilinear aligned",
    "bicubic",
    "bicubic aligned",
]  # fmt: skip

_RESIZED: dict[Positions, tuple[int, dict[str, Any]]] = {  # number of spatial axes, and how
    "linear": (1, {"mode": "linear", "align_corners": False}),
    "bilinear": (2, {"mode": "bilinear", "align_corners": False}),
    "bilinear aligned": (2, {"mode": "bilinear", "align_corners": True}),
    "nearest": (2, {"mode": "nearest"}),
    "bicubic": (2, {"mode": "bicubic", "align_corners": False}),
    "bicubic aligned": (2, {"mode": "bicubic", "align_corners": True}),
}


@dataclass(frozen=True)
class Layout:
    """How positions of a product (..., K) become those of the logits (..., K), classes last in both.

    Each of these maps is linear in the values, the same for every class, and leaves constants as they are; so it
    commutes with W h + b, and can be applied to h instead.

    Attributes:
        class_axis: Axis of the classes in the model's own output.
        positions: ``"same"``; batch and tokens ``"swapped"``; the ``"mean"`` over positions; one position a sample
            ``"picked"``; or the interpolation that resizes a map.
    """

    class_axis: int
    positions: Positions

    def apply(self, h: Tensor, product: Tensor, logits: Tensor) -> Tensor:
        """The activations that stand for the logits.

        Args:
            h: (*P, d), at the positions of the product.
            product: (*P, K).
            logits: (*S, K), classes last.

        Returns:
            (*S, d).

        Raises:
            RuntimeError: The model no longer returns one row of logits for each that the head gives.
        """
        shape = (*logits.shape[:-1], h.shape[-1])
        if self.positions == "same":
            if h.shape[:-1].numel() != logits.shape[:-1].numel():
                raise RuntimeError(
                    f"the head gives {tuple(h.shape[:-1])} rows of logits and the model returns "
                    f"{tuple(logits.shape[:-1])}, which came to the same for the batch that the head was found with: "
                    "find the head again with a batch like this one"
                )
            return h.reshape(shape)
        if self.positions == "swapped":
            return h.transpose(0, 1)
        if self.positions == "mean":
            start = 1 if logits.ndim == h.ndim else logits.ndim - 1
            return h.flatten(start, -2).mean(-2).reshape(shape)
        if self.positions == "picked":
            start = logits.ndim - 1
            rows, h = product.flatten(start, -2), h.flatten(start, -2)
            nearest = (rows - logits.unsqueeze(-2)).abs().amax(-1).argmin(-1)
            return h.gather(-2, nearest[..., None, None].expand(*nearest.shape, 1, h.shape[-1])).squeeze(-2)
        options = _RESIZED[self.positions][1]
        return F.interpolate(h.movedim(-1, 1), size=logits.shape[1:-1], **options).movedim(1, -1)


def class_axes(logits: Tensor, classes: int) -> Iterator[int]:
    """The axes of a model's output that may count the classes: the last, or that after the batch."""
    if logits.ndim and logits.shape[-1] == classes:
        yield -1
    if logits.ndim > 2 and logits.shape[1] == classes:
        yield 1


def layouts(product: torch.Size, logits: torch.Size, class_axis: int) -> Iterator[Layout]:
    """The layouts that shapes (*P, K) and (*S, K) allow."""
    p, s = product[:-1], logits[:-1]
    # Positions may be flattened or not, but where there are as many axes, a reshape would mix them up.
    if p == s or (p.numel() == s.numel() and len(p) != len(s)):
        yield Layout(class_axis, "same")
    if len(p) >= 2 and s == (p[1], p[0], *p[2:]):
        yield Layout(class_axis, "swapped")
    if p == s or p.numel() == s.numel():
        return
    pooled = len(s) < len(p) and p[: len(s)] == s
    squashed = len(s) == len(p) and s[:1] == p[:1] and s[1:].numel() == 1
    if pooled or squashed:
        yield Layout(class_axis, "mean")
    if pooled:
        yield Layout(class_axis, "picked")
    if class_axis == 1 and len(p) == len(s) and p[0] == s[0] and not squashed:
        yield from (Layout(class_axis, name) for name, (axes, _) in _RESIZED.items() if axes == len(p) - 1)


_SPATIAL: dict[int, tuple[str, ...]] = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def axes_of(ndim: int, class_axis: int, positions: Positions) -> tuple[str, ...]:
    """Names of the axes before the last of h (..., d) and of logits (..., K)."""
    if positions == "swapped":
        first, second, *rest = axes_of(ndim, class_axis, "same")
        return (second, first, *rest)
    spatial = ndim - 2
    if spatial < 0:
        return ()
    if spatial == 1 and class_axis == -1:
        return ("batch", "token")
    return ("batch", *_SPATIAL.get(spatial, tuple(f"axis {i}" for i in range(1, spatial + 1))))
