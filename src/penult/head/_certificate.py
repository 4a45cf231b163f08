"""What was found of a head, and what was not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["HeadCertificate", "HeadNotFoundError", "Support"]

Support = Literal["orthant", "sphere", "ball", "cube", "box", "reals"]


class HeadNotFoundError(ValueError):
    """No linear layer of the model reproduces the model's logits."""


@dataclass(frozen=True)
class HeadCertificate:
    """How a head was found, and what was seen of the activations h that it consumes.

    Attributes:
        path: Name of the head's module in the model, ``""`` if the model itself is the head.
        kind: What the head is; ``"linear"``.
        scale: Factor between the head's module and the logits; 1.
        residual: max abs(W h + b - logits) / max(1, max abs(logits)).
        shape: (K, d).
        bias: Whether the head has a bias.
        before: Class name of the module whose output is h, looking through Dropout, Identity and Flatten;
            None if no module's output is (a mean over tokens, say, or the model's input).
        support: Where the observed h lie. ``"sphere"``: all norms agree within 1e-3, and a norm layer was
            folded or the norms are 1. ``"ball"``: a norm layer was folded but the norms differ (its eps
            shrinks vectors of little variance). ``"cube"``: a Tanh or Softsign stands before. ``"box"``: a
            bounded activation (ReLU6, Hardtanh, Sigmoid, Hardsigmoid) does. ``"orthant"``: no h is
            negative. ``"reals"``: none of these.
        zeros: Share of exact zeros.
        norms: Smallest and largest Euclidean norm.
        minimum: Smallest coordinate.
        maximum: Largest coordinate.
        gauge: Norm of the mean row of W, which the softmax does not see.
        folded: ``"LayerNorm"`` or ``"RMSNorm"`` if that layer's affine part was folded into the head; h is
            then the vector before it.
        samples: Number of activations seen.
        norm_path: Name of the folded layer's module, or None.
        call: Which call of the head's module in one forward made the logits, counted from 0.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> certificate = penult.find_head(model, torch.randn(5, 4)).certificate
        >>> certificate.path, certificate.before, certificate.support
        ('2', 'ReLU', 'orthant')
    """

    path: str
    kind: Literal["linear"]
    scale: float
    residual: float
    shape: tuple[int, int]
    bias: bool
    before: str | None
    support: Support
    zeros: float
    norms: tuple[float, float]
    minimum: float
    maximum: float
    gauge: float
    folded: Literal["LayerNorm", "RMSNorm"] | None
    samples: int
    norm_path: str | None = None
    call: int = 0

    def __str__(self) -> str:
        classes, features = self.shape
        bounds = {
            "orthant": " (>=0)",
            "cube": " (-1..1)",
            "box": f" [{self.minimum:.3g}, {self.maximum:.3g}]",
        }
        lines = [
            f"path={self.path or '(the model itself)'}  {self.kind} {features}->{classes}  "
            f"residual={self.residual:.1g}  support: {self.support}{bounds.get(self.support, '')}  "
            f"before: {self.before or 'unknown'}",
            f"  h       {self.minimum:.4g} to {self.maximum:.4g}, {self.zeros:.1%} zeros ({self.samples} samples)",
            f"  |h|     {self.norms[0]:.5g} to {self.norms[1]:.5g}",
            f"  bias    {'yes' if self.bias else 'no: the prior follows from W alone'}",
            f"  gauge   {self.gauge:.3g} = norm of the mean row of W",
        ]
        if self.folded is not None:
            radius = f"sqrt({features}) = {math.sqrt(features):.5g}"
            lines.append(f"  folded  {self.folded} at {self.norm_path}: ideal radius {radius}")
        return "\n".join(lines)
