"""Losses for students, for any training loop."""

from __future__ import annotations

import copy
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penult._checks import check_between, check_integer, check_not_negative, check_positive, integer_labels
from penult.distill._span_head import SpanHead
from penult.pair import GenerativePair

__all__ = ["ActivationLoss", "SoftTargetLoss"]


@final
class SoftTargetLoss(nn.Module):
    r"""Weighted sum of the cross-entropy with labels and the divergence from soft targets q at a temperature.

    .. math:: L = (1 - w)\, \mathrm{CE}(z, y) + w\, T^2\, \mathrm{KL}(q \,\|\, \operatorname{softmax}(z / T))

    The student is trained with its own head, and no layer is added. Soft targets are those of `penult.distill.targets`.

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, for the form of the loss.

    Args:
        temperature: T, the temperature of the targets.
        weight: w in [0, 1].

    Raises:
        TypeError: `temperature` or `weight` is not a number.
        ValueError: `temperature` or `weight` is out of range.

    Example:
        >>> loss = SoftTargetLoss()
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> # The student matches the targets, so the loss is the cross-entropy with the labels, 0.1 log 3.
        >>> loss(logits, torch.tensor([0, 1]), torch.full((2, 3), 1 / 3))
        tensor(0.1099, grad_fn=<AddBackward0>)
    """

    def __init__(self, temperature: float = 4.0, weight: float = 0.9) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)
        self.weight = check_between("weight", weight, inclusive=True)

    def forward(self, logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch, ().

        Args:
            logits: Logits of the student (B, K).
            labels: Integer labels (B,) in 0..K−1.
            target: Soft targets (B, K).

        Raises:
            TypeError: Labels are not integers.
            ValueError: Shapes do not fit each other, or a label is out of range.
        """
        if logits.ndim != 2 or target.shape != logits.shape:
            raise ValueError(
                f"logits of the student have shape {tuple(logits.shape)}, and soft targets {tuple(target.shape)}; "
                "expected (B, K) for both. The student must have the teacher's classes, in their order"
            )
        labels = _wide_labels(labels, logits.shape)
        t, w = self.temperature, self.weight
        divergence = F.kl_div((logits / t).log_softmax(-1), target.to(logits), reduction="batchmean")
        return (1 - w) * F.cross_entropy(logits, labels) + w * t * t * divergence

    def extra_repr(self) -> str:
        """Return the part of ``repr(loss)`` between the brackets."""
        return f"temperature={self.temperature:g}, weight={self.weight:g}"


@final
class ActivationLoss(nn.Module):
    r"""Sum of the cross-entropy through the teacher's frozen head and the distance to target activations.

    A linear projector P maps the student's features f to coordinates u = P f of span(W), where the head is W', b at
    its canonical scale. With targets t and the radius r of the pair,

    .. math:: L = \mathrm{CE}(W' u + b, y) + \lambda\, \|u - t\|^2 / r^2 .

    At t = r μ_y the second term is (‖u‖/r − 1)² + 2 (‖u‖/r) (1 − cos(u, μ_y)): a penalty of the norm and, up to a
    constant, the negative log-likelihood of a von Mises-Fisher distribution around μ_y.

    With hints of strength η, a second projector Q learns the teacher's whole activation v, which `targets` of kind
    ``"hinted"`` append to t: L + η ‖Q f − v‖² / r². It only shapes the features: predictions do not use it, and it is
    discarded after training.

    The student predicts with `predict`; `folded` merges projector and head into one linear layer.

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, for hints.

    Args:
        pair: The pair of the teacher's head.
        in_features: Width of the student's features.
        strength: λ.
        projector: A module (B, in_features) → (B, q), where q is the rank of the head. Default: a linear layer.
        hint: η; 0 for no hints. The benchmarks use 5.

    Attributes:
        projector: P, trained with the student.
        hint_projector: Q, trained with the student; None without hints.
        canonical: The head in coordinates of span(W), and r; frozen.

    Raises:
        TypeError: `pair` is not a pair, `in_features` not an integer, or `strength` or `hint` not a number.
        ValueError: `strength` or `hint` is negative, or the projector has the wrong width.

    Example:
        >>> from penult import GenerativePair, Head
        >>> loss = ActivationLoss(GenerativePair(Head(torch.eye(3))), in_features=16)
        >>> loss.predict(torch.randn(5, 16)).shape
        torch.Size([5, 3])
        >>> loss.folded()
        Linear(in_features=16, out_features=3, bias=True)
    """

    def __init__(
        self,
        pair: GenerativePair,
        in_features: int,
        strength: float = 5.0,
        projector: nn.Module | None = None,
        hint: float = 0.0,
    ) -> None:
        super().__init__()
        self.strength, self.hint = check_not_negative("strength", strength), check_not_negative("hint", hint)
        self.in_features = in_features = check_integer("in_features", in_features)
        self.canonical = head = SpanHead.of(pair)
        rank = len(head.span)
        if isinstance(projector, nn.Linear):
            widths = (projector.in_features, projector.out_features)
            if widths != (in_features, rank):
                raise ValueError(
                    f"the projector takes {widths[0]} features to {widths[1]}; expected in_features = {in_features} "
                    f"to {rank}, the rank of the head"
                )
        self.projector = (
            nn.Linear(in_features, rank, device=head.rows.device).to(head.rows) if projector is None else projector
        )
        self.hint_projector = (
            nn.Linear(in_features, head.span.shape[1], device=head.rows.device).to(head.rows) if hint else None
        )

    @property
    def num_classes(self) -> int:
        """K of the teacher's head."""
        return len(self.canonical.rows)

    def forward(self, features: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch, ().

        Args:
            features: Features of the student (B, in_features).
            labels: Integer labels (B,) in 0..K−1.
            target: `targets` (B, d) of kind ``"activation"``; with hints, (B, 2d) of kind ``"hinted"``.

        Raises:
            TypeError: Labels are not integers.
            ValueError: Shapes do not fit each other, or a label is out of range.
        """
        u = self._project(features)
        head, d = self.canonical, self.canonical.span.shape[1]
        width = d if self.hint_projector is None else 2 * d
        if target.shape != (len(u), width):
            kind = "activation" if self.hint_projector is None else "hinted"
            raise ValueError(
                f"targets have shape {tuple(target.shape)}; expected {(len(u), width)}: activations of this teacher, "
                f"penult.distill.targets(pair, labels, kind={kind!r})"
            )
        logits = head.logits(u)
        labels = _wide_labels(labels, logits.shape)
        target = target.to(u)
        distance = self.strength * (u - F.linear(target[:, :d], head.span.to(u))).square().sum(-1).mean()
        if self.hint_projector is not None:
            hint = _projected(self.hint_projector, features)
            distance = distance + self.hint * (hint - target[:, d:]).square().sum(-1).mean()
        return F.cross_entropy(logits, labels) + distance / head.radius.to(u) ** 2

    def predict(self, features: Tensor) -> Tensor:
        """Return the logits (B, K) of the student for its features (B, in_features)."""
        return self.canonical.logits(self._project(features))

    @torch.no_grad()
    def folded(self) -> nn.Linear | nn.Sequential:
        """Merge projector and head into one linear layer (in_features → K) with its own storage.

        Returns:
            The layer; for a projector that is not linear, the projector followed by a linear layer.
        """
        weight, bias = self.canonical.rows, self.canonical.bias
        if isinstance(self.projector, nn.Linear):
            offset = self.projector.bias
            bias = bias if offset is None else bias + weight @ offset.to(weight)
            weight = weight @ self.projector.weight.to(weight)
        classes, features = weight.shape
        layer = nn.utils.skip_init(nn.Linear, features, classes, dtype=weight.dtype, device=weight.device)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer if isinstance(self.projector, nn.Linear) else nn.Sequential(copy.deepcopy(self.projector), layer)

    def extra_repr(self) -> str:
        """Return the part of ``repr(loss)`` between the brackets."""
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, strength={self.strength:g}"
        return text + (f", hint={self.hint:g}" if self.hint else "")

    def _project(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features:
            raise ValueError(
                f"the student's features have shape {tuple(features.shape)}; expected (B, {self.in_features})"
            )
        u = _projected(self.projector, features)
        if u.shape != (len(features), self.canonical.rows.shape[1]):
            raise ValueError(
                f"the output of the projector has shape {tuple(u.shape)}; expected "
                f"{(len(features), self.canonical.rows.shape[1])}, coordinates in the span of the head"
            )
        return u


def _projected(projector: nn.Module, features: Tensor) -> Tensor:
    """Apply a projector to features, in its own precision, which is that of the teacher's head."""
    weight = next(projector.parameters(), features)
    projected: Tensor = projector(features.to(weight.dtype))
    return projected


def _wide_labels(labels: Tensor, shape: torch.Size) -> Tensor:
    """Check labels (B,) for logits (B, K) and return them as int64."""
    # On an accelerator the values would have to be waited for, in every step of the training.
    values = not torch.compiler.is_compiling() and not (isinstance(labels, Tensor) and labels.is_cuda)
    return integer_labels(labels, shape[:1], shape[1], values=values)
