"""The head of a teacher as its students see it: on the span of its rows, at a scale of its own."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult import special
from penult.pair import GenerativePair

__all__ = ["Canonical", "check_pair"]

_DRAWS = 4096  # of the pair, for the mean norm of its activations


@final
class Canonical(nn.Module):
    """A head in coordinates of span(W), where the mean norm of its rows is 1/√3.

    The softmax sees span(W) alone, and (W/c, c h) is the same classifier for every c. A student that is trained
    through the head is not indifferent to c, though: 1/√3 is the norm of a row of a fresh `torch.nn.Linear`.

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
    def of(cls, pair: GenerativePair) -> Canonical:
        """The head of a pair; its radius is the mean in-span norm of draws of the pair.

        Raises:
            TypeError: `pair` is no pair.
            ValueError: All rows of the head are equal, or no radius comes of the draws.
        """
        check_pair(pair)
        head = pair.head
        _, scale = head.rescaled()
        span = head.span()
        rows = torch.cat([part.to(span.dtype) @ span.T for _, part in head.centered_blocks()]) / scale
        drawn, _ = pair.sample((_DRAWS,), generator=torch.Generator(span.device).manual_seed(0))
        radius = scale * float(torch.linalg.vector_norm(drawn.to(span.dtype) @ span.T, dim=-1).double().mean())
        if not 0 < radius < float("inf"):
            raise ValueError(f"draws of the pair have the mean norm {radius} in the span of its head; fit another base")
        bias = head.full_bias.to(span.dtype, copy=True)
        return cls(rows, bias, span.clone(), rows.new_tensor(scale), rows.new_tensor(radius))

    def logits(self, u: Tensor) -> Tensor:
        """The head's logits (N, K) of coordinates (N, q), in their dtype."""
        return F.linear(u, self.rows.to(u), self.bias.to(u))

    def read(self, h: Tensor) -> Tensor:
        """Coordinates (N, q) of activations (N, d)."""
        coordinates: Tensor = self.scale * (h.to(self.span) @ self.span.T)
        return coordinates

    def typicality(self, u: Tensor, y: Tensor) -> Tensor:
        """P(cos ≤ that of u (N, q) and the row of class y (N,)) for an activation of the class: vMF of κ = r‖w_y‖."""
        norms = torch.linalg.vector_norm(u, dim=-1)
        cosine = (u * self.directions[y]).sum(-1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        if u.shape[-1] == 1:
            cosine = cosine.sign()  # of which rounding would leave 1 − ε, below all of the law
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
        """What a typical activation of each class is, r μ_y (K, q)."""
        return self.radius * self.directions


def check_pair(pair: GenerativePair) -> None:
    """Refuse what is no pair."""
    if not isinstance(pair, GenerativePair):
        raise TypeError(
            f"pair must be a penult.GenerativePair, got {type(pair).__name__}: make one of a head with "
            "penult.GenerativePair(head), or read one with penult.load(path)"
        )
