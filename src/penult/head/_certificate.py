"""The certificate of a head that was found, and the error for one that was not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from penult.head._tensors import HeadTensors

__all__ = [
    "UNMIXED",
    "HeadCertificate",
    "HeadNotFoundError",
    "HeadPart",
    "Kind",
    "Positions",
    "Support",
    "certificate_of_no_model",
]

Kind = Literal["linear", "matmul", "bmm", "sum", "einsum", "conv", "cosine", "moments"]


Positions = Literal[
    "same",
    "swapped",
    "pieces",
    "pieces along axis 1",
    "mean",
    "picked",
    "nearest",
    "linear",
    "bilinear",
    "bilinear aligned",
    "bicubic",
    "bicubic aligned",
]  # fmt: skip


# Positions for which every h is a vector that the model computed, and not an average of several.
UNMIXED: frozenset[Positions] = frozenset({"same", "swapped", "pieces", "pieces along axis 1", "picked"})


Support = Literal["orthant", "sphere", "ball", "cube", "box", "reals"]


class HeadNotFoundError(ValueError):
    """No linear map of one activation reproduces the model's logits."""


@dataclass(frozen=True)
class HeadPart:
    """A product whose activations are a part of h, for a head that a model assembles from several products.

    Attributes:
        path: Name of the module in whose forward it is computed.
        kind: As in `HeadCertificate`.
        shape: Shape of its own W.
        weight: As in `HeadCertificate`.
        weight_first: As in `HeadCertificate`.
        operand: As in `HeadCertificate`.
        forward_call: As in `HeadCertificate`.
    """

    path: str
    kind: Kind
    shape: tuple[int, int]
    weight: str | None
    weight_first: bool
    operand: bool
    forward_call: int

    def __str__(self) -> str:
        classes, features = self.shape
        return f"{self.path or '(the model itself)'} ({self.kind} {features}->{classes})"


