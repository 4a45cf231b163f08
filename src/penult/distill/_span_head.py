"""The head of a teacher in coordinates of the span of its rows."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult import special
from penult._checks import described
from penult.pair import GenerativePair

__all__ = ["SpanHead", "check_pair"]

# Number of samples of the pair, for the mean norm of its activations.
_SAMPLES = 4096


@final
class SpanHead(nn.Module):
    """A head in coordinates of span(W), scaled so that the mean norm of its rows is 1/√3.

    The softmax depends only on the component in span(W), and (W/c, c h) is the same classifier for every c. But c
    matters for a student that is trained through the head: 1/√3 is the norm of a row of a new `torch.nn.Linear`.

    Attributes:
        rows: Centered rows of the head (K, q).
        bias: (K,).
        span: Orthonormal rows (q, d).
        scale: c, (). An activation h has the coordinates c U h.
        radius: Mean norm of an activation of the pair in these coordinates, ().
    """

    rows: Tensor
    bias: Tensor
    span: Tensor
    scale: Tensor
    radius: Tensor

    def __init__(self, rows: Tensor, bias: Tensor, span: Tensor, scale: Tensor, radius: Tensor) -> None:
        super().__init__()
        for name, tensor in (("rows", rows), ("bias", bias), ("span", span), ("scale", scale), ("radius", radius)):
            self.register_buffer(name, tensor)

    @classmethod
    @torch.no_grad()
    def of(cls, pair: GenerativePair) -> SpanHead:
        """Convert the head of a pair; the radius is the mean norm in span(W) of samples of the pair.

        Raises:
            TypeError: `pair` is not a pair.
            ValueError: All rows of the head are equal, or the mean norm is 0 or not finite.
        """
        check_pair(pair)
        head = pair.head
        _, scale = head.rescaled()
        span = head.span()
        rows = torch.cat([part.to(span.dtype) @ span.T for _, part in head.centered_blocks()]) / scale
        h, _ = pair.sample((_SAMPLES,), generator=torch.Generator(span.device).manual_seed(0))
        radius = scale * float(torch.linalg.vector_norm(h.to(span.dtype) @ span.T, dim=-1).double().mean())
        if not 0 < radius < float("inf"):
            raise ValueError(
                f"the mean norm of samples of the pair in the span of its head is {radius}; expected a positive, "
                "finite norm. Fit another base"
            )
        bias = head.full_bias.to(span.dtype, copy=True)
        return cls(rows, bias, span.clone(), rows.new_tensor(scale), rows.new_tensor(radius))

    def logits(self, u: Tensor) -> Tensor:
        """Return the logits (N, K) of coordinates (N, q), in their dtype."""
        return F.linear(u, self.rows.to(u), self.bias.to(u))

    def read(self, h: Tensor) -> Tensor:
        """Return the coordinates (N, q) of activations (N, d)."""
        coordinates: Tensor = self.scale * (h.to(self.span) @ self.span.T)
        return coordinates

    def typicality(self, u: Tensor, y: Tensor) -> Tensor:
        """Return P(C ≤ cos(u, w_y)) (N,) of coordinates u (N, q) and classes y (N,).

        C is the cosine between a von Mises-Fisher direction with κ = r‖w_y‖ and its mean direction.
        """
        # Squares could overflow in the dtype of u.
        norms = torch.linalg.vector_norm(u, dim=-1, dtype=special.working_dtype(u.device))
        cosine = ((u * self.directions[y]).sum(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)).to(u.dtype)
        # In one dimension cosines are −1 or 1, and a rounded 1 − ε would have probability 0.
        if u.shape[-1] == 1:
            cosine = cosine.sign()
        kappa = self.radius * torch.linalg.vector_norm(self.rows, dim=-1)
        return special.cosine_cdf(u.shape[-1], kappa[y], cosine.clamp(-1, 1))

    @property
    def directions(self) -> Tensor:
        """Mean directions μ_y = w_y / ‖w_y‖ (K, q)."""
        norms = torch.linalg.vector_norm(self.rows, dim=-1, keepdim=True)
        directions: Tensor = self.rows / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return directions

    @property
    def prototypes(self) -> Tensor:
        """Typical activation of each class, r μ_y (K, q)."""
        return self.radius * self.directions


def check_pair(pair: GenerativePair) -> None:
    """Raise unless an argument is a pair."""
    if not isinstance(pair, GenerativePair):
        raise TypeError(
            f"pair is {described(pair)}; expected a penult.GenerativePair. Make one from a head with "
            "penult.GenerativePair(head), or read one with penult.load(path)"
        )


# Pickles of version 0.1 have this name.
Canonical = SpanHead