@dataclass(frozen=True)
class HeadCertificate:
    """How a head was found, and statistics of the activations h that it reads.

    Attributes:
        path: Name of the module in whose forward the head's product is computed, ``""`` for the model itself.
        kind: Operation that computes it: ``"linear"``, ``"matmul"``, ``"bmm"`` with one matrix for the whole
            batch, the ``"sum"`` of h * W over an axis, ``"einsum"``, a pointwise ``"conv"``, or ``"cosine"`` where h
            and the rows of W before the scale have norm 1. ``"moments"`` for a head of no model, from
            :meth:`penult.Moments.pair`.
        scale: Number by which the model multiplies W h before it returns the logits.
        residual: max abs(head(h) - logits) / max abs(logits), computed after a log-softmax where
            ``log_softmax``. None for a head of no model.
        shape: (K, d).
        bias: Whether the head has a bias.
        before: Class name of the module, or name of the function, whose output is h, ignoring dropout, casts, views
            and selections in between; None if h is the model's own input.
        support: Set in which the observed h lie. ``"sphere"``: all norms agree within 1e-3, and a norm layer was
            folded or vectors were normalised. ``"ball"``: a norm layer was folded but the norms differ (its eps
            shrinks vectors of little variance, or a mean over positions follows it). ``"cube"``: `before` is a tanh or
            softsign. ``"box"``: `before` is a bounded activation (ReLU6, Hardtanh, sigmoid, hard sigmoid) or an
            average of one. ``"orthant"``: no h is negative. ``"reals"``: none of these.
        zeros: Fraction of exact zeros. Like the next three, None for a head of no model, since moments do not tell it.
        norms: Smallest and largest Euclidean norm.
        minimum: Smallest coordinate.
        maximum: Largest coordinate.
        gauge: Norm of the mean row of W, which does not change the softmax.
        folded: ``"LayerNorm"`` or ``"RMSNorm"`` if the gain and offset of such a layer were folded into the head; h is
            then the vector before them.
        samples: Number of activations observed.
        norm_path: Name of the folded layer's module, or None.
        weight: Name of the parameter that is W, or that W is a view of; None if W is computed.
        weight_first: Whether W is the first operand of the product, as in ``W @ h.T``.
        operand: Whether the operand of the product is the parameter itself, not a view of it.
        call: Index, from 0, of the product that gives the logits among the products with this W (of this shape, if W is
            computed) in the module's forward.
        forward_call: The same index in the whole model's forward, where products are matched by W only if it is the
            operand; None in files of older versions.
        class_axis: Axis of the classes in the model's own output: -1, or 1 for maps (B, K, H, W).
        axes: Names of the axes before the last of h and of logits, as `Tap` gives them.
        positions: How the positions of W h + b, and so those of h, become those of the logits: ``"same"``, batch and
            tokens ``"swapped"``, the rows of several calls concatenated (``"pieces"``, or ``"pieces along axis 1"``),
            the ``"mean"`` over positions, one position of each sample ``"picked"``, or the name
            of the interpolation that resizes a map.
        shifted: Whether a bias was fitted, in addition to that of the product itself.
        log_softmax: Whether the model returns log-probabilities, which are logits up to one constant for each sample.
        empty: Number of classes whose row of W is zero, for example padding tokens that were never trained.
        confirmed: The residual on a second batch (the first one reversed and scaled), which the head was not fitted
            to; None if the model raised an error for it.
        unit_offset: Whether the folded gain is 1 + weight.
        rectified: Whether h equals max(u, 0), entry by entry, where u is the input of a ReLU right before the head (a
            module, a function or a clamp at 0, in place or not), ignoring the same operations as `before`.
            `Tap.pre_activation` and ``extract(..., pre_activation=True)`` then give u. False in files of older
            versions.
        parts: For a head that the model assembles from several products, such as the mean of two heads that read
            different tokens, or from chosen classes of one: the products whose activations, concatenated, are h. Then
            W and b are computed from theirs, and `path` is the innermost module that contains all of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> certificate = penult.find_head(model, torch.randn(5, 4)).certificate
        >>> certificate.path, certificate.before, certificate.support, certificate.rectified
        ('2', 'ReLU', 'orthant', True)
    """

    path: str
    kind: Kind
    scale: float
    residual: float | None
    shape: tuple[int, int]
    bias: bool
    before: str | None
    support: Support
    zeros: float | None
    norms: tuple[float, float] | None
    minimum: float | None
    maximum: float | None
    gauge: float
    folded: Literal["LayerNorm", "RMSNorm"] | None
    samples: int
    norm_path: str | None = None
    weight: str | None = None
    weight_first: bool = False
    operand: bool = False
    call: int = 0
    forward_call: int | None = None
    class_axis: int = -1
    axes: tuple[str, ...] = ("batch",)
    positions: Positions = "same"
    shifted: bool = False
    log_softmax: bool = False
    empty: int = 0
    confirmed: float | None = None
    unit_offset: bool = False
    rectified: bool = False
    parts: tuple[HeadPart, ...] = ()
    origin: str | None = None

    def __post_init__(self) -> None:
        # In files the parts are mappings.
        parts = [part if isinstance(part, HeadPart) else _part_of(part) for part in self.parts]
        object.__setattr__(self, "parts", tuple(parts))

    def __str__(self) -> str:
        classes, features = self.shape
        if self.origin is not None:
            return "\n".join(
                [
                    f"{self.kind} {features}->{classes}  of no model: {self.origin}",
                    f"  h       {self.samples} activations, of which only the moments are known",
                    f"  gauge   {self.gauge:.3g} = norm of the mean row of W",
                ]
            )
        if self.norms is None:
            raise TypeError("norms is None; expected two numbers. Only a head of no model has none")
        bounds = {
            "orthant": " (>=0)",
            "cube": " (-1..1)",
            "box": f" [{self.minimum:.3g}, {self.maximum:.3g}]",
        }
        scale = "" if self.scale == 1 else f"  scale={self.scale:.5g}"
        second = "not confirmed: the model refused a second batch"
        if self.confirmed is not None:
            second = f"confirmed on a second batch, residual={self.confirmed:.1g}"
        lines = [
            f"path={self.path or '(the model itself)'}  {self.kind} {features}->{classes}{scale}  "
            f"residual={self.residual:.1g}  support: {self.support}{bounds.get(self.support, '')}  "
            f"before: {self.before or 'unknown'}",
            f"  h       {self.minimum:.4g} to {self.maximum:.4g}, {self.zeros:.1%} zeros ({self.samples} samples)"
            + "; rectified by the ReLU before" * self.rectified,
            f"  |h|     {self.norms[0]:.5g} to {self.norms[1]:.5g}",
            f"  W       {self.weight or 'computed by the model'}; {second}",
            f"  bias    {'yes' if self.bias else 'no: the prior follows from W alone'}",
            f"  gauge   {self.gauge:.3g} = norm of the mean row of W",
        ]
        if self.axes != ("batch",) or self.positions != "same":
            pieces = "; rows of several calls, concatenated"
            after = {"same": "", "pieces": pieces, "pieces along axis 1": f"{pieces} along axis 1"}
            after |= {"mean": "; mean over positions", "picked": "; one position of each sample is picked"}
            lines.append(
                f"  axes    h ({', '.join((*self.axes, 'd'))}), classes on axis {self.class_axis} of the model's output"
                + after.get(self.positions, f"; {self.positions} resizing")
            )
        if self.parts:
            lines.append(f"  parts   h is the activations of {', '.join(map(str, self.parts))}, concatenated")
        if self.empty:
            lines.append(f"  empty   {self.empty} classes have a row of zeros")
        if self.log_softmax:
            lines.append("  output  log-probabilities: logits up to a number a sample")
        if self.folded is not None:
            radius = f"sqrt({features}) = {math.sqrt(features):.5g}"
            lines.append(f"  folded  {self.folded} at {self.norm_path}: ideal radius {radius}")
        return "\n".join(lines)


def _part_of(facts: Mapping[str, Any]) -> HeadPart:
    return HeadPart(**{**facts, "shape": tuple(facts["shape"])})


def certificate_of_no_model(head: HeadTensors, kind: Kind, origin: str, samples: int) -> HeadCertificate:
    """Return the certificate of a head that was computed from activations alone."""
    return HeadCertificate(
        path="",
        kind=kind,
        scale=1.0,
        residual=None,
        shape=(head.weight.shape[0], head.weight.shape[1]),
        bias=head.bias is not None,
        before=None,
        support="reals",
        zeros=None,
        norms=None,
        minimum=None,
        maximum=None,
        gauge=float(head.mean_row.norm()),
        folded=None,
        samples=samples,
        empty=int((~head.weight.any(dim=1)).sum()),
        origin=origin,
    )
